"""What a guard's figures stand beside: controls measured by this project on the same rows, and published figures."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_guard.errors import DataError
from lora_guard.evaluation.metrics import METRICS, Interval

CONTROLS_FILE = Path(__file__).parent / "controls.json"
_PUBLISHED_FILE = Path(__file__).parent / "published.json"

Comparison = Literal["above", "below", "not distinguishable"]

COMPARED = ("auprc", "f1")
"""The metrics that decide whether a guard beats a control."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Control(_Strict):
    """A simpler guard, measured on evaluation sets that are known by the hash of their data."""

    title: str
    guards: list[str] = []
    """The guards whose control it is, on their base model and rows."""
    config: str
    """The file that names its training rows and settings."""
    command: str
    commit: str
    parameters: int | None
    """Held in memory beside the chat model; None where they are not known."""
    sets: dict[str, "ControlFigures"]
    """sha256 of a set's data -> what was measured on it."""


class ControlFigures(_Strict):
    """Harmfulness on one set: metric -> interval."""

    name: str
    n: int
    harmfulness: dict[str, Interval]


class PublishedFigure(_Strict):
    """One figure that others published; nothing of it was measured here."""

    system: str
    parameters: float
    """Of the model that is held in memory beside the chat model."""
    set: str
    """The stem of the data file, or the hub data set's name."""
    metric: Literal["f1", "auprc", "fpr"]
    value: float
    note: str = ""


@cache
def shipped_controls(guard: str) -> tuple[Control, ...]:
    """The controls that were measured for a guard of this name.

    Of a kind that it lacks another guard's stands there, under a title that says whose: of other rows, or another base.
    """
    controls = [Control.model_validate(entry) for entry in json.loads(CONTROLS_FILE.read_text("utf-8"))]
    own = [control for control in controls if guard in control.guards]
    kinds = {control.title for control in own}
    others = [
        control.model_copy(update={"title": f"{control.title}, of {control.guards[0]}"})
        for control in controls
        if control.title not in kinds
    ]
    return (*own, *others)


@cache
def _published() -> tuple[PublishedFigure, ...]:
    return tuple(PublishedFigure.model_validate(entry) for entry in json.loads(_PUBLISHED_FILE.read_text("utf-8")))


def published(name: str) -> list[PublishedFigure]:
    """The published figures on a set, which is known by its name alone."""
    return [figure for figure in _published() if figure.set == name]


def control_from_results(folder: Path) -> Control:
    """The results of another guard as a control.

    Args:
        folder: what an evaluation of it wrote.

    Raises:
        DataError: no ``results.json`` of this program there.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text("utf-8"))
        provenance = results["provenance"]
        sets = {
            provenance["data"][name]["sha256"]: ControlFigures(
                name=name, n=entry["n"], harmfulness={metric: entry["harmfulness"][metric] for metric in METRICS}
            )
            for name, entry in results["datasets"].items()
            if entry["harmfulness"]
        }
        return Control(
            title=f"{provenance['guard']} ({folder})",
            config=str(path),
            command=provenance["command"],
            commit=provenance["commit"] or f"lora-guard {provenance['lora-guard']}",
            parameters=provenance["parameters"],
            sets=sets,
        )
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise DataError(
            f"{path} does not have the form of an evaluation's results; evaluate that guard anew"
        ) from error


def measured(controls: Sequence[Control], sha256: str, harmfulness: dict[str, Any]) -> list[dict[str, Any]]:
    """The controls that were measured on a set, each with how the guard compares to it.

    Args:
        controls: those to look among.
        sha256: of the set's data.
        harmfulness: the guard's own metrics on it, with intervals.
    """
    entries = []
    for control in controls:
        figures = control.sets.get(sha256)
        if figures is not None:
            entries.append(
                {
                    **control.model_dump(exclude={"sets"}),
                    "harmfulness": figures.harmfulness,
                    "comparison": {
                        metric: compare(harmfulness[metric], figures.harmfulness[metric]) for metric in COMPARED
                    },
                }
            )
    return entries


def compare(ours: Interval, theirs: Interval) -> Comparison:
    """How a metric stands beside a control's: above or below only if the two intervals do not touch.

    The rule is stricter than a test of the difference: what it calls above is.
    """
    if None in (ours["low"], ours["high"], theirs["low"], theirs["high"]):
        return "not distinguishable"
    if ours["low"] > theirs["high"]:  # type: ignore[operator]
        return "above"
    return "below" if ours["high"] < theirs["low"] else "not distinguishable"  # type: ignore[operator]
