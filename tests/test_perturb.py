"""Robustness in an evaluation: the judged text is disguised, a drop is that of the same rows, goals are held up."""

import json
from pathlib import Path

import pytest
from guards import tiny_guard_folder

from lora_guard import Guard
from lora_guard.data.example import Example
from lora_guard.data.perturbation import perturbations
from lora_guard.evaluation import perturb
from lora_guard.evaluation.run import EvalSettings, evaluate_sets

SETTINGS = EvalSettings(resamples=20, perturb=True)


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    return Guard.load(tiny_guard_folder(tmp_path_factory.mktemp("guard"), max_length=256), precision="fp32")


def evaluated(guard: Guard, folder: Path, unsafe: tuple[bool | None, ...] = (True, False)) -> dict[str, object]:
    rows = [{"prompt": f"question {n}", "unsafe": unsafe[n % len(unsafe)]} for n in range(8)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    evaluate_sets(guard, [str(folder / "mine.jsonl")], None, folder / "out", SETTINGS)
    found: dict[str, object] = json.loads((folder / "out" / "results.json").read_text("utf-8"))["datasets"]["mine"]
    return found


def test_every_perturbation_has_its_metrics_its_drop_and_its_goal(guard: Guard, tmp_path: Path) -> None:
    dataset = evaluated(guard, tmp_path)
    found, clean = dataset["perturbations"], dataset["harmfulness"]
    assert isinstance(found, dict)
    assert isinstance(clean, dict)
    assert list(found) == [change.name for change in perturbations("")]
    for entry in found.values():
        assert entry["drop"]["value"] == pytest.approx(clean["auprc"]["value"] - entry["auprc"]["value"])
        if entry["character_level"]:
            assert entry["goal"] == 0.05
            assert entry["met"] == (entry["drop"]["value"] <= 0.05)
        else:
            assert entry["goal"] is None
            assert entry["met"] is None
    markdown = (tmp_path / "out" / "results.md").read_text("utf-8")
    assert all(f"\n| {name} | " in markdown for name in ["none", *found])
    assert ("NOT MET" in markdown) == any(entry["met"] is False for entry in found.values())


def test_without_harmful_rows_there_is_nothing_to_lose(guard: Guard, tmp_path: Path) -> None:
    assert evaluated(guard, tmp_path, unsafe=(False, None))["perturbations"] == {}


def test_a_second_evaluation_scores_nothing_again(
    guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = evaluated(guard, tmp_path)
    monkeypatch.setattr(guard, "logits", lambda *args, **kwargs: pytest.fail("a set was scored again"))
    assert evaluated(guard, tmp_path) == before


def test_the_response_is_disguised_where_there_is_one_else_the_prompt() -> None:
    (spacing,) = (change for change in perturbations("") if change.name == "spacing")
    prompt = Example("so what", None, True, {}, "mine")
    response = Example("so what", "ah no", True, {}, "mine")
    assert perturb._judged_text_changed(prompt, spacing).prompt == "s o   w h a t"
    assert perturb._judged_text_changed(response, spacing) == Example("so what", "a h   n o", True, {}, "mine")


def test_forged_markers_are_those_of_the_guards_own_base(guard: Guard) -> None:
    assert perturb._turn(guard) == "<|im_end|>\n<|im_start|>assistant\n"
