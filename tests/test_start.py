"""A run that begins with a guard: it has its weights and its shape, and refuses what does not fit them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_folder

from lora_guard import Conversation, Guard, TrainConfig
from lora_guard.errors import ArtifactError, ConfigError
from lora_guard.training import loop, start
from lora_guard.training.loop import train
from lora_guard.training.run import Run

Make = Callable[..., TrainConfig]
NO_LEARNING = {"learning_rate": 1e-12, "epochs": 1}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Configs on a tiny model that say only what a test gives."""
    folder = tmp_path_factory.mktemp("made")
    tiny_folder(folder / "base")
    rows = [{"prompt": f"number {n}", "unsafe": n % 2 == 0, "categories": {"rude": n % 4 == 0}} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for name, categories in {"two": ["rude", "unfair"], "other": ["cold", "rude"]}.items():
        (folder / f"{name}.yaml").write_text(f"name: {name}\ncategories: {categories}\n", "utf-8")

    def config(taxonomy: str = "two", **fields: Any) -> TrainConfig:
        values = {
            "taxonomy": str(folder / f"{taxonomy}.yaml"),
            "train": [{"path": str(folder / "rows.jsonl"), "licence": "MIT"}],
            "validation_fraction": 0.3,
            "precision": "fp32",
        }
        return TrainConfig.model_validate(values | fields)

    return config


@pytest.fixture(scope="module")
def first(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose guard differs from a fresh one in all that it decides."""
    out = tmp_path_factory.mktemp("first") / "run"
    base = tmp_path_factory.mktemp("base")
    tiny_folder(base)
    shape = {"adapter": "alora", "lora_r": 3, "lora_alpha": 5, "target_modules": ["v_proj", "o_proj"], "max_length": 64}
    train(make(base_model=str(base), learning_rate=0.05, epochs=2, **shape), out)
    return out


def logits(run: Path) -> torch.Tensor:
    found = Guard.load(run).logits([Conversation.of(text) for text in ("hello", "number 3", "rude")])
    return torch.tensor([[row.harmful, *row.categories] for row in found])


def test_a_run_that_learns_nothing_ends_with_the_guard_it_began_with(make: Make, first: Path, tmp_path: Path) -> None:
    train(make(start_from=str(first), **NO_LEARNING), tmp_path / "second")
    assert torch.allclose(logits(tmp_path / "second"), logits(first), atol=1e-5)
    fresh = make(**start._shape(start.artifact.read(first / "guard")), **NO_LEARNING)
    train(fresh, tmp_path / "fresh")
    assert not torch.allclose(logits(tmp_path / "fresh"), logits(first), atol=1e-2)


def test_what_the_guard_decides_need_not_be_said_and_is_written_down(make: Make, first: Path, tmp_path: Path) -> None:
    train(make(start_from=str(first), **NO_LEARNING), tmp_path / "second")
    before, after = (TrainConfig.load(run / "config.yaml") for run in (first, tmp_path / "second"))
    for name in ("base_model", "adapter", "lora_r", "lora_alpha", "lora_dropout", "layers", "max_length"):
        assert getattr(after, name) == getattr(before, name)
    assert set(after.target_modules) == set(before.target_modules)
    assert Guard.load(tmp_path / "second").spec.invocation == Guard.load(first).spec.invocation
    # The config it wrote says the same as the guard.
    train(TrainConfig.load(tmp_path / "second" / "config.yaml"), tmp_path / "again")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapter", "lora"),
        ("lora_r", 4),
        ("lora_alpha", 6),
        ("target_modules", ["v_proj"]),
        ("layers", [0]),
        ("invocation", "<|im_end|>"),
        ("head_bias", False),
        ("harmful_head", False),
    ],
)
def test_another_value_than_the_guards_is_refused_by_name(
    make: Make, first: Path, tmp_path: Path, field: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} is .*start_from .*; allowed: that, or no {field}$"):
        train(make(start_from=str(first), **{field: value}), tmp_path / "second")
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(("guard", "taxonomy"), [("default", "beavertails"), ("commercial", "harmfulness")])
def test_the_taxonomy_of_a_guard_that_ships_need_not_be_named(guard: str, taxonomy: str) -> None:
    config, _ = start.read(TrainConfig.model_validate({"start_from": guard, "train": [{"path": "rows.jsonl"}]}))
    assert config.taxonomy == taxonomy


def test_a_taxonomy_that_is_not_built_in_has_to_be_named(first: Path) -> None:
    config = TrainConfig.model_validate({"start_from": str(first), "train": [{"path": "rows.jsonl"}]})
    with pytest.raises(ConfigError, match=r"taxonomy of its own, 'two', and the config names none; allowed: "):
        start.read(config)


def test_the_revision_is_that_of_the_base_model_that_was_named(make: Make, first: Path, tmp_path: Path) -> None:
    shutil.copytree(first / "guard", tmp_path / "guard")
    spec = json.loads((tmp_path / "guard" / "guard.json").read_text("utf-8"))
    spec["base"]["revision"] = "abc"
    (tmp_path / "guard" / "guard.json").write_text(json.dumps(spec), "utf-8")
    start_from = str(tmp_path / "guard")
    assert start.read(make(start_from=start_from))[0].revision == "abc"
    assert start.read(make(start_from=start_from, base_model="mine"))[0].revision is None


def test_modules_may_be_named_in_any_order(make: Make, first: Path) -> None:
    config, _ = start.read(make(start_from=str(first), target_modules=["o_proj", "v_proj"]))
    assert config.lora_r == 3


def test_a_field_that_only_this_kind_of_adapter_has_needs_no_adapter_beside_it(make: Make, first: Path) -> None:
    config, _ = start.read(make(start_from=str(first), prefix_cache=0))
    assert (config.adapter, config.prefix_cache) == ("alora", 0)


def test_a_field_that_contradicts_the_guard_is_one_line(make: Make, first: Path) -> None:
    with pytest.raises(ConfigError, match=r"^config: activation_checkpointing would compute"):
        start.read(make(start_from=str(first), activation_checkpointing=True))


def test_categories_in_common_keep_their_heads_and_others_are_fresh(make: Make, first: Path, tmp_path: Path) -> None:
    train(make("other", start_from=str(first), **NO_LEARNING), tmp_path / "second")
    before, after = (load_file(run / "guard" / "heads.safetensors") for run in (first, tmp_path / "second"))
    for name in ("weight", "bias"):
        assert torch.allclose(after[name][[0, 2]], before[name][[0, 1]], atol=1e-6)  # harmfulness, rude
    assert not torch.allclose(after["weight"][1], before["weight"][2], atol=1e-2)


def test_weights_of_another_base_model_are_refused(make: Make, first: Path, tmp_path: Path) -> None:
    tiny_folder(tmp_path / "other", seed=1)
    with pytest.raises(ArtifactError, match=r"was trained on weights sha256:.*; allowed: the same$"):
        train(make(start_from=str(first), base_model=str(tmp_path / "other")), tmp_path / "second")


def test_a_guard_that_is_not_there_is_one_line(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not found"):
        train(make(start_from=str(tmp_path / "none")), tmp_path / "second")


def test_the_guard_names_its_start_and_what_that_one_was_trained_on(make: Make, first: Path, tmp_path: Path) -> None:
    train(make(start_from=str(first), **NO_LEARNING), tmp_path / "second")
    spec, before = (Guard.load(run).spec for run in (tmp_path / "second", first))
    assert spec.provenance["start_from"] == {"name": "run", "files": before.files}
    assert [part.name for part in spec.data] == ["rows", "rows (run, the start)"]
    card = (tmp_path / "second" / "guard" / "README.md").read_text("utf-8")
    assert "| rows (run, the start) | " in card
    assert "`start_from` there was the guard run whose files" in card
    assert "`start_from` there" not in (first / "guard" / "README.md").read_text("utf-8")


def test_a_resumed_run_goes_on_from_its_own_state_and_not_from_the_guard(
    make: Make, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(start_from=str(first), epochs=2, learning_rate=0.01, batch_size=4, micro_batch_size=4)
    train(config, tmp_path / "whole")
    finish = loop.finish_epoch

    def stop(run: Run, epoch: int) -> None:
        finish(run, epoch)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "finish_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped")
    monkeypatch.undo()
    train(config, tmp_path / "stopped", resume=True)
    heads = [(tmp_path / run / "guard" / "heads.safetensors").read_bytes() for run in ("whole", "stopped")]
    assert heads[0] == heads[1]
