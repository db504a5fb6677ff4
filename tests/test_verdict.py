"""From logits to verdicts."""

import json
import math
from typing import Any

import pytest
from guards import plain_calibration
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_guard.errors import ConfigError, GuardError
from lora_guard.verdict import Calibration, Calibrator, GuardLogits, Policy, TargetCalibration, sigmoid


@given(st.floats(-1e4, 1e4))
def test_a_score_is_a_probability_and_rises_with_the_logit(logit: float) -> None:
    assert 0 <= sigmoid(logit) <= 1
    assert sigmoid(logit) + sigmoid(-logit) == pytest.approx(1)
    assert sigmoid(logit) <= sigmoid(logit + 1)


@given(st.floats(-1e4, 1e4))
def test_threshold_0_flags_everything_and_threshold_1_nothing(logit: float) -> None:
    calibrator = Calibrator(thresholds={"all": 0, "none": 1})
    assert calibrator.decide(logit, "all").flagged
    assert not calibrator.decide(logit, "none").flagged


def test_the_highest_logit_of_the_windows_counts() -> None:
    assert GuardLogits.highest([[1, 2, 3], [2, 1, 4]]) == GuardLogits(2, (2, 4), 2)


def test_temperature_bias_and_threshold_decide_and_a_score_at_the_threshold_is_flagged() -> None:
    decision = Calibrator(temperature=2, bias=0.5, thresholds={"p": sigmoid(1.5)}).decide(2.0, "p")
    assert decision.score == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert decision.flagged
    assert not Calibrator(thresholds={"p": 0.6}).decide(0.0, "p").flagged


def test_each_target_has_its_own_part() -> None:
    def part(harmful: float, category: float) -> TargetCalibration:
        first, second = (Calibrator(bias=bias, thresholds={"balanced": 0.5}) for bias in (harmful, category))
        return TargetCalibration(harmful=first, categories={"a": second})

    calibration = Calibration(
        default_policy="balanced",
        policies={"balanced": Policy(rule="best_f1")},
        prompt=part(1, -1),
        response=part(-1, 1),
    )
    prompt, response = (calibration.verdict(GuardLogits(0.0, (0.0,)), target) for target in ("prompt", "response"))  # type: ignore[arg-type]
    assert (prompt.flagged, prompt.categories["a"].flagged, prompt.target) == (True, False, "prompt")
    assert (response.flagged, response.categories["a"].flagged, response.target) == (False, True, "response")


def test_a_policy_changes_thresholds_and_flags_but_no_score() -> None:
    calibration = plain_calibration(["a"], 0.5, strict=0.1, permissive=0.9)
    logits = GuardLogits(-1.0, (1.0,))
    default, strict, permissive = (
        calibration.verdict(logits, "prompt", name) for name in (None, "strict", "permissive")
    )
    assert default == calibration.verdict(logits, "prompt", "balanced")
    assert (default.flagged, strict.flagged, permissive.flagged) == (False, True, False)
    assert [v.categories["a"].flagged for v in (default, strict, permissive)] == [True, True, False]
    assert (strict.threshold, permissive.threshold) == (0.1, 0.9)
    assert default.score == strict.score == permissive.score


def test_an_unknown_policy_is_refused_with_the_nearest_name() -> None:
    calibration = plain_calibration([], strict=0.1)
    with pytest.raises(ConfigError, match=r"policy 'strct' is unknown .* mean 'strict'\? allowed: balanced, strict"):
        calibration.verdict(GuardLogits(0.0, ()), "prompt", "strct")


def test_the_json_form_is_the_documented_one() -> None:
    calibration = plain_calibration(["a"])
    verdict = calibration.verdict(GuardLogits(1.0, (-1.0,)), "prompt")
    form = verdict.to_dict()
    assert form == {
        "flagged": True,
        "score": sigmoid(1.0),
        "threshold": 0.5,
        "target": "prompt",
        "categories": {"a": {"flagged": False, "score": sigmoid(-1.0), "threshold": 0.5}},
    }
    assert json.loads(json.dumps(form)) == form
    assert calibration.verdict(GuardLogits(1.0, (1.0,), 3), "prompt").to_dict()["windows"] == 3


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"bias": math.inf},
        {"thresholds": {"p": 1.5}},
        {"thresholds": {"p": math.nan}},
        {"rows": -1},
        {"other": 1},
    ],
)
def test_calibration_values_outside_their_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Calibrator(**{"thresholds": {"p": 0.5}, **values})


def test_the_higher_of_two_judgements_is_taken_head_by_head() -> None:
    raw, normalised = GuardLogits(1.0, (-1.0, 2.0), 3), GuardLogits(0.5, (4.0, 1.0))
    assert raw.or_higher(normalised) == GuardLogits(1.0, (4.0, 2.0), 3)


@pytest.mark.parametrize(
    ("rule", "value"), [("target_fpr", None), ("target_fpr", 2), ("best_f1", 0.5), ("target_recall", math.nan)]
)
def test_a_rate_needs_a_value_in_its_range_and_best_f1_none(rule: Any, value: float | None) -> None:
    with pytest.raises(ValidationError):
        Policy(rule=rule, value=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_no_finite_number_is_an_error_and_never_a_pass(value: float) -> None:
    calibration = plain_calibration(("a",))
    for logits in (GuardLogits(value, (0.0,)), GuardLogits(0.0, (value,))):
        with pytest.raises(GuardError, match="NaN or infinite"):
            calibration.verdict(logits, "prompt")
    with pytest.raises(GuardError, match="NaN or infinite"):
        GuardLogits.highest([[1.0, 0.0], [value, 0.0]])
