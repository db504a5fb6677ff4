"""Controls are matched by the data's hash, published figures by its name; a guard is above what it clearly beats."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_guard.errors import DataError
from lora_guard.evaluation.metrics import METRICS, Interval
from lora_guard.evaluation.references import (
    Control,
    ControlFigures,
    compare,
    control_from_results,
    measured,
    published,
    shipped_controls,
)


def interval(low: float, high: float) -> Interval:
    return {"value": (low + high) / 2, "low": low, "high": high}


def control(low: float, high: float) -> Control:
    figures = ControlFigures(name="mine", n=9, harmfulness={name: interval(low, high) for name in METRICS})
    return Control(title="simple", config="c.yaml", command="train", commit="abc", parameters=5, sets={"hash": figures})


bounds = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@given(bounds, bounds)
def test_above_and_below_are_mirrored_and_need_intervals_that_do_not_touch(a: list[float], b: list[float]) -> None:
    ours, theirs = interval(*a), interval(*b)
    mirrored = {"above": "below", "below": "above", "not distinguishable": "not distinguishable"}
    assert mirrored[compare(ours, theirs)] == compare(theirs, ours)
    assert (compare(ours, theirs) == "above") == (min(a) > max(b))


def test_without_an_interval_nothing_is_claimed() -> None:
    assert compare({"value": 1.0, "low": None, "high": None}, interval(0, 0.1)) == "not distinguishable"


def test_a_control_stands_beside_the_data_it_was_measured_on_and_no_other() -> None:
    ours = {name: interval(0.8, 0.9) for name in METRICS}
    (entry,) = measured([control(0.1, 0.2)], "hash", ours)
    assert entry["title"] == "simple"
    assert entry["comparison"] == {"auprc": "above", "f1": "above"}
    assert measured([control(0.1, 0.2)], "other", ours) == []
    (entry,) = measured([control(0.85, 0.95)], "hash", ours)
    assert entry["comparison"] == {"auprc": "not distinguishable", "f1": "not distinguishable"}


def test_results_of_another_guard_become_a_control(tmp_path: Path) -> None:
    results = {
        "datasets": {
            "mine": {"n": 3, "harmfulness": {"n": 3, **{name: interval(0, 1) for name in METRICS}}},
            "unlabelled": {"n": 3, "harmfulness": {}},
        },
        "provenance": {
            "guard": "other",
            "command": "lora-guard eval",
            "commit": None,
            "lora-guard": "1",
            "parameters": 7,
            "data": {"mine": {"sha256": "hash"}, "unlabelled": {"sha256": "more"}},
        },
    }
    (tmp_path / "results.json").write_text(json.dumps(results), "utf-8")
    found = control_from_results(tmp_path)
    title = f"other ({tmp_path})"
    assert (found.title, found.parameters, found.commit, set(found.sets)) == (title, 7, "lora-guard 1", {"hash"})


def test_results_of_a_guard_in_llama_cpp_become_a_control_without_a_size(tmp_path: Path) -> None:
    figures = {"n": 3, **{name: interval(0, 1) for name in METRICS}}
    known = {"guard": "other", "command": "c", "commit": "d", "data": {"mine": {"sha256": "h"}}}
    provenance = {**known, "parameters": None}
    results = {"datasets": {"mine": {"n": 3, "harmfulness": figures}}, "provenance": provenance}
    (tmp_path / "results.json").write_text(json.dumps(results), "utf-8")
    assert control_from_results(tmp_path).parameters is None


def test_a_guard_without_controls_of_its_own_is_shown_others_that_say_whose_they_are() -> None:
    own = {control.title for control in shipped_controls("smollm2-135m-alora")}
    assert own == {"TF-IDF and logistic regression", "heads alone", "the paper's procedure"}
    assert {f"{title}, of smollm2-135m-alora" for title in own} <= {c.title for c in shipped_controls("mine")}
    commercial = [control.title for control in shipped_controls("smollm2-135m-commercial")]
    assert set(commercial[:2]) == {"the paper's procedure", "TF-IDF and logistic regression"}
    assert commercial[2:] == ["heads alone, of smollm2-135m-alora"]


@pytest.mark.parametrize("content", [None, "", "[]", '{"datasets": {}}', '{"datasets": {"a": 1}, "provenance": {}}'])
def test_a_folder_without_results_is_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content, "utf-8")
    with pytest.raises(DataError, match=r"results\.json (cannot be read|does not have the form)"):
        control_from_results(tmp_path)


def test_published_figures_are_found_by_the_sets_name() -> None:
    figures = {(figure.system, figure.metric): figure.value for figure in published("beavertails_30k_test")}
    assert figures["WildGuard 7B", "f1"] == 0.844
    assert published("mine") == []


def test_shipped_controls_name_what_reproduces_them() -> None:
    assert [control.title for control in shipped_controls("smollm2-135m-alora")]
    for shipped in shipped_controls("smollm2-135m-alora"):
        assert shipped.config.startswith("configs/")
        assert "DATA" in shipped.command
        assert len(shipped.commit) >= 40
