"""The resume state: adapter, heads and optimizer moments, as safetensors and JSON, replaced in one step.

Nothing else is needed to continue: batches, learning rate and dropout are functions of the seed and the step.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch.optim import Optimizer

from lora_guard import files
from lora_guard.errors import ArtifactError
from lora_guard.sharding import as_held, whole


def save_state(
    run: Path,
    step: int,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: Optimizer,
    rows_hash: str,
    *,
    main: bool = True,
) -> None:
    """Write the state after ``step`` optimizer steps; the one before goes once this one is complete.

    Every process calls this, for it gathers sharded parameters; the ``main`` one writes.

    Raises:
        ResourceError: no disk space; the last state stays.
    """
    moments = {
        f"{name}.{key}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    contents = {"parameters": whole(parameters), "optimizer": whole(moments)}
    if not main:
        return
    states = run / "state"
    final = states / f"step-{step:08d}"
    with files.new_folder(final) as temporary:
        for name, tensors in contents.items():
            files.write_bytes(temporary / f"{name}.safetensors", save(tensors))
        files.write_json(temporary / "state.json", {"step": step, "rows": rows_hash})
    for other in states.iterdir():
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def load_state(run: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: Optimizer, rows_hash: str) -> int:
    """Put the last saved state into parameters and optimizer; the number of steps done, 0 without a state.

    Every process calls this; sharded parameters take their share.

    Raises:
        ArtifactError: the state is corrupted, of another model, or the run's rows have changed since.
    """
    complete = sorted((run / "state").glob("step-*"))
    if not complete:
        return 0
    folder = complete[-1]
    try:
        saved = json.loads((folder / "state.json").read_text("utf-8"))
        values = load_file(folder / "parameters.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(as_held(values[name], parameter))
                optimizer.state[parameter] = {
                    "step": moments[f"{name}.step"],
                    **{key: as_held(moments[f"{name}.{key}"], parameter) for key in ("exp_avg", "exp_avg_sq")},
                }
        step = int(saved["step"])
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{folder} cannot be resumed from: {error}; delete it to start anew") from error
    if saved["rows"] != rows_hash:
        raise ArtifactError(f"{folder} was written for other training rows; allowed: --resume with unchanged data")
    return step
