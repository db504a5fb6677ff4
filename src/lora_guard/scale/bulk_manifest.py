"""The manifest of a bulk moderation: what its rows were judged by and from, so that only the same run is resumed."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_guard import files
from lora_guard.errors import DataError, InputError
from lora_guard.scale import bulk_store
from lora_guard.scale.bulk_plan import InputFile
from lora_guard.scale.bulk_shard import Judge

MANIFEST = "_manifest.json"
FORMAT_VERSION = 1


def describe(judge: Judge, shard_rows: int, inputs: Sequence[InputFile]) -> dict[str, Any]:
    """The manifest of a run."""
    base = Path(judge.base).expanduser() if judge.base else None
    return {
        "format_version": FORMAT_VERSION,
        "lora_guard": version("lora-guard"),
        **asdict(judge),
        "base_sha256": files.sha256(base) if base and base.is_file() else None,
        "shard_rows": shard_rows,
        "input": [{"path": file.path, "sha256": file.sha256, "rows": file.rows} for file in inputs],
    }


def read(output: str, *, resume: bool) -> dict[str, Any] | None:
    """The manifest of the run in an output folder; None where there is none yet.

    Raises:
        DataError: it cannot be read.
        InputError: there is a run and it is not to be resumed, or there is something else.
    """
    present = bulk_store.names(output)
    if MANIFEST not in present:
        # A run that was killed while it wrote its manifest leaves a temporary alone.
        if all(name.startswith(f".{MANIFEST}.") for name in present):
            return None
        raise InputError(f"output {output!r} is not empty and no bulk run's; allowed: a new or empty folder")
    if not resume:
        raise InputError(f"output {output!r} holds a bulk run; allowed: --resume to go on with it, or a new folder")
    return _load(f"{output}/{MANIFEST}")


def write(output: str, manifest: dict[str, Any]) -> None:
    """Write the manifest of a new run.

    Raises:
        ResourceError: it cannot be written.
    """
    bulk_store.write(f"{output}/{MANIFEST}", (json.dumps(manifest, indent=2) + "\n").encode())


def check_same(begun: dict[str, Any], now: dict[str, Any], output: str) -> None:
    """See that a run to resume is the one that was begun.

    Raises:
        InputError: what differs.
    """
    for name in {**begun, **now}:
        was, found = begun.get(name), now.get(name)
        if name != "input" and was != found:
            raise InputError(f"output {output!r} was begun with {name} {was!r}, not {found!r}; allowed: the same")
    was, found = ({file["path"]: file["sha256"] for file in manifest["input"]} for manifest in (begun, now))
    for path in {**was, **found}:
        if was.get(path) != found.get(path):
            change = "added" if path not in was else "removed" if path not in found else "changed"
            raise InputError(f"input {path!r} was {change} since output {output!r} was begun; allowed: the same input")
    if begun["input"] != now["input"]:
        raise InputError(f"output {output!r} was begun with its input in another order; allowed: the same input")


def _load(place: str) -> dict[str, Any]:
    try:
        with bulk_store.opened(place) as file:
            found = json.loads(file.read())
    except (OSError, ValueError) as error:
        raise DataError(f"{place} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{place} is not the manifest of this version of lora-guard; allowed: a new output folder")
    return found
