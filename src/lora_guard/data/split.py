"""Cleaning and splitting of examples: no duplicates, no prompt on both sides of a split."""

import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from lora_guard.data.example import Example
from lora_guard.errors import DataError

PAPER_TRAIN, PAPER_VALIDATION = 24_672, 2_514
"""Rows of BeaverTails 30k_train that the paper trains on and validates on."""


def fold(prompt: str) -> str:
    """What two prompts have in common that count as the same: their letters and digits, case folded.

    A prompt without any is compared as it is.
    """
    normal = unicodedata.normalize("NFKC", prompt).casefold()
    words = "".join(character if character.isalnum() else " " for character in normal).split()
    return " ".join(words) or prompt


def drop_duplicates(examples: Sequence[Example]) -> tuple[list[Example], int]:
    """Keep the first of examples with the same prompt (folded), response and labels; how many were dropped."""
    kept: dict[object, Example] = {}
    for example in examples:
        labels = (example.harmful, tuple(sorted(example.categories.items())))
        kept.setdefault((fold(example.prompt), example.response, labels), example)
    return list(kept.values()), len(examples) - len(kept)


def drop_overlap(examples: Sequence[Example], held_out: Iterable[Example]) -> tuple[list[Example], int]:
    """Drop the examples whose prompt (folded) occurs in a held-out set; how many were dropped."""
    prompts = {fold(example.prompt) for example in held_out}
    kept = [example for example in examples if fold(example.prompt) not in prompts]
    return kept, len(examples) - len(kept)


def split_grouped(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Training and validation indices: about ``fraction`` of the rows held out, all rows of a prompt on one side.

    Raises:
        DataError: fewer than two prompts.
    """
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(fold(example.prompt), []).append(index)
    if len(groups) < 2:
        raise DataError(f"{len(groups)} prompt cannot be split in training and validation; needed: two prompts")
    order = np.random.default_rng(seed).permutation(len(groups))
    prompts = list(groups)
    held_out: list[int] = []
    for place in order[:-1]:
        held_out.extend(groups[prompts[place]])
        if len(held_out) >= fraction * len(examples):
            break
    outside = set(held_out)
    return [index for index in range(len(examples)) if index not in outside], sorted(held_out)


def split_paper(examples: Sequence[Example], seed: int) -> tuple[list[int], list[int]]:
    """The paper's split of BeaverTails 30k_train, by row; prompts occur on both sides, so use it for comparison only.

    Raises:
        DataError: another number of rows.
    """
    if len(examples) != PAPER_TRAIN + PAPER_VALIDATION:
        raise DataError(
            f"split 'paper' was given {len(examples):,} rows; allowed: the {PAPER_TRAIN + PAPER_VALIDATION:,} of "
            "BeaverTails 30k_train"
        )
    order = np.random.default_rng(seed).permutation(len(examples))
    return sorted(order[:PAPER_TRAIN].tolist()), sorted(order[PAPER_TRAIN:].tolist())
