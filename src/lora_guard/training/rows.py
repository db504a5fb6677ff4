"""The rows of a run: read, cleaned, split, and turned into the token ids that the guard path reads."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_guard.config import Source, TrainConfig
from lora_guard.conversation import Target
from lora_guard.data.augment import augmented
from lora_guard.data.example import Example
from lora_guard.data.sources import read
from lora_guard.data.split import drop_duplicates, drop_overlap, split_grouped, split_paper
from lora_guard.errors import DataError
from lora_guard.normalise import forms
from lora_guard.render import Rendered, Renderer
from lora_guard.taxonomy import Taxonomy


@dataclass(frozen=True)
class RowSet:
    """Rows ready for the model.

    ``windows`` are each row's windows of token ids, one for most, and outside training those of its normalised form as
    well; ``labels`` is ``[rows, 1 + K]``, nan where unknown; ``targets`` are what was judged of each row.
    """

    name: str
    windows: list[list[list[int]]]
    labels: Tensor
    targets: list[Target]

    @cached_property
    def ids(self) -> list[list[int]]:
        """What a row is trained on: its first window."""
        return [windows[0] for windows in self.windows]

    def sample(self, count: int | None) -> "RowSet":
        """At most ``count`` rows, evenly spaced; all of them when None."""
        if count is None or count >= len(self.windows):
            return self
        chosen = [index * len(self.windows) // count for index in range(count)]
        return RowSet(
            self.name,
            [self.windows[index] for index in chosen],
            self.labels[chosen],
            [self.targets[index] for index in chosen],
        )


@dataclass(frozen=True)
class RunRows:
    """Everything a run reads. ``draws`` are the expected draws an epoch of each training row; ``summary`` is saved."""

    train: RowSet
    in_epoch: Callable[[int], RowSet]
    """``train`` as an epoch, counted from 0, trains on it: changed where the run augments its rows."""
    opening: int
    """How many tokens every row begins with, augmented or not: those of the chat template."""
    draws: list[float]
    validation: RowSet
    held_out: list[Example]
    """``validation`` before it is token ids."""
    tests: list[RowSet]
    splits: dict[str, Any]
    used: dict[str, int]
    summary: dict[str, int]


@dataclass(frozen=True)
class RunExamples:
    """The examples of a run before they are token ids; ``origins`` are the sources of the training ones."""

    train: list[Example]
    origins: list[Source]
    validation: list[Example]
    tests: list[tuple[str, list[Example]]]
    splits: dict[str, Any]
    dropped: dict[str, int]


def choose(config: TrainConfig, taxonomy: Taxonomy) -> RunExamples:
    """Read, clean and split the examples of a run, the same on every process.

    Rows without any label, duplicates, and training prompts that occur in a validation or test set, or one to keep
    out, are dropped and counted; the paper's split keeps them, as the paper did.

    Raises:
        DataError: a source that is missing or bad, or nothing left to train on.
    """
    tests = [(source.name, _read(config, source, taxonomy)) for source in config.test]
    held_out = [example for source in config.validation for example in _read(config, source, taxonomy)]
    kept_out = [example for source in config.keep_out for example in _read(config, source, taxonomy)]
    judged_elsewhere = [*held_out, *kept_out, *(example for _, part in tests for example in part)]
    examples, origins, dropped = _training_examples(config, taxonomy, judged_elsewhere)
    validation_indices: list[int] = []
    if config.validation:
        train_indices = list(range(len(examples)))
    elif config.split == "paper":
        train_indices, validation_indices = split_paper(examples, config.seed)
    else:
        train_indices, validation_indices = split_grouped(examples, config.validation_fraction, config.seed)
    if not train_indices:
        raise DataError("no training row is left: all of them occur in the validation or test sets")
    return RunExamples(
        train=[examples[index] for index in train_indices],
        origins=[origins[index] for index in train_indices],
        validation=held_out or [examples[index] for index in validation_indices],
        tests=tests,
        splits={"train": train_indices, "validation": validation_indices, "rows": len(examples)},
        dropped=dropped,
    )


def prepare(config: TrainConfig, taxonomy: Taxonomy, renderer: Renderer, invocation: str) -> RunRows:
    """The rows of a run as token ids, from the examples that :func:`choose` gives.

    Raises:
        DataError: a source that is missing or bad, or nothing left to train on.
    """
    chosen = choose(config, taxonomy)

    def judged(example: Example) -> Rendered:
        return renderer.judged(example.conversation(), example.target, invocation)

    def rows(name: str, examples: Sequence[Example], read: Callable[[Example], list[list[int]]]) -> RowSet:
        labels = torch.tensor([example.labels(taxonomy) for example in examples])
        return RowSet(name, [read(example) for example in examples], labels, [example.target for example in examples])

    def as_it_came(example: Example) -> list[list[int]]:
        return judged(example).windows(config.max_length)

    def in_all_forms(example: Example) -> list[list[int]]:
        """As a guard decides: the highest window of the text as it came and normalised."""
        parts = [renderer.judged(form, example.target, invocation) for form in forms(example.conversation())]
        return [window for part in parts for window in part.windows(config.max_length)]

    training = rows("train", chosen.train, as_it_came)

    def in_epoch(epoch: int) -> RowSet:
        if not config.augment:
            return training
        windows = []
        for row, (example, clean) in enumerate(zip(chosen.train, training.windows, strict=True)):
            changed = augmented(example, config.augment, seed=config.seed, epoch=epoch, row=row)
            windows.append(clean if changed == example else as_it_came(changed))
        return RowSet("train", windows, training.labels, training.targets)

    return RunRows(
        train=training,
        in_epoch=in_epoch,
        opening=len(judged(chosen.train[0]).opening),
        draws=[origin.weight for origin in chosen.origins],
        validation=rows("validation", chosen.validation, in_all_forms),
        held_out=chosen.validation,
        tests=[rows(name, examples, in_all_forms) for name, examples in chosen.tests],
        splits=chosen.splits,
        used=dict(Counter(origin.name for origin in chosen.origins)),
        summary={**chosen.dropped, "trained_on_first_window": sum(len(windows) > 1 for windows in training.windows)},
    )


def _read(config: TrainConfig, source: Source, taxonomy: Taxonomy) -> list[Example]:
    rooted = source.path if source.path.startswith("hub:") else str(Path(config.data_root) / source.path)
    return read(source.model_copy(update={"path": rooted}), taxonomy, config.seed)


def _training_examples(
    config: TrainConfig, taxonomy: Taxonomy, held_out: Sequence[Example]
) -> tuple[list[Example], list[Source], dict[str, int]]:
    """The cleaned examples of all training sources, the source of each, and how many were dropped for what."""
    origin: dict[int, Source] = {}
    examples: list[Example] = []
    for source in config.train:
        part = _read(config, source, taxonomy)
        origin.update((id(example), source) for example in part)
        examples.extend(part)
    dropped = {"unlabelled_dropped": 0, "duplicates_dropped": 0, "overlapping_dropped": 0}
    if config.split != "paper":
        labelled = [example for example in examples if example.harmful is not None or example.categories]
        dropped["unlabelled_dropped"] = len(examples) - len(labelled)
        examples, dropped["duplicates_dropped"] = drop_duplicates(labelled)
        examples, dropped["overlapping_dropped"] = drop_overlap(examples, held_out)
    return examples, [origin[id(example)] for example in examples], dropped
