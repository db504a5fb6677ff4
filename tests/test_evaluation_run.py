"""An evaluation writes what the command promises: results with intervals and provenance, tables, a report, a plot."""

import json
from pathlib import Path

import pytest
from guards import tiny_guard_folder

from lora_guard import Conversation, Guard
from lora_guard.errors import DataError
from lora_guard.evaluation.metrics import METRICS
from lora_guard.evaluation.plots import loss_curves
from lora_guard.evaluation.references import control_from_results
from lora_guard.evaluation.run import EvalSettings, evaluate_sets

QUICK = EvalSettings(resamples=20, command="lora-guard eval")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    return Guard.load(tiny_guard_folder(tmp_path_factory.mktemp("guard"), categories=("a", "b")))


def write_rows(path: Path) -> Path:
    rows = [
        {"prompt": f"question {n}", "response": "yes" * (n % 3), "unsafe": n % 2 == 0, "categories": {"a": n % 3 == 0}}
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_results_have_the_documented_form(guard: Guard, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "mine.jsonl")
    markdown, _ = evaluate_sets(guard, [str(data)], None, tmp_path / "out", QUICK)
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert set(results) == {"datasets", "provenance"}
    found = results["datasets"]["mine"]
    assert found["n"] == 12
    assert list(found["categories"]) == ["a"]
    for metrics in (found["harmfulness"], found["categories"]["a"]):
        assert set(metrics) == {"n", "positives", *METRICS, "ece_uncalibrated"}
        assert all(set(metrics[name]) == {"value", "low", "high"} for name in METRICS)
    parts = {"n", "harmfulness", "categories", "macro_auprc", "slices", "confusion", "controls", "published"}
    assert set(found) == parts
    assert found["macro_auprc"] == found["categories"]["a"]["auprc"]["value"]
    assert f"Mean AUPRC of the categories: {found['macro_auprc']:.3f}." in markdown
    for counts in found["confusion"].values():
        assert counts["true_positives"] + counts["false_negatives"] == 6
        assert sum(counts.values()) == 12
    assert results["provenance"]["command"] == "lora-guard eval"
    assert results["provenance"]["parameters"] == guard.parameters
    assert results["provenance"]["data"]["mine"]["file"] == "mine.jsonl"
    assert results["provenance"]["guard_files"] == guard.spec.files
    assert (tmp_path / "out" / "results.md").read_text("utf-8") == markdown
    assert "| **harmfulness** | 12 | 6 |" in markdown
    assert (tmp_path / "out" / "pr.png").read_bytes().startswith(PNG)


def test_metrics_are_those_at_the_saved_threshold(guard: Guard, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "mine.jsonl")
    evaluate_sets(guard, [str(data)], None, tmp_path / "out", QUICK)
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    verdicts = guard.moderate([Conversation.of(row["prompt"], row["response"]) for row in rows])
    agree = sum(verdict.flagged == row["unsafe"] for verdict, row in zip(verdicts, rows, strict=True))
    assert results["datasets"]["mine"]["harmfulness"]["accuracy"]["value"] == pytest.approx(agree / 12)


def test_a_bad_second_file_is_found_before_anything_is_scored(guard: Guard, tmp_path: Path) -> None:
    paths = [str(write_rows(tmp_path / "mine.jsonl")), str(tmp_path / "none.jsonl")]
    with pytest.raises(DataError, match="cannot be read"):
        evaluate_sets(guard, paths, None, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_a_stopped_evaluation_does_not_score_a_finished_set_again(
    guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first, second = (str(write_rows(tmp_path / f"{name}.jsonl")) for name in ("first", "second"))
    evaluate_sets(guard, [first], None, out, QUICK)
    before = json.loads((out / "results.json").read_text("utf-8"))["datasets"]["first"]
    scored = []
    logits = guard.logits
    monkeypatch.setattr(guard, "logits", lambda rows, **more: scored.append(len(rows)) or logits(rows, **more))
    evaluate_sets(guard, [first, second], None, out, QUICK)
    after = json.loads((out / "results.json").read_text("utf-8"))
    assert scored == [12]
    assert after["datasets"]["first"] == before
    assert after["provenance"]["rows_per_second"]["first"] is None
    assert after["provenance"]["rows_per_second"]["second"] > 0


def test_what_is_known_of_a_set_stands_beside_the_guard(guard: Guard, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "toxicchat_test.jsonl")  # published figures are found by the name
    evaluate_sets(guard, [str(data)], None, tmp_path / "other", QUICK)
    settings = EvalSettings(resamples=20, controls=[tmp_path / "other"])
    markdown, _ = evaluate_sets(guard, [str(data)], None, tmp_path / "out", settings)
    entry = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))["datasets"]["toxicchat_test"]
    (control,) = entry["controls"]
    assert control["title"] == control_from_results(tmp_path / "other").title == f"tiny ({tmp_path / 'other'})"
    assert control["comparison"] == {"auprc": "not distinguishable", "f1": "not distinguishable"}
    outcome = "(AUPRC not distinguishable, F1 not distinguishable)"
    assert f"does not beat every control: {control['title']} {outcome}" in markdown
    assert "| WildGuard 7B | published |" in markdown


def test_a_control_without_results_is_found_before_anything_is_scored(guard: Guard, tmp_path: Path) -> None:
    data, settings = write_rows(tmp_path / "mine.jsonl"), EvalSettings(controls=[tmp_path / "none"])
    with pytest.raises(DataError, match=r"none/results\.json cannot be read"):
        evaluate_sets(guard, [str(data)], None, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_loss_curves_are_drawn_from_the_first_step_on(tmp_path: Path) -> None:
    record = {"step": 1, "loss": 0.7, "harmful_loss": 0.7, "category_loss": 0.7, "learning_rate": 1e-3}
    loss_curves([record], tmp_path / "one.png")
    loss_curves([record | {"step": n} for n in range(1, 200)], tmp_path / "many.png")
    assert (tmp_path / "one.png").read_bytes().startswith(PNG)
    assert (tmp_path / "many.png").read_bytes().startswith(PNG)


def test_lone_surrogates_in_a_text_reach_the_report_replaced(guard: Guard, tmp_path: Path) -> None:
    data = tmp_path / "odd.jsonl"
    data.write_text('{"prompt": "\\ud800 a", "unsafe": true}\n{"prompt": "b", "unsafe": false}\n', "utf-8")
    evaluate_sets(guard, [str(data)], None, tmp_path / "out", QUICK)
    assert "\ufffd a" in (tmp_path / "out" / "report.html").read_text("utf-8")
