"""Short runs on a tiny model: their configs and rows, what they wrote, and whether two ended alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_guard import TrainConfig

CATEGORIES = ["rude", "unfair"]


def config_maker(base: Path, folder: Path) -> Callable[..., TrainConfig]:
    """Makes configs of short runs on 26 rows in the folder; what is given replaces what they say."""
    (folder / "taxonomy.yaml").write_text(f"name: mine\ncategories: {CATEGORIES}\n", "utf-8")
    write_rows(folder / "rows.jsonl", 26)

    def make(**fields: Any) -> TrainConfig:
        values = {
            "base_model": str(base),
            "taxonomy": str(folder / "taxonomy.yaml"),
            "train": [{"path": str(folder / "rows.jsonl")}],
            "epochs": 2,
            "batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 0.01,
            "lora_dropout": 0.1,
            "max_length": 64,
            "state_every": 2,
            "validation_fraction": 0.3,
            "precision": "fp32",
        }
        if fields.get("adapter") == "none":
            del values["lora_dropout"]
        return TrainConfig.model_validate(values | fields)

    return make


def write_rows(path: Path, count: int) -> None:
    """Rows of different lengths; a third is partly annotated, a third is prompts only."""
    rows = []
    for n in range(count):
        row: dict[str, Any] = {"prompt": f"number {n} " + "x" * (n % 7), "unsafe": n % 2 == 0, "categories": {}}
        if n % 3:
            row["response"] = "y" * (n % 5)
        if n % 3 != 1:
            row["categories"] = {"rude": n % 4 == 0, "unfair": None if n % 2 else n % 6 == 0}
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The final parameters, in fp32 as the resume state has them."""
    (state,) = (run / "state").glob("step-*")
    return load_file(state / "parameters.safetensors")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def assert_same(one: Path, other: Path) -> None:
    """Two runs ended alike, to the bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    untimed = [[{**r, "tokens_per_second": 0} for r in records(run / "steps.jsonl")] for run in (one, other)]
    assert untimed[0] == untimed[1]
    assert records(one / "metrics.jsonl") == records(other / "metrics.jsonl")
    for name in ("adapter_model.safetensors", "heads.safetensors"):
        files_of_both = [run / "guard" / name for run in (one, other) if (run / "guard" / name).is_file()]
        assert len({path.read_bytes() for path in files_of_both}) == len(files_of_both) // 2
    assert (other / "guard" / "heads.safetensors").is_file()
