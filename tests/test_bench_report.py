"""Figures against goals, and the two forms of a report."""

import json

import pytest

from lora_guard.bench.report import Figure, Report, show

ORIGIN = {"guard": {"name": "tiny"}, "cpu": "a processor", "threads": 1}


def test_a_figure_is_the_median_with_its_extremes() -> None:
    assert Figure("x", [3.0, 1.0, 2.0], 2.5).to_dict() == {
        "value": 2.0,
        "low": 1.0,
        "high": 3.0,
        "goal": 2.5,
        "met": True,
    }


def test_goals_are_upper_or_lower_bounds_with_a_tolerance() -> None:
    assert not Figure("x", [1.02], 1.0).met
    assert Figure("x", [1.02], 1.0, tolerance=0.03).met
    assert Figure("x", [3.0], 3.0, "at least").met
    assert not Figure("x", [2.9], 3.0, "at least").met
    assert Figure("x", [2.9]).met is None


def test_what_was_not_measured_has_no_value_and_misses_its_goal() -> None:
    missing = {"value": None, "low": None, "high": None, "goal": 3.0, "met": False}
    assert Figure("x", [], 3.0, "at least").to_dict() == missing


def test_json_is_one_line_with_the_benchs_name_before_each_figure() -> None:
    report = Report("check", {"speedup": Figure("x", [16.0], 15.0, "at least")}, "float32", "rows", ["a\nb"])
    line = report.to_json({"seed": 0})
    assert "\n" not in line
    figure = {"value": 16.0, "low": 16.0, "high": 16.0, "goal": 15.0, "met": True}
    assert json.loads(line) == {"bench": "check", "figures": {"check.speedup": figure}, "provenance": {"seed": 0}}


def test_the_table_shows_goal_figure_spread_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {
        "ours": Figure("ours [a]", [1.0, 1.2, 1.1], 1.07, tolerance=0.01),
        "cached": Figure("cached", [], 3.0, "at least"),
        "paper": Figure("paper", [1.5]),
    }
    show(Report("dual-path", figures, "float32", "generated", ["cut"]), ORIGIN)
    shown = capsys.readouterr().out
    for words in ("dual-path.ours", "ours [a]", "≤ 1.07 ± 0.01", "1 – 1.2", "not measured", "no", "cut", "generated"):
        assert words in shown
