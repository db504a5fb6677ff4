"""Splits keep a prompt on one side; duplicates and overlaps are dropped and counted."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_guard.data.example import Example
from lora_guard.data.split import drop_duplicates, drop_overlap, fold, split_grouped, split_paper
from lora_guard.errors import DataError


def example(prompt: str, response: str | None = None, harmful: bool | None = False) -> Example:
    return Example(prompt, response, harmful, {}, "test")


prompts = st.lists(st.sampled_from(["a", "A!", "b", "B ", "c", "?", "??", "d e", "D-E"]), min_size=2, max_size=40)


@given(prompts, st.floats(0.05, 0.9), st.integers(0, 99))
def test_no_prompt_is_on_both_sides_and_no_row_is_lost(texts: list[str], fraction: float, seed: int) -> None:
    examples = [example(text) for text in texts]
    if len({fold(text) for text in texts}) < 2:
        with pytest.raises(DataError, match="needed: two prompts"):
            split_grouped(examples, fraction, seed)
        return
    train, validation = split_grouped(examples, fraction, seed)
    assert sorted(train + validation) == list(range(len(texts)))
    assert train
    assert validation
    assert {fold(texts[index]) for index in train}.isdisjoint(fold(texts[index]) for index in validation)
    assert (train, validation) == split_grouped(examples, fraction, seed)


def test_about_the_asked_fraction_is_held_out() -> None:
    train, validation = split_grouped([example(f"p{n // 3}") for n in range(900)], 0.1, seed=0)
    assert 90 <= len(validation) <= 92
    assert len(train) == 900 - len(validation)


def test_prompts_that_differ_in_case_and_punctuation_are_the_same() -> None:
    assert fold("How do I bake, bread?") == fold("how do i  BAKE bread")
    assert fold("①") == fold("1")
    assert fold("?") != fold("!")


@given(st.text())
def test_case_punctuation_and_space_around_never_change_what_a_prompt_is(text: str) -> None:
    if any(character.isalnum() for character in unicodedata.normalize("NFKC", text).casefold()):
        assert fold(f"\n «{text.replace(' ', ' - ')}»?! ") == fold(text)
    plain = "".join(character for character in text if character.isascii())
    if any(character.isalnum() for character in plain):
        assert fold(plain.upper()) == fold(plain.lower())


def test_prompts_without_letters_are_the_same_only_if_equal() -> None:
    texts = ["", " ", "?", "??", "🙂", "🙃", "\ud800"]
    assert len({fold(text) for text in texts}) == len(texts)


@given(prompts, prompts)
def test_what_stays_is_not_held_out_and_nothing_else_goes(texts: list[str], held_out: list[str]) -> None:
    examples = [example(text) for text in texts]
    kept, dropped = drop_overlap(examples, [example(text) for text in held_out])
    evaluated = {fold(text) for text in held_out}
    assert kept == [row for row in examples if fold(row.prompt) not in evaluated]
    assert dropped == len(examples) - len(kept)


@given(prompts)
def test_one_of_each_kind_of_duplicate_stays_and_it_is_the_first(texts: list[str]) -> None:
    examples = [example(text) for text in texts]
    kept, dropped = drop_duplicates(examples)
    first = {fold(text): index for index, text in reversed(list(enumerate(texts)))}
    assert [id(row) for row in kept] == [id(examples[index]) for index in sorted(first.values())]
    assert dropped == len(examples) - len(kept)
    assert drop_duplicates(kept) == (kept, 0)


def test_rows_of_other_labels_are_no_duplicates() -> None:
    rows = [Example("a", None, None, known, "test") for known in ({}, {"rude": True}, {"rude": False})]
    assert drop_duplicates(rows) == (rows, 0)
    same = [Example("a", None, None, known, "test") for known in ({"x": True, "y": False}, {"y": False, "x": True})]
    assert drop_duplicates(same) == (same[:1], 1)


def test_duplicates_are_dropped_and_counted_and_the_first_stays() -> None:
    rows = [example("a", "x"), example("a", "y"), example("A!", "x"), example("a", "x", harmful=True)]
    kept, dropped = drop_duplicates(rows)
    assert kept == [rows[0], rows[1], rows[3]]
    assert dropped == 1


def test_training_prompts_that_occur_in_a_held_out_set_are_dropped_and_counted() -> None:
    rows = [example("a", "x"), example("b", "x")]
    assert drop_overlap(rows, [example("A.", None)]) == ([rows[1]], 1)


def test_the_papers_split_has_its_sizes_and_takes_no_other_data() -> None:
    train, validation = split_paper([example("a")] * 27_186, seed=0)
    assert (len(train), len(validation)) == (24_672, 2_514)
    assert sorted(train + validation) == list(range(27_186))
    assert split_paper([example("a")] * 27_186, seed=1) != (train, validation)
    with pytest.raises(DataError, match="was given 5 rows; allowed: the 27,186"):
        split_paper([example("a")] * 5, seed=0)
