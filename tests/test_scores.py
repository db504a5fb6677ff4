"""Scores are kept by what decides them: weights, base and data; never reused for another of these, never with text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from guards import tiny_guard_folder
from safetensors.numpy import load_file

from lora_guard import Conversation, Guard
from lora_guard.evaluation import scores
from lora_guard.evaluation.scores import score_set
from lora_guard.evaluation.sets import EvalSet, read_sets
from lora_guard.taxonomy import Taxonomy
from lora_guard.verdict import GuardLogits

ROWS = '{"prompt": "secret words", "unsafe": true}\n{"prompt": "b", "response": "c", "unsafe": false}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_guard_folder(tmp_path_factory.mktemp("guard"))


def read(path: Path, rows: str = ROWS) -> EvalSet:
    path.write_text(rows, "utf-8")
    (found,), _ = read_sets([str(path)], None, Taxonomy("tiny", ("a", "b")))
    return found


def test_scores_and_thresholds_are_those_of_moderate(folder: Path, tmp_path: Path) -> None:
    guard, data = Guard.load(folder), read(tmp_path / "mine.jsonl")
    scored, rate = score_set(guard, data, tmp_path / "scores")
    assert rate is not None
    for row, verdict in enumerate(guard.moderate([example.conversation() for example in data.examples])):
        decisions = [verdict, *verdict.categories.values()]
        assert scored.scores[row] == pytest.approx([decision.score for decision in decisions])
        assert scored.thresholds[row].tolist() == [decision.threshold for decision in decisions]
        assert all(flagged[row] == verdict.flagged for flagged in list(scored.flagged.values())[:1])
    assert scored.uncalibrated == pytest.approx(1 / (1 + np.exp(-scored.logits)))
    assert scored.labels[:, 0].tolist() == [1, 0]


def test_what_is_kept_is_used_again_and_holds_no_text(folder: Path, tmp_path: Path) -> None:
    guard, data = Guard.load(folder), read(tmp_path / "mine.jsonl")
    first, _ = score_set(guard, data, tmp_path / "scores")
    again, rate = score_set(guard, data, tmp_path / "scores")
    assert rate is None
    assert np.array_equal(first.logits, again.logits)
    (kept,) = (tmp_path / "scores").iterdir()
    assert b"secret" not in kept.read_bytes()
    assert set(load_file(kept)) == {"logits", "labels"}


def test_other_data_another_guard_and_another_base_are_scored_anew(folder: Path, tmp_path: Path) -> None:
    guard, data = Guard.load(folder), read(tmp_path / "mine.jsonl")
    score_set(guard, data, tmp_path / "scores")
    assert score_set(guard, read(tmp_path / "mine.jsonl", ROWS + ROWS), tmp_path / "scores")[1] is not None
    score_set(guard, data, tmp_path / "scores")
    other_base = Guard(guard.spec, guard.engine, base_fingerprint="another")
    assert score_set(other_base, data, tmp_path / "scores")[1] is not None
    other = Guard(guard.spec.model_copy(update={"files": {"heads.safetensors": "changed"}}), guard.engine)
    assert score_set(other, data, tmp_path / "scores")[1] is not None


def test_a_new_calibration_or_name_needs_no_new_scores(folder: Path, tmp_path: Path) -> None:
    guard, data = Guard.load(folder), read(tmp_path / "mine.jsonl")
    score_set(guard, data, tmp_path / "scores")
    renamed = Guard(guard.spec.model_copy(update={"name": "new", "metrics": {"epoch": 2}}), guard.engine)
    assert score_set(renamed, data, tmp_path / "scores")[1] is None


@pytest.mark.parametrize("damage", [b"", b"no tensors", None])
def test_what_was_not_written_whole_is_scored_anew(folder: Path, tmp_path: Path, damage: bytes | None) -> None:
    guard, data = Guard.load(folder), read(tmp_path / "mine.jsonl")
    first, _ = score_set(guard, data, tmp_path / "scores")
    path = tmp_path / "scores" / "mine.safetensors"
    path.write_bytes(path.read_bytes()[:-9] if damage is None else damage)
    again, rate = score_set(guard, data, tmp_path / "scores")
    assert rate is not None
    assert np.array_equal(first.logits, again.logits)


def test_an_evaluation_killed_within_a_set_scores_no_row_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "_ROWS_KEPT_AT_ONCE", 2)
    guard, last = Guard.load(folder), '{"prompt": "last", "unsafe": true}\n'
    data = read(tmp_path / "mine.jsonl", ROWS + ROWS + last)
    whole, _ = score_set(guard, data, tmp_path / "whole")
    logits, kept_at = guard.logits, tmp_path / "scores"

    def killed_at_the_third_row(rows: Sequence[Conversation], **more: Any) -> list[GuardLogits]:
        if (kept_at / "mine.safetensors").exists():
            raise KeyboardInterrupt
        return logits(rows, **more)

    monkeypatch.setattr(guard, "logits", killed_at_the_third_row)
    with pytest.raises(KeyboardInterrupt):
        score_set(guard, data, kept_at)
    calls = Mock(side_effect=logits)
    monkeypatch.setattr(guard, "logits", calls)
    again, rate = score_set(guard, data, kept_at)
    assert sum(len(call.args[0]) for call in calls.call_args_list) == 3
    assert rate is not None
    assert again.logits == pytest.approx(whole.logits)
    assert score_set(guard, data, kept_at)[1] is None
