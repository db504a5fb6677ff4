"""Averages guards that were trained on from the same weights: one guard that is often better than each of them.

    python examples/average_guards.py RUN1/guard RUN2/guard --out GUARD
    lora-guard calibrate --guard GUARD --data RUN1/validation.jsonl --out GUARD

Guards that a training led away from one start lie near each other, and the mean of their weights keeps what they have
in common and loses some of what each has learned wrongly (model soups, arXiv 2203.05482; with the start itself among
them, arXiv 2109.01903). Adapter and heads are averaged tensor by tensor. Name and settings are the first guard's, a
source that several were trained on has the rows of the one with most. A token head and the old calibration do not fit
the new weights: calibrate them anew, as above.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_guard import artifact
from lora_guard.artifact import Artifact, DataReference, GuardSpec
from lora_guard.errors import LoraGuardError
from lora_guard.guard import find
from lora_guard.training.card import model_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("guards", nargs="+", help="default, commercial, a folder or a hub id; twice counts twice")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the new guard")
    arguments = parser.parse_args()
    try:
        artifact.check_out(arguments.out, "peft")
        average([artifact.read(find(guard)) for guard in arguments.guards], arguments.out)
    except LoraGuardError as error:
        raise SystemExit(f"error: {error}") from error


def average(guards: Sequence[Artifact], out: Path) -> None:
    """Write the guard of the mean weights."""
    first = guards[0]
    for other in guards[1:]:
        if other.spec.base.fingerprint != first.spec.base.fingerprint:
            raise SystemExit(f"error: {other.folder} is for another base model than {first.folder}")
        for field in ("adapter", "taxonomy", "invocation", "max_length", "heads"):
            if getattr(other.spec, field) != getattr(first.spec, field):
                raise SystemExit(f"error: {other.folder} has another {field} than {first.folder}")
    parts = [{"name": guard.spec.name, "files": guard.spec.files} for guard in guards]
    spec = first.spec.model_copy(
        update={
            "data": sources([guard.spec for guard in guards]),
            "token_head": False,
            "metrics": {},
            "provenance": first.spec.provenance | {"average_of": parts},
        }
    )
    licence = first.folder / artifact.LICENCE_FILE
    config = first.folder / artifact.CONFIG_FILE
    artifact.write(
        out,
        spec,
        adapter_config=json.loads(config.read_text("utf-8")) if config.is_file() else None,
        tensors=mean([guard.adapter for guard in guards]),
        heads=mean([guard.heads for guard in guards]),
        card=model_card(spec),
        licence=licence.read_text("utf-8") if licence.is_file() else None,
    )


def sources(specs: Sequence[GuardSpec]) -> list[DataReference]:
    """What any of the guards was trained on; a start that is among them speaks for itself."""
    starts = [spec.provenance["start_from"]["files"] for spec in specs if "start_from" in spec.provenance]
    named_twice = tuple(f" ({spec.name}, the start)" for spec in specs if spec.files in starts)
    found: dict[str, DataReference] = {}
    for part in (part for spec in specs for part in spec.data if not part.name.endswith(named_twice)):
        if part.name not in found or found[part.name].rows < part.rows:
            found[part.name] = part
    return list(found.values())


def mean(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: torch.stack([part[name].double() for part in parts]).mean(0).to(tensor.dtype)
        for name, tensor in parts[0].items()
    }


if __name__ == "__main__":
    main()
