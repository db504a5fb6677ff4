"""The prefix cache: what it gives is what the base model computes, however a run before it ended, within its limit."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from guards import tiny_guard_folder
from safetensors.torch import load_file

from lora_guard import Guard, TrainConfig
from lora_guard.kv_cache import Prefix
from lora_guard.model import GuardModel
from lora_guard.training import loop, prefix_cache
from lora_guard.training.loop import train
from lora_guard.training.prefix_cache import PrefixCache

TEXTS = [[256, 1, 2, 3], [256, 1, 9], [256, 1, 4, 5, 6, 7, 8]]
ROW_BYTES = 2 * 2 * 2 * 8 * 2  # layers, keys and values, heads, width, bfloat16


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    return Guard.load(tiny_guard_folder(tmp_path_factory.mktemp("guard"), adapter_kind="alora"), precision="fp32")


Make = Callable[..., PrefixCache]


@pytest.fixture
def make(guard: Guard, tmp_path: Path) -> Make:
    engine: Any = guard.engine

    def open_cache(limit: int = 10**6, base: Any = engine.base, **options: Any) -> PrefixCache:
        settings = {"precision": "fp32", "root": tmp_path / "prefixes", **options}
        return PrefixCache(engine.model, base, TEXTS, limit=limit, **settings)

    return open_cache


class Held(NamedTuple):
    keys: torch.Tensor
    values: torch.Tensor


def rows(prefix: Prefix) -> list[list[Held]]:
    """A prefix without its padding."""
    lengths = prefix.positions.tolist()
    return [
        [Held(keys[row, :, :length], values[row, :, :length]) for keys, values in prefix.layers]
        for row, length in enumerate(lengths)
    ]


def assert_close(one: Prefix, other: Prefix, tolerance: float = 0.02) -> None:
    """Equal within bfloat16's rounding."""
    for first, second in zip(rows(one), rows(other), strict=True):
        for layer, reference in zip(first, second, strict=True):
            assert torch.allclose(layer.keys, reference.keys, atol=tolerance, rtol=1e-2)
            assert torch.allclose(layer.values, reference.values, atol=tolerance, rtol=1e-2)


def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: GuardModel, *_: Any, **__: Any) -> Prefix:
        raise AssertionError("a text was computed")

    monkeypatch.setattr(GuardModel, "read", refuse)


def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of texts of each pass from here on."""
    counts: list[int] = []
    original = GuardModel.read

    def count(self: GuardModel, input_ids: torch.Tensor, *rest: Any) -> Prefix:
        counts.append(len(input_ids))
        return original(self, input_ids, *rest)

    monkeypatch.setattr(GuardModel, "read", count)
    return counts


def test_stored_and_recomputed_are_the_same(make: Make) -> None:
    plain, stored = make(limit=0), make()
    first, second = stored.read(TEXTS), stored.read(TEXTS[::-1])
    assert_close(first, plain.read(TEXTS))
    assert_close(second, plain.read(TEXTS[::-1]))
    assert first.positions.tolist() == [4, 3, 7]


def test_a_later_run_computes_no_text_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make().read(TEXTS)
    again = make()
    nothing_computed(monkeypatch)
    assert again.rows == 3
    assert_close(again.read(TEXTS), expected, tolerance=0)


def test_what_the_texts_begin_with_is_not_stored_with_each(make: Make, tmp_path: Path) -> None:
    make().read(TEXTS)
    (data,) = (tmp_path / "prefixes").rglob("*.kv")
    own = sum(len(text) - 2 for text in TEXTS)
    assert data.stat().st_size == own * ROW_BYTES


@pytest.mark.parametrize("damage", ["torn index", "short data", "other bytes", "no data"])
def test_what_a_kill_or_a_disk_damaged_is_computed_anew(
    make: Make, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make().read(TEXTS)
    (data,) = (tmp_path / "prefixes").rglob("*.kv")
    (index,) = (tmp_path / "prefixes").rglob("*.jsonl")
    if damage == "torn index":
        index.write_text(index.read_text("utf-8")[:-9], "utf-8")
    elif damage == "short data":
        os.truncate(data, data.stat().st_size - 1)
    elif damage == "other bytes":
        data.write_bytes(data.read_bytes()[:-4] + b"\x7f\x7f\x7f\x7f")
    else:
        data.unlink()
    cache = make()
    counts = computed(monkeypatch)
    assert_close(cache.read(TEXTS), expected)
    assert sum(counts) == (3 if damage == "no data" else 1)


@pytest.mark.parametrize("change", ["base", "precision", "opening"])
def test_keys_and_values_of_another_model_precision_or_opening_are_never_used(
    make: Make, guard: Guard, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make().read(TEXTS)
    engine: Any = guard.engine
    if change == "base":
        other = make(base=replace(engine.base, fingerprint="sha256:other"))
    elif change == "precision":
        other = make(precision="bf16")
    else:
        monkeypatch.setattr(prefix_cache, "shared_start", lambda *_, **__: 1)
        other = make()
    assert other.rows == 0


def test_other_texts_behind_the_opening_are_read_and_not_kept(make: Make) -> None:
    cache = make(opening=1)
    others = [[256, 7], [256, 1, 2, 3, 3]]  # the first shares less than all the texts that are kept
    for _ in range(2):
        assert_close(cache.read([*TEXTS, *others]), make(limit=0, opening=1).read([*TEXTS, *others]))
    assert cache.rows == len(TEXTS)


def test_the_limit_holds_and_what_does_not_fit_is_computed(make: Make, tmp_path: Path) -> None:
    limit = 4 * ROW_BYTES
    cache = make(limit=limit)
    for _ in range(2):
        assert_close(cache.read(TEXTS), make(limit=0).read(TEXTS))
    assert 0 < cache.rows < 3
    assert sum(path.stat().st_size for path in (tmp_path / "prefixes").rglob("*.kv")) <= limit


def test_only_what_will_be_read_again_is_stored(make: Make) -> None:
    cache = make(repeated=TEXTS[1:])
    once = cache.read(TEXTS)
    assert cache.rows == 2
    assert_close(cache.read(TEXTS), once)


def test_a_full_disk_is_not_filled(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage("/")._replace(free=prefix_cache._FREE_BYTES_LEFT)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    cache = make()
    assert_close(cache.read(TEXTS), make(limit=0).read(TEXTS))
    assert cache.rows == 0


def test_an_old_cache_makes_room_unless_a_run_uses_it(make: Make, guard: Guard, tmp_path: Path) -> None:
    engine: Any = guard.engine
    needed = sum(len(text) - 2 for text in TEXTS) * ROW_BYTES
    old = make(base=replace(engine.base, fingerprint="sha256:old"))
    old.read(TEXTS)
    beside = make(limit=needed)
    beside.read(TEXTS)
    assert beside.rows == 0  # the old one is in use and fills the limit
    del old, beside
    alone = make(limit=needed)
    alone.read(TEXTS)
    assert alone.rows == 3
    assert len(list((tmp_path / "prefixes").rglob("*.kv"))) == 1


def test_processes_of_a_run_see_what_the_others_wrote(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = make(writers=2), make(writers=2)
    one.read(TEXTS)
    other.refresh()
    nothing_computed(monkeypatch)
    other.read(TEXTS)


def config(guard: Guard, folder: Path, **fields: Any) -> TrainConfig:
    (folder / "mine.yaml").write_text("name: mine\ncategories: [rude, unfair]\n", "utf-8")
    labelled = [{"prompt": f"number {n} " + "x" * (n % 7), "unsafe": n % 2 == 0} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled), "utf-8")
    values = {
        "base_model": guard.spec.base.name,
        "adapter": "alora",
        "taxonomy": str(folder / "mine.yaml"),
        "train": [{"path": str(folder / "rows.jsonl")}],
        "epochs": 2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "lora_dropout": 0.1,
        "state_every": 2,
        "validation_fraction": 0.3,
        "precision": "fp32",
    }
    return TrainConfig.model_validate(values | fields)


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    (state,) = (run / "state").glob("step-*")
    return load_file(state / "parameters.safetensors")


def test_stored_keys_and_values_train_the_weights_of_recomputed_ones(
    guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_GUARD_CACHE", str(tmp_path / "cache"))
    train(config(guard, tmp_path, prefix_cache=0), tmp_path / "recomputed")
    train(config(guard, tmp_path), tmp_path / "stored")
    assert list((tmp_path / "cache" / "prefixes").rglob("*.kv"))
    one, other = final_weights(tmp_path / "recomputed"), final_weights(tmp_path / "stored")
    for name, value in one.items():
        assert torch.allclose(other[name], value, atol=2e-3), name  # of bfloat16 keys and values, after eight steps


@pytest.mark.parametrize("augment", [0.5, 1.0])
def test_augmented_rows_are_not_served_what_was_stored_of_others(
    guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: float
) -> None:
    monkeypatch.setenv("LORA_GUARD_CACHE", str(tmp_path / "cache"))
    train(config(guard, tmp_path, augment=augment, prefix_cache=0), tmp_path / "recomputed")
    train(config(guard, tmp_path, augment=augment), tmp_path / "stored")
    one, other = final_weights(tmp_path / "recomputed"), final_weights(tmp_path / "stored")
    for name, value in one.items():
        assert torch.allclose(other[name], value, atol=2e-3), name


def test_a_killed_run_leaves_a_usable_cache_and_resumes_to_the_same_weights(
    guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_GUARD_CACHE", str(tmp_path / "cache"))
    train(config(guard, tmp_path), tmp_path / "whole")
    shutil.rmtree(tmp_path / "cache")
    child = os.fork()
    if child == 0:
        original = loop._step

        def killing(run: Any, batch: Any, step: int, *rest: Any) -> Any:
            if step == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(run, batch, step, *rest)

        loop._step = killing
        train(config(guard, tmp_path), tmp_path / "killed")
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    counts = computed(monkeypatch)
    train(config(guard, tmp_path), tmp_path / "killed", resume=True)
    trained = [count for count in counts if count <= 2]  # passes of training; those of evaluation are larger
    assert len(trained) <= 6
    one, other = final_weights(tmp_path / "whole"), final_weights(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)
