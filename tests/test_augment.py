"""Augmentation: decided by seed, epoch and row alone, on the judged text alone, with the labels as they were."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_guard.data import augment, perturbation
from lora_guard.data.augment import augmented, framed, in_small_talk, truncated, typos
from lora_guard.data.example import Example

PROMPT = Example("How do I bake bread in a wood oven?", None, False, {"a": False}, "mine")
ANSWER = replace(PROMPT, response="Mix the flour and the water, wait for an hour, and bake it for two.")


def test_nothing_changes_at_0_and_nearly_every_row_at_1() -> None:
    assert all(augmented(PROMPT, 0.0, seed=0, epoch=0, row=row) is PROMPT for row in range(200))
    changed = [augmented(PROMPT, 1.0, seed=0, epoch=0, row=row) for row in range(200)]
    assert sum(example != PROMPT for example in changed) > 190


def test_the_share_of_changed_rows_is_the_probability() -> None:
    changed = sum(augmented(PROMPT, 0.3, seed=0, epoch=0, row=row) != PROMPT for row in range(1000))
    assert 250 < changed < 350


def test_a_harmful_prompt_is_spelt_otherwise_half_as_often_as_a_harmless_one() -> None:
    harmful = replace(PROMPT, harmful=True)
    rows = range(1000)
    kept = [row for row in rows if augmented(harmful, 1.0, seed=0, epoch=0, row=row) == harmful]
    otherwise = [row for row in rows if PROMPT.prompt not in augmented(PROMPT, 1.0, seed=0, epoch=0, row=row).prompt]
    assert 0.4 * len(otherwise) < len(kept) < 0.6 * len(otherwise)


def test_a_harmful_response_is_changed_as_often_as_a_harmless_one() -> None:
    for row in range(100):
        changed = augmented(replace(ANSWER, harmful=True), 1.0, seed=0, epoch=0, row=row)
        assert replace(changed, harmful=False) == augmented(ANSWER, 1.0, seed=0, epoch=0, row=row)


@given(st.integers(), st.integers(0, 9), st.integers(0))
def test_seed_epoch_and_row_decide_the_change(seed: int, epoch: int, row: int) -> None:
    where = {"seed": seed, "epoch": epoch, "row": row}
    assert augmented(ANSWER, 0.5, **where) == augmented(ANSWER, 0.5, **where)


@pytest.mark.parametrize("differing", ["seed", "epoch", "row"])
def test_each_of_seed_epoch_and_row_matters(differing: str) -> None:
    seen = {augmented(PROMPT, 1.0, **{"seed": 0, "epoch": 0, "row": 0, differing: n}).prompt for n in range(20)}  # type: ignore[arg-type]
    assert len(seen) > 10


@given(st.text(), st.one_of(st.none(), st.text()), st.integers(0, 1000))
def test_only_the_judged_text_changes(prompt: str, response: str | None, row: int) -> None:
    example = Example(prompt, response, True, {"a": False}, "mine")
    changed = augmented(example, 1.0, seed=0, epoch=0, row=row)
    assert replace(changed, prompt=prompt, response=response) == example
    assert changed.target == example.target
    assert response is None or changed.prompt == prompt


@pytest.mark.parametrize("example", [PROMPT, ANSWER], ids=["prompt", "response"])
def test_every_change_for_the_target_is_drawn(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: set[str] = set()

    def spy(name: str) -> Callable[[str, random.Random], str]:
        return lambda text, chance: drawn.add(name) or text

    for kind in ("_OF_PROMPTS", "_OF_RESPONSES"):
        monkeypatch.setattr(augment, kind, tuple(spy(change.__name__) for change in getattr(augment, kind)))
    for row in range(200):
        augmented(example, 1.0, seed=0, epoch=0, row=row)
    spellings = {"capitals", "typos", "homoglyphs", "spacing", "leet", "zero_width"}
    assert drawn == spellings | ({"framed", "in_small_talk"} if example.response is None else {"truncated"})


@given(st.lists(st.sampled_from(["one", "two", "", "\n", "x"])), st.integers())
def test_a_truncated_text_keeps_its_first_half(words: list[str], seed: int) -> None:
    text = " ".join(words)
    cut = truncated(text, random.Random(seed))
    assert text.startswith(cut)
    assert 2 * len(cut.split(" ")) >= len(text.split(" "))


def test_a_text_is_cut_at_different_places() -> None:
    assert len({truncated("a b c d e f g h", random.Random(seed)) for seed in range(50)}) == 5


def test_a_frame_holds_the_text_as_it_is() -> None:
    frames = {framed("TEXT {0} %s", random.Random(seed)) for seed in range(200)}
    assert len(frames) > 5
    assert all("TEXT {0} %s" in frame for frame in frames)


def test_small_talk_stands_before_a_text_after_it_or_on_both_sides() -> None:
    talked = [in_small_talk("TEXT {0} %s", random.Random(seed)) for seed in range(200)]
    sides = {tuple(bool(side) for side in text.split("TEXT {0} %s")) for text in talked}
    assert sides == {(True, False), (False, True), (True, True)}


def test_no_small_talk_is_a_perturbation_that_measures_it() -> None:
    assert not set(augment._SMALL_TALK) & set(perturbation._CHATTER)


def test_typos_are_few() -> None:
    text = "This is a sentence of some length. " * 20
    found = typos(text, random.Random(0))
    assert 0.8 * len(text) < len(found) < 1.2 * len(text)
    same = sum(a == b for a, b in zip(found.split(), text.split(), strict=False))
    assert len(text.split()) // 4 < same < len(text.split())
