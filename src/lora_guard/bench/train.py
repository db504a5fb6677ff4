"""Bench train: time to the same validation AUPRC as the paper's procedure, and an epoch from the cache."""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lora_guard import files
from lora_guard.artifact import GuardSpec
from lora_guard.bench.paper import PaperGuard
from lora_guard.bench.report import Figure, Report
from lora_guard.bench.rows import TAXONOMY, TRAIN_FILE
from lora_guard.bench.setup import Setup, dtype_of
from lora_guard.config import TrainConfig
from lora_guard.data.example import Example
from lora_guard.data.split import split_grouped
from lora_guard.errors import ConfigError
from lora_guard.evaluation.metrics import point_metrics
from lora_guard.progress import progress
from lora_guard.taxonomy import Taxonomy
from lora_guard.training.loop import train
from lora_guard.training.run import read_records

ROWS = 480
VALIDATION_FRACTION = 0.33
STRETCH = 45.0
"""Seconds the paper's side trains between two evaluations, which are not counted."""
CACHE_GIGABYTES = 4.0
MIN_ROWS = 8
GOAL = 3.0
OUR_SHARE = 0.45
"""Of the time that is left, at most, for our run; the paper's side needs the rest."""


def run(setup: Setup, *, stretch: float = STRETCH) -> Report:
    """Train the guard's own recipe anew, and the paper's procedure before and after it until it is as good.

    Raises:
        DataError: rows of less than two prompts.
    """
    rows = setup.read_rows(TRAIN_FILE, ROWS)
    known = [example for example in rows.examples if example.harmful is not None]
    train_rows, held_out = split_grouped(known, VALIDATION_FRACTION, setup.seed)
    parts = {"train": [known[i] for i in train_rows], "validation": [known[i] for i in held_out]}
    copy = setup.load_base()
    side = _PaperSide(PaperGuard(copy, len(Taxonomy.load(TAXONOMY).categories), setup.seed), parts, rows.everything)
    side.train(stretch, setup)
    cut = _cut(parts, side, setup)
    with TemporaryDirectory(prefix="lora-guard-bench-") as folder:
        ours, notes = _our_run(setup, parts, Path(folder))
    while not side.reached(ours.auprc) and time.monotonic() + 1.5 * side.longest < setup.deadline:
        side.train(stretch, setup)
    return Report(
        "train", _figures(ours, side), dtype_of(copy), rows.source, [*_story(ours, side, parts), *cut, *notes]
    )


def _cut(parts: dict[str, list[Example]], side: "_PaperSide", setup: Setup) -> list[str]:
    """Leave out training rows that would take our run too long at the speed of the paper's side; what to say of it."""
    tokens = sum(side.lengths) / len(side.lengths) * len(parts["train"])
    passes = 2 * (tokens + (len(parts["validation"]) / len(parts["train"])) * tokens)  # two epochs, each evaluated
    time_for_all = passes / (side.rates[0] * side.width)
    room = OUR_SHARE * (setup.deadline - time.monotonic())
    rows = len(parts["train"])
    parts["train"] = parts["train"][: max(MIN_ROWS, int(rows * min(1.0, room / time_for_all)))]
    if len(parts["train"]) == rows:
        return []
    return [f"our run was cut from {rows} rows to {len(parts['train'])}, to end in time"]


@dataclass(frozen=True)
class _OurRun:
    """Seconds of each epoch's steps, the validation AUPRC after each."""

    epochs: list[float]
    auprcs: list[float]

    @property
    def best(self) -> int:
        return max(range(len(self.auprcs)), key=lambda epoch: self.auprcs[epoch])

    @property
    def auprc(self) -> float:
        return self.auprcs[self.best]

    @property
    def seconds(self) -> float:
        """Of training, up to the epoch whose guard is kept."""
        return sum(self.epochs[: self.best + 1])


def _our_run(setup: Setup, parts: dict[str, list[Example]], folder: Path) -> tuple[_OurRun, list[str]]:
    """Two epochs, the second from the cache; one where there is no cache, and what to say of that."""
    for name, examples in parts.items():
        files.write_text(folder / f"{name}.jsonl", "".join(_line(example) for example in examples))
    notes = []
    try:
        config = our_config(setup.spec, folder, len(parts["validation"]), setup.seed, epochs=2, prefix_cache=True)
    except ConfigError as error:
        notes = [f"train.cached is not measured: {error}"]
        config = our_config(setup.spec, folder, len(parts["validation"]), setup.seed, epochs=1, prefix_cache=False)
    train(config, folder / "run", prefixes=folder / "prefixes")
    steps = read_records(folder / "run" / "steps.jsonl")
    metrics = read_records(folder / "run" / "metrics.jsonl")
    numbers = range(1, config.epochs + 1)
    seconds = [sum(s["tokens"] / s["tokens_per_second"] for s in steps if s["epoch"] == number) for number in numbers]
    auprcs = [record["harmfulness"].get("auprc") or 0.0 for record in metrics if record.get("set") == "validation"]
    return _OurRun(seconds, auprcs), notes


def our_config(
    spec: GuardSpec, folder: Path, validation: int, seed: int, *, epochs: int, prefix_cache: bool
) -> TrainConfig:
    """The recipe that the guard was trained by, over the bench's rows.

    Raises:
        ConfigError: a cache was asked for, and this version or this kind of adapter has none.
    """
    recipe: dict[str, Any] = spec.provenance.get("config") or {"adapter": spec.adapter}
    changes: dict[str, Any] = {
        "base_model": spec.base.name,
        "revision": spec.base.revision,
        "taxonomy": TAXONOMY,
        "train": [{"path": str(folder / "train.jsonl")}],
        "validation": [{"path": str(folder / "validation.jsonl")}],
        "test": [],
        "keep_out": [],
        "split": "grouped",
        "eval_rows": validation,
        "epochs": epochs,
        "seed": seed,
        "processes": None,
        "log_with": [],
        "licence_file": None,
        "prefix_cache": CACHE_GIGABYTES if prefix_cache else None,
    }
    if not prefix_cache:
        del changes["prefix_cache"]
        recipe = {name: value for name, value in recipe.items() if name != "prefix_cache"}
    settings = {**recipe, **changes}
    return TrainConfig.load(None, [f"{name}={json.dumps(value)}" for name, value in settings.items()])


def _line(example: Example) -> str:
    """A row as the training loop reads it from a file."""
    row = {"prompt": example.prompt, "response": example.response, "unsafe": example.harmful}
    return json.dumps({**row, "categories": dict(example.categories)}) + "\n"


class _PaperSide:
    """The paper's training, in stretches: what it has taken and how good it is after each."""

    def __init__(self, guard: PaperGuard, parts: dict[str, list[Example]], everything: Sequence[Example]) -> None:
        taxonomy = Taxonomy.load(TAXONOMY)
        self._guard = guard
        self.rows, self.seconds, self.longest = 0, 0.0, 0.0
        self.rates: list[float] = []
        self.curve: list[tuple[int, float]] = []
        """Rows trained on, validation AUPRC."""
        self.width = max(len(guard.ids(example)) for example in everything)
        ids = [guard.ids(example) for example in parts["train"]]
        self.lengths = [len(row) for row in ids]
        labels = torch.tensor([example.labels(taxonomy) for example in parts["train"]])
        self._steps = guard.train(ids, labels, self.width, seed=0)
        self._validation = [guard.ids(example) for example in parts["validation"]]
        self._harmful = torch.tensor([bool(example.harmful) for example in parts["validation"]]).numpy()

    def train(self, seconds: float, setup: Setup) -> None:
        """Train that long, then evaluate."""
        whole = began = time.monotonic()
        rows = 0
        if not self.rates:
            self.rows += next(self._steps)  # a warm-up; its time is left out
            began = time.monotonic()
        with progress("train, the paper's procedure", round(seconds), unit="s") as tick:
            shown = 0
            while (taken := time.monotonic() - began) < seconds:
                rows += next(self._steps)
                tick(min(round(seconds), round(taken)) - shown, f"{rows / max(taken, 1e-9):.2f} rows/s")
                shown = min(round(seconds), round(taken))
        taken = time.monotonic() - began
        self.rows, self.seconds = self.rows + rows, self.seconds + taken
        self.rates.append(rows / taken)
        scores = self._guard.bucketed(self._validation, 4096)[:, 0].sigmoid().double().numpy()
        self.curve.append((self.rows, point_metrics(scores, self._harmful, 0.5)["auprc"] or 0.0))
        self.longest = max(self.longest, time.monotonic() - whole)

    def rows_to(self, auprc: float) -> int | None:
        """Rows after which the validation AUPRC was reached first."""
        return next((rows for rows, value in self.curve if value >= auprc), None)

    def reached(self, auprc: float) -> bool:
        return self.rows_to(auprc) is not None


def _figures(ours: _OurRun, side: _PaperSide) -> dict[str, Figure]:
    rows = side.rows_to(ours.auprc) or side.rows
    totals = [rows / rate / ours.seconds for rate in side.rates]
    kind = "reached" if side.reached(ours.auprc) else "a lower bound"
    cached = [ours.epochs[0] / ours.epochs[1]] if len(ours.epochs) > 1 else []
    return {
        "total": Figure(f"the paper's time to our validation AUPRC ÷ ours ({kind})", totals, GOAL, "at least"),
        "cached": Figure("an epoch that fills the cache ÷ one that reads it", cached, GOAL, "at least"),
        "auprc": Figure("our validation AUPRC", [ours.auprc]),
        "paper-auprc": Figure("the paper's, at the end", [side.curve[-1][1]]),
        "paper-rows-per-second": Figure("the paper's training", side.rates),
    }


def _story(ours: _OurRun, side: _PaperSide, parts: dict[str, list[Example]]) -> list[str]:
    epochs = ", ".join(f"{seconds:.0f} s" for seconds in ours.epochs)
    curve = ", ".join(f"{auprc:.3f} after {rows} rows" for rows, auprc in side.curve)
    return [
        f"{len(parts['train'])} rows trained on, {len(parts['validation'])} for validation; ours: epochs of {epochs}, "
        f"AUPRC {ours.auprc:.3f} after {ours.seconds:.0f} s of steps",
        f"the paper's: {side.seconds:.0f} s of steps, rows padded to {side.width} tokens, AUPRC {curve}",
        f"train.total: one run of ours; the spread is that of the paper's {len(side.rates)} stretches "
        f"(median {statistics.median(side.rates):.2f} rows/s)",
    ]
