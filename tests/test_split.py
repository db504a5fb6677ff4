"""Splits keep a prompt on one side; duplicates and overlaps are dropped and counted."""

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


def test_duplicates_are_dropped_and_counted_and_the_first_stays() -> None:
    rows = [example("a", "x"), example("A!", "x"), example("a", "y"), example("a", "x", harmful=True)]
    kept, dropped = drop_duplicates(rows)
    assert kept == [rows[0], rows[2], rows[3]]
    assert dropped == 1


def test_training_prompts_that_occur_in_a_held_out_set_are_dropped_and_counted() -> None:
    rows = [example("a", "x"), example("b", "x")]
    assert drop_overlap(rows, [example("A.", None)]) == ([rows[1]], 1)


def test_the_papers_split_has_its_sizes_and_takes_no_other_data() -> None:
    train, validation = split_paper([example("a")] * 27_186, seed=0)
    assert (len(train), len(validation)) == (24_672, 2_514)
    assert sorted(train + validation) == list(range(27_186))
    with pytest.raises(DataError, match="was given 5 rows; allowed: the 27,186"):
        split_paper([example("a")] * 5, seed=0)
