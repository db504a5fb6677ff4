"""From logits to verdicts."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_guard.verdict import Calibration, Calibrator, GuardLogits, sigmoid


@given(st.floats(-1e4, 1e4))
def test_a_score_is_a_probability_and_rises_with_the_logit(logit: float) -> None:
    assert 0 <= sigmoid(logit) <= 1
    assert sigmoid(logit) + sigmoid(-logit) == pytest.approx(1)
    assert sigmoid(logit) <= sigmoid(logit + 1)


def test_the_highest_logit_of_the_windows_counts() -> None:
    assert GuardLogits.highest([[1, 2, 3], [2, 1, 4]]) == GuardLogits(2, (2, 4), 2)


def test_temperature_and_threshold_decide_and_a_score_at_the_threshold_is_flagged() -> None:
    decision = Calibrator(temperature=2, threshold=sigmoid(1.0)).decide(2.0)
    assert decision.score == pytest.approx(1 / (1 + math.exp(-1)))
    assert decision.flagged
    assert not Calibrator(threshold=0.6).decide(0.0).flagged


def test_the_json_form_is_the_documented_one() -> None:
    calibration = Calibration(harmful=Calibrator(), categories={"a": Calibrator(threshold=0.9)})
    verdict = calibration.verdict(GuardLogits(1.0, (1.0,)), "prompt")
    form = verdict.to_dict()
    assert form == {
        "flagged": True,
        "score": sigmoid(1.0),
        "threshold": 0.5,
        "target": "prompt",
        "categories": {"a": {"flagged": False, "score": sigmoid(1.0), "threshold": 0.9}},
    }
    assert json.loads(json.dumps(form)) == form
    assert calibration.verdict(GuardLogits(1.0, (1.0,), 3), "prompt").to_dict()["windows"] == 3


@pytest.mark.parametrize("values", [{"temperature": 0}, {"threshold": 1.5}, {"threshold": math.nan}, {"other": 1}])
def test_calibration_values_outside_their_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Calibrator(**values)


def test_the_higher_of_two_judgements_is_taken_head_by_head() -> None:
    raw, normalised = GuardLogits(1.0, (-1.0, 2.0), 3), GuardLogits(0.5, (4.0, 1.0))
    assert raw.or_higher(normalised) == GuardLogits(1.0, (4.0, 2.0), 3)
