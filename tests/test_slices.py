"""Slices hold the rows they name, and small or one-sided ones show how many rows they are and nothing else."""

import numpy as np
import pytest

from lora_guard.data.example import Example
from lora_guard.evaluation.metrics import Floats
from lora_guard.evaluation.scores import Scored
from lora_guard.evaluation.sets import EvalSet
from lora_guard.evaluation.slices import SHOWN, slices


def scored(examples: list[Example], harmful: list[float], scores: list[float], rude: list[float]) -> Scored:
    labels = np.array([harmful, rude]).T
    columns: Floats = np.array([scores, scores]).T
    half = np.full_like(columns, 0.5)
    return Scored(EvalSet("mine", "mine.jsonl", "hash", examples), columns, columns, columns, half, labels, {})


def example(text: str = "a", response: str | None = None, source: str = "one") -> Example:
    return Example(text, response, None, {}, source)


def test_a_slice_has_the_metrics_of_its_rows_alone() -> None:
    examples = [example(source="good")] * 20 + [example(source="bad")] * 20
    harmful = [1.0, 0.0] * 20
    right = [0.9, 0.1] * 10
    found = slices(scored(examples, harmful, right + right[::-1], [np.nan] * 40), ("rude",), resamples=20, seed=0)
    assert set(found) == {"source"}
    good, bad = found["source"]["good"], found["source"]["bad"]
    assert (good["n"], good["positives"]) == (20, 10)
    assert set(good) == {"n", "positives", *SHOWN}
    assert (good["auroc"]["value"], bad["auroc"]["value"]) == (1, 0)
    assert (good["fpr"]["value"], bad["fpr"]["value"]) == (0, 1)


def test_few_rows_or_one_class_show_their_number_alone() -> None:
    examples = [example(source="few")] * 19 + [example(source="one class")] * 30
    harmful = [1.0] + [0.0] * 18 + [0.0] * 30
    found = slices(scored(examples, harmful, [0.5] * 49, [np.nan] * 49), ("rude",), resamples=20, seed=0)["source"]
    assert found["few"] == {"n": 19, "positives": 1}
    assert found["one class"] == {"n": 30, "positives": 0}


@pytest.mark.parametrize(("length", "bucket"), [(0, 0), (64, 0), (65, 1), (256, 1), (1024, 2), (1025, 3)])
def test_a_length_is_that_of_the_judged_text(length: int, bucket: int) -> None:
    names = ["≤ 64 characters", "≤ 256 characters", "≤ 1,024 characters", "> 1,024 characters"]
    other = 3 if bucket == 0 else 0
    filler = example("x" * (2000 if other == 3 else 1))
    for judged in (example("x" * length), example("x" * 100, "x" * length)):
        found = slices(scored([judged, filler], [1, 0], [0.9, 0.1], [np.nan] * 2), ("rude",), resamples=20, seed=0)
        assert found["length"] == {
            names[place]: {"n": 1, "positives": int(place == bucket)} for place in sorted({bucket, other})
        }


def test_a_category_is_its_harmful_rows_against_all_unharmful_ones() -> None:
    rude = [1.0] * 15 + [np.nan] * 10 + [0.0] * 30
    harmful = [1.0] * 25 + [0.0] * 30
    scores = [0.9] * 12 + [0.1] * 13 + [0.2] * 27 + [0.8] * 3
    found = slices(scored([example()] * 55, harmful, scores, rude), ("rude",), resamples=20, seed=0)["category"]
    assert (found["rude"]["n"], found["rude"]["positives"]) == (45, 15)
    assert found["rude"]["recall"]["value"] == pytest.approx(12 / 15)
    assert found["rude"]["fpr"]["value"] == pytest.approx(3 / 30)


def test_rows_without_a_label_are_in_no_slice() -> None:
    examples = [example(source="a"), example(source="a"), example(source="b")]
    found = slices(scored(examples, [1, np.nan, 0], [0.5] * 3, [np.nan] * 3), ("rude",), resamples=20, seed=0)
    assert found["source"]["a"] == {"n": 1, "positives": 1}
