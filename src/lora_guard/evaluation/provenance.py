"""Where an evaluation's figures come from: guard, data, program, versions."""

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_guard.guard import Guard


def provenance(guard: Guard, data: Mapping[str, Mapping[str, Any]], command: str, **settings: Any) -> dict[str, Any]:
    """What ``results.json`` holds under ``provenance``.

    Args:
        guard: the guard that is measured.
        data: name of each set -> where it was read from and its sha256.
        command: that began the evaluation.
        settings: of the evaluation.
    """
    return {
        "guard": guard.spec.name,
        "guard_files": dict(guard.spec.files),
        "policy": guard.policy,
        "parameters": guard.parameters,
        "base": guard.spec.base.model_dump(mode="json"),
        "weights": guard.base_fingerprint,  # those that ran: quantised ones, or with --allow-other-base others
        "data": {name: dict(entry) for name, entry in data.items()},
        "command": command,
        "commit": commit(),
        **settings,
        "rows_per_second": {},
        "python": platform.python_version(),
        **{name: version(name) for name in ("lora-guard", "torch", "transformers")},
    }


def commit() -> str | None:
    """The commit of the source this program runs from, ``-dirty`` if changed since; None outside a checkout."""
    folder, here = Path(__file__).parent, Path(__file__).name

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", here)  # an installed copy may lie inside another project's checkout
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()
    except (OSError, subprocess.CalledProcessError):
        return None
