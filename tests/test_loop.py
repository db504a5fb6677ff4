"""A run: what it writes, that the base stays as it was, that a kill costs nothing."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same, records, weights, write_rows
from safetensors.torch import load_file

from lora_guard import Conversation, Guard, Taxonomy, TrainConfig, base_model, files
from lora_guard.data.sources import read_file
from lora_guard.errors import ArtifactError, ConfigError, DataError, ResourceError
from lora_guard.training import finish, loop
from lora_guard.training.loop import train
from lora_guard.training.rows import choose, prepare

PNG = b"\x89PNG\r\n\x1a\n"


def test_what_is_judged_after_an_epoch_is_what_a_guard_decides_on(
    make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    disguised, plain = "ba\u200bke br\u0435ad", "bake bread"
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": disguised, "unsafe": True}))
    held = [{"path": str(tmp_path / "held.jsonl")}]
    config = make_config(validation=held)
    base = base_model.load(config.base_model)
    renderer = base_model.renderer(base)
    rows = prepare(config, Taxonomy.load(config.taxonomy), renderer, renderer.end_of_turn)
    read = [renderer.judged(Conversation.of(text), "prompt", renderer.end_of_turn) for text in (disguised, plain)]
    assert rows.validation.windows == [[window for part in read for window in part.windows(config.max_length)]]


def test_the_loss_stands_on_softened_labels_where_the_run_asks_for_them(
    make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    losses = []
    for smoothing in (0.0, 0.9):
        out = tmp_path / str(smoothing)
        train(make_config(label_smoothing=smoothing), out)
        losses.append(records(out / "steps.jsonl")[-1]["harmful_loss"])
    assert losses[0] != losses[1]


def test_prompts_of_a_set_to_keep_out_are_not_trained_on_and_the_set_is_not_scored(
    make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    write_rows(tmp_path / "held.jsonl", 6)  # the first six prompts of the training rows
    out = tmp_path / "run"
    train(make_config(keep_out=[{"path": str(tmp_path / "held.jsonl")}]), out)
    assert json.loads((out / "splits.json").read_text("utf-8"))["counts"]["overlapping_dropped"] == 6
    assert {record.get("set") for record in records(out / "metrics.jsonl")} == {"train", "validation", None}


def test_a_run_writes_what_it_promises_and_its_guard_loads(
    make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    write_rows(tmp_path / "held.jsonl", 6)  # the first six prompts of the training rows
    config = make_config(test=[{"path": str(tmp_path / "held.jsonl")}])
    out = tmp_path / "run"
    assert train(config, out) == out / "guard"
    steps = records(out / "steps.jsonl")
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["epoch"] == 2
    metrics = records(out / "metrics.jsonl")
    assert [(r["epoch"], r.get("set")) for r in metrics if "set" in r] == [
        (epoch, name) for epoch in (1, 2) for name in ("train", "validation", "held")
    ]
    assert {"rude", "unfair"} >= set(metrics[0]["categories"])
    splits = json.loads((out / "splits.json").read_text("utf-8"))
    assert splits["counts"]["overlapping_dropped"] == 6
    assert sorted(splits["train"] + splits["validation"]) == list(range(splits["rows"]))
    taxonomy = Taxonomy.load(config.taxonomy)
    held_out = read_file(out / "validation.jsonl", taxonomy)
    assert {row.prompt for row in held_out}.isdisjoint(row.prompt for row in choose(config, taxonomy).train)
    assert len(held_out) == len(splits["validation"])
    assert set(json.loads((out / "parameters.json").read_text("utf-8"))) == {"base", "adapter", "heads"}
    assert TrainConfig.load(out / "config.yaml") == config
    for epoch in (1, 2):
        saved = load_file(out / "logits" / f"epoch-{epoch}.held.safetensors")
        assert saved["logits"].shape == saved["targets"].shape == (6, 3)
        assert Guard.load(out / "checkpoints" / f"epoch-{epoch}").spec.metrics["epoch"] == epoch
    for name in ("loss.png", "pr.png"):
        assert (out / name).read_bytes().startswith(PNG)
    assert 0 <= Guard.load(out).moderate(Conversation.of("hello")).score <= 1
    assert not [path for path in out.rglob("*") if path.suffix in (".pkl", ".bin", ".pt") or "events" in path.name]


def test_a_guard_of_harmfulness_alone_is_trained_on_rows_with_categories(
    make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = make_config(taxonomy="harmfulness", epochs=1)
    guard = Guard.load(train(config, tmp_path / "run"))
    verdict = guard.moderate(Conversation.of("hello"))
    assert 0 <= verdict.score <= 1
    assert not verdict.categories
    assert "no categories of harm" in (tmp_path / "run" / "guard" / "README.md").read_text("utf-8")
    assert all(record["category_loss"] == 0 for record in records(tmp_path / "run" / "steps.jsonl"))


@pytest.mark.parametrize("fields", [{}, {"adapter": "none"}, {"harmful_head": False}, {"head_bias": False}])
def test_training_changes_adapter_and_heads_and_never_the_base(
    make_config: Callable[..., TrainConfig], tmp_path: Path, run_base: Path, fields: dict[str, Any]
) -> None:
    before = hashlib.sha256((run_base / "model.safetensors").read_bytes()).hexdigest()
    run = {}

    def keep(trained: finish.Run) -> Path:
        run["model"] = trained.model
        return finish.finish_run(trained)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "finish_run", keep)
        train(make_config(epochs=1, **fields), tmp_path / "run")
    assert hashlib.sha256((run_base / "model.safetensors").read_bytes()).hexdigest() == before
    untouched = dict(base_model.load(str(run_base)).model.named_parameters())
    trained = {name.replace(".base_layer.", "."): p for name, p in run["model"].base.named_parameters()}
    assert all(torch.equal(parameter, trained[name]) for name, parameter in untouched.items())
    names = set(weights(tmp_path / "run"))
    assert ("heads.bias" in names) is (fields.get("head_bias", True))
    assert any("lora_B" in name for name in names) is (fields.get("adapter") != "none")
    assert all(weights(tmp_path / "run")[name].any() for name in names if "lora_B" in name)


class Killed(BaseException):
    """Stands for a kill: no handler of the program sees it."""


@pytest.mark.parametrize(
    ("augment", "adapter", "stop_at"),
    [(0.0, "none", 3), (0.7, "lora", 5), *((0.0, "lora", step) for step in (0, 1, 3, 4, 5, 8))],
)
def test_a_run_killed_at_any_step_resumes_to_the_same_weights(
    make_config: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    augment: float,
    adapter: str,
    stop_at: int,
) -> None:
    config = make_config(adapter=adapter, augment=augment)
    train(config, tmp_path / "whole")
    step = loop._step

    def killing(run: Any, batch: Any, number: int, *rest: Any) -> Any:
        if number == stop_at:
            raise Killed
        return step(run, batch, number, *rest)

    monkeypatch.setattr(loop, "_step", killing)
    with pytest.raises(Killed):
        train(config, tmp_path / "killed")
    monkeypatch.setattr(loop, "_step", step)
    train(config, tmp_path / "killed", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_augmentation_changes_training_rows_from_epoch_to_epoch_and_no_other_rows(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs: list[Any] = []
    trained: dict[int, Any] = {}
    step = loop._step

    def watched(run: Any, batch: Any, number: int, steps: int, epoch: int, rows: Any) -> Any:
        trained[epoch] = rows.ids
        runs[:] = [run]
        return step(run, batch, number, steps, epoch, rows)

    monkeypatch.setattr(loop, "_step", watched)
    train(make_config(), tmp_path / "plain")
    plain = runs.pop().rows
    assert trained == {0: plain.train.ids, 1: plain.train.ids}
    train(make_config(augment=0.5), tmp_path / "augmented")
    rows = runs.pop().rows
    assert rows.train.windows == plain.train.windows
    assert rows.validation.windows == plain.validation.windows
    for ids in trained.values():
        assert 0 < sum(one != other for one, other in zip(ids, plain.train.ids, strict=True)) < len(ids)
    assert trained[0] != trained[1]
    assert torch.equal(rows.in_epoch(0).labels.nan_to_num(9), plain.train.labels.nan_to_num(9))


@pytest.mark.parametrize("function", ["loss_curves", "pr_curves", "model_card"])
def test_a_run_killed_within_an_evaluation_does_it_again(
    make_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    config = make_config()
    train(config, tmp_path / "whole")

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(finish, function, kill)
        with pytest.raises(Killed):
            train(config, tmp_path / "killed")
    train(config, tmp_path / "killed", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_a_tracker_that_is_not_installed_is_refused(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="log_with names 'nothing_like_it', unknown or not installed"):
        train(make_config(log_with=["nothing_like_it"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_another_config_and_other_rows_are_refused(
    make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config, out = make_config(epochs=1), tmp_path / "run"
    train(config, out)
    with pytest.raises(ConfigError, match="is not empty"):
        train(config, out)
    with pytest.raises(ConfigError, match="begun with another 'learning_rate'"):
        train(make_config(epochs=1, learning_rate=0.5), out, resume=True)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    write_rows(tmp_path / "rows.jsonl", 20)
    with pytest.raises(ArtifactError, match="written for other training rows"):
        train(config, out, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_corrupted_state_is_refused(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config, out = make_config(epochs=1), tmp_path / "run"
    train(config, out)
    (state,) = (out / "state").glob("step-*")
    (state / "optimizer.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="cannot be resumed from"):
        train(config, out, resume=True)


def test_a_full_disk_is_one_line_and_what_was_written_stays(
    make_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = make_config(), tmp_path / "run"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def fill(run: Any, batch: Any, number: int, *rest: Any) -> Any:
        if number == 3:
            monkeypatch.setattr(files.os, "fsync", full)
        return step(run, batch, number, *rest)

    step = loop._step
    monkeypatch.setattr(loop, "_step", fill)
    with pytest.raises(ResourceError, match="no space left on the disk"):
        train(config, out)
    monkeypatch.undo()
    train(config, out, resume=True)
    train(config, tmp_path / "whole")
    assert_same(tmp_path / "whole", out)


def test_no_memory_for_a_pass_is_one_line(
    make_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(loop.GuardModel, "forward", fail)
    with pytest.raises(ResourceError, match=r"no memory for a training pass over 2 rows; lower micro_batch_size 2"):
        train(make_config(), tmp_path / "run")


def test_a_mistake_found_before_the_first_step_leaves_the_folder_free(
    make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        train(make_config(train=[{"path": str(tmp_path / "typo.jsonl")}]), tmp_path / "run")
    train(make_config(epochs=1), tmp_path / "run")


def test_nothing_left_to_train_on_is_one_line(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    rows = str(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="no training row is left"):
        train(make_config(validation=[{"path": rows}]), tmp_path / "run")


def test_the_learning_rate_warms_up_and_decays(make_config: Callable[..., TrainConfig]) -> None:
    config = make_config(warmup_fraction=0.1)
    rates = [loop._schedule(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001
    assert loop._schedule(make_config(schedule="constant"), 99, 100) == 1
