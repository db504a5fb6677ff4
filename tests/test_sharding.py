"""Parameters in shards: a run trains, saves, resumes and evaluates as one process with whole parameters does."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from tiny import tiny_folder
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from transformers import AutoModelForCausalLM

from lora_guard import Conversation, Guard, TrainConfig
from lora_guard.errors import ConfigError
from lora_guard.sharding import as_held, whole
from lora_guard.training import loop

TRAINED = ["lora, saving", "alora", "lora on bf16"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each training the folder; the sharded runs of all come from one start of two processes."""
    folders = {what: tmp_path_factory.mktemp("runs") for what in TRAINED}
    for what, folder in folders.items():
        prepare(what, folder)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launch, str(Path(__file__).with_name("sharded_run.py")), *map(str, folders.values())],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "LORA_GUARD_CACHE": str(tmp_path_factory.mktemp("cache"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return folders


@pytest.fixture(params=TRAINED)
def folder(folders: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    """The runs ``one`` (this process), ``sharded``, ``killed`` and resumed, and ``killed-alone``, not resumed yet.

    Where memory is saved, by activation checkpointing, ``one`` does without.
    """
    return folders[request.param]


def prepare(what: str, folder: Path) -> None:
    """Model, rows and config of a training, and the run ``one``."""
    trained, _, dtype = what.partition(" on ")
    adapter, saves, _ = trained.partition(", saving")
    base = tiny_folder(folder / "base")
    if dtype:
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    (folder / "taxonomy.yaml").write_text("name: mine\ncategories: [rude, unfair]\n", "utf-8")
    for name, count in {"rows": 25, "held": 3, "single": 1}.items():  # no set has as many rows as the next
        rows = [
            {"prompt": f"{name} {n} " + "x" * (5 * n), "unsafe": n % 2 == 0, "categories": {"rude": n % 3 == 0}}
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = TrainConfig.model_validate(
        {
            "base_model": str(folder / "base"),
            "taxonomy": str(folder / "taxonomy.yaml"),
            "train": [{"path": str(folder / "rows.jsonl")}],
            "test": [{"path": str(folder / f"{name}.jsonl")} for name in ("held", "single")],
            "adapter": adapter,
            "activation_checkpointing": bool(saves),
            "epochs": 2,
            "batch_size": 4,
            "micro_batch_size": 1,
            "learning_rate": 0.01,
            "lora_dropout": 0.0,
            "state_every": 2,
            "validation_fraction": 0.3,
            "max_length": 128,
            "precision": "fp32",
            **({"prefix_cache": 0} if adapter == "alora" else {}),  # sharded runs have none, and it rounds to bf16
        }
    )
    (folder / "config.yaml").write_text(config.to_yaml(), "utf-8")
    plain = config.model_copy(update={"activation_checkpointing": False})
    loop.train(plain, folder / "one", prefixes=folder / "cache" / "prefixes")


def state(run: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a run's last state."""
    (last,) = (run / "state").glob("step-*")
    return load_file(last / f"{name}.safetensors")


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=2e-5), name


def test_shards_train_the_weights_of_whole_parameters(folder: Path) -> None:
    assert_close(state(folder / "one", "parameters"), state(folder / "sharded", "parameters"))
    assert_close(state(folder / "one", "optimizer"), state(folder / "sharded", "optimizer"))  # moments of the gradients
    steps = [
        [json.loads(line) for line in (folder / run / "steps.jsonl").read_text("utf-8").splitlines()]
        for run in ("one", "sharded")
    ]
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in steps[1]] == pytest.approx([step[key] for step in steps[0]], rel=1e-3)


def test_the_frozen_base_keeps_its_dtype_and_adapters_train_in_fp32(folder: Path) -> None:
    stored = json.loads((folder / "base" / "config.json").read_text("utf-8"))["dtype"]
    for rank in range(2):
        dtypes = json.loads((folder / f"dtypes-{rank}.json").read_text("utf-8"))
        assert dtypes == [[False, f"torch.{stored}"], [True, "torch.float32"]]


def test_every_set_is_evaluated_however_few_rows_it_has(folder: Path) -> None:
    for name, rows in {"held": 3, "single": 1, "validation": 8}.items():
        logits = [load_file(folder / run / "logits" / f"epoch-2.{name}.safetensors") for run in ("one", "sharded")]
        assert len(logits[1]["logits"]) == rows
        assert torch.allclose(logits[0]["logits"], logits[1]["logits"], atol=1e-4)


def test_the_guard_of_a_sharded_run_is_whole_and_loads(folder: Path) -> None:
    guards = [Guard.load(folder / run) for run in ("one", "sharded")]
    scores = [guard.moderate(Conversation.of("How do I bake bread?")).score for guard in guards]
    assert scores[1] == pytest.approx(scores[0], abs=0.01)  # adapters are saved in bf16
    sizes = [(folder / run / "guard" / "adapter_model.safetensors").stat().st_size for run in ("one", "sharded")]
    assert sizes[0] == sizes[1]


def test_a_killed_sharded_run_resumes_to_the_same_weights(folder: Path) -> None:
    for name in ("parameters", "optimizer"):
        whole_run, resumed = state(folder / "sharded", name), state(folder / "killed", name)
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole_run.items())


def test_one_process_resumes_what_shards_began(folder: Path) -> None:
    assert json.loads(next((folder / "killed-alone" / "state").glob("*/state.json")).read_text("utf-8"))["step"] == 2
    cache = folder / "cache" / "prefixes"
    loop.train(TrainConfig.load(folder / "config.yaml"), folder / "killed-alone", resume=True, prefixes=cache)
    assert_close(state(folder / "one", "parameters"), state(folder / "killed-alone", "parameters"))


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (DistributedType.DEEPSPEED, {}, "DEEPSPEED"),
        (DistributedType.FSDP, {"fsdp_version": 1}, "FSDP version 1"),
        (DistributedType.FSDP, {"fsdp_version": 2, "activation_checkpointing": True}, "activation checkpointing"),
        (DistributedType.FSDP, {"fsdp_version": 2, "cpu_offload": True}, "parameters on the CPU"),
    ],
)
def test_a_sharding_that_no_guard_could_be_saved_from_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: DistributedType, options: Any, named: str
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # set by accelerate otherwise, for all later tests
    plugin = FullyShardedDataParallelPlugin(**options)
    configured = SimpleNamespace(
        distributed_type=kind, is_fsdp2=plugin.fsdp_version == 2, state=SimpleNamespace(fsdp_plugin=plugin)
    )
    monkeypatch.setattr(loop, "Accelerator", lambda **_: configured)
    with pytest.raises(ConfigError, match=f"configured for .*{named}; allowed: "):
        loop.train(TrainConfig.load(folder / "config.yaml"), tmp_path / "run")


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[torch.nn.Parameter]:
    """A parameter ``[3, 2]`` in the shards of a single process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield torch.nn.Parameter(distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [Shard(0)]))
    finally:
        torch.distributed.destroy_process_group()


def test_a_sharded_parameter_takes_a_whole_value_and_gives_it_back(sharded: torch.nn.Parameter) -> None:
    value = torch.arange(6.0).view(3, 2) + 0.5
    held = as_held(value, sharded)
    assert isinstance(held, DTensor)
    assert held.placements == sharded.placements
    assert type(whole({"a": held})["a"]) is Tensor
    assert torch.equal(whole({"a": held})["a"], value)
    assert whole({"a": held}, torch.bfloat16)["a"].dtype == torch.bfloat16


def test_a_value_of_another_shape_is_refused(sharded: torch.nn.Parameter) -> None:
    for parameter in (sharded, torch.nn.Parameter(torch.zeros(3, 2))):
        with pytest.raises(ValueError, match=r"shape \[1, 2\] where the model has \[3, 2\]"):
            as_held(torch.zeros(1, 2), parameter)
