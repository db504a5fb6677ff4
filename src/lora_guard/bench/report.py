"""What a bench found: figures against their goals, as a table for people and one line of JSON for programs."""

import hashlib
import json
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from lora_guard import artifact
from lora_guard.artifact import GuardSpec


@dataclass(frozen=True)
class Figure:
    """One figure: the median of ``values`` with their extremes; without values it was not measured.

    ``tolerance`` is how far beside the goal still counts as met; a figure without goal is for information.
    """

    what: str
    values: Sequence[float]
    goal: float | None = None
    bound: Literal["at most", "at least"] = "at most"
    tolerance: float = 0.0

    @property
    def value(self) -> float | None:
        return statistics.median(self.values) if self.values else None

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the goal; None without a goal."""
        if self.goal is None:
            return None
        if self.value is None:
            return False
        if self.bound == "at most":
            return self.value <= self.goal + self.tolerance
        return self.value >= self.goal - self.tolerance

    def to_dict(self) -> dict[str, float | bool | None]:
        low, high = (min(self.values), max(self.values)) if self.values else (None, None)
        return {"value": self.value, "low": low, "high": high, "goal": self.goal, "met": self.met}


@dataclass(frozen=True)
class Report:
    """A bench's result.

    ``figures`` are named without the bench's name, which the output puts before them; ``dtype`` is that of the weights
    in memory; ``notes`` say what was cut and how the sides stood.
    """

    bench: str
    figures: dict[str, Figure]
    dtype: str
    rows: str
    notes: list[str] = field(default_factory=list)

    def to_json(self, provenance: dict[str, Any]) -> str:
        """One line, without line break."""
        figures = {f"{self.bench}.{name}": figure.to_dict() for name, figure in self.figures.items()}
        return json.dumps({"bench": self.bench, "figures": figures, "provenance": provenance}, allow_nan=False)


def provenance(report: Report, spec: GuardSpec, folder: Path, seed: int) -> dict[str, Any]:
    """Where a report's figures come from; a guard's ``guard.json`` holds the hashes of its other files."""
    saved = (folder / artifact.SPEC_FILE).read_bytes()
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("lora-guard", "torch", "transformers", "peft")},
        },
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "dtype": report.dtype,
        "guard": {"name": spec.name, "fingerprint": f"sha256:{hashlib.sha256(saved).hexdigest()}"},
        "base": {"name": spec.base.name, "fingerprint": spec.base.fingerprint},
        "rows": report.rows,
        "seed": seed,
        "commit": _commit(),
        "command": shlex.join(sys.argv),
        "notes": report.notes,
    }


def show(report: Report, provenance: dict[str, Any]) -> None:
    """Print the report for people."""
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    figure = Column("figure", justify="right")
    table = Table("what", "goal", figure, "spread", "met", box=SIMPLE, title=f"bench {report.bench}")
    for name, found in report.figures.items():
        what = f"{report.bench}.{name}\n[dim]{escape(found.what)}[/dim]"
        spread = f"{_number(min(found.values))} – {_number(max(found.values))}" if found.values else ""
        shown = "not measured" if found.value is None else _number(found.value)
        table.add_row(what, _goal(found), shown, spread, _MET[found.met])
    console.print(table)
    for note in report.notes:
        console.print(escape(note))
    console.print(
        f"rows: {report.rows}; guard {provenance['guard']['name']}, weights in {report.dtype}; "
        f"{provenance['cpu']}, {provenance['threads']} threads",
        markup=False,
    )


_MET = {None: "", True: "[green]yes[/green]", False: "[red]no[/red]"}


def _goal(figure: Figure) -> str:
    if figure.goal is None:
        return ""
    tolerance = f" ± {figure.tolerance:g}" if figure.tolerance else ""
    return f"{'≤' if figure.bound == 'at most' else '≥'} {figure.goal:g}{tolerance}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit checked out where this package's source is versioned; None for an installed copy."""
    here = Path(__file__)
    calls = (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"])
    try:
        results = [
            subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=False)
            for words in calls
        ]
    except OSError:  # no git
        return None
    return None if any(result.returncode for result in results) else results[-1].stdout.strip()
