"""The Markdown says plainly whether a guard beats its controls."""

from typing import Any

import pytest

from lora_guard.evaluation.report import verdict_on_controls


def dataset(*outcomes: tuple[str, str]) -> dict[str, Any]:
    return {
        "controls": [
            {"title": f"control {number}", "comparison": {"auprc": auprc, "f1": f1}}
            for number, (auprc, f1) in enumerate(outcomes, 1)
        ]
    }


def test_a_guard_beats_its_controls_if_it_is_above_all_of_them() -> None:
    words, fails = verdict_on_controls(dataset(("above", "above"), ("above", "above")))
    both = "control 1 (AUPRC above, F1 above); control 2 (AUPRC above, F1 above)"
    assert words == f"The guard beats every control: {both}."
    assert not fails


@pytest.mark.parametrize("outcome", ["below", "not distinguishable"])
def test_one_metric_that_is_not_above_one_control_is_a_failure(outcome: str) -> None:
    words, fails = verdict_on_controls(dataset(("above", "above"), ("above", outcome)))
    assert words.startswith("The guard does not beat every control: ")
    assert f"control 2 (AUPRC above, F1 {outcome})" in words
    assert fails


def test_without_a_control_that_is_what_is_said() -> None:
    assert verdict_on_controls(dataset()) == ("No control was measured on this data.", False)
