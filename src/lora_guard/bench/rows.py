"""The rows that benches run on: a sample of a data folder, or generated ones whose lengths follow a recorded set."""

import random
from dataclasses import dataclass
from pathlib import Path

from lora_guard.data.example import Example
from lora_guard.data.sources import read_file
from lora_guard.errors import DataError
from lora_guard.taxonomy import Taxonomy

TAXONOMY = "beavertails"
TRAIN_FILE = "train/beavertails.jsonl"
EVAL_FILE = "eval/beavertails_30k_test.jsonl"

# Words of prompt and response at the 0th, 10th, … 100th percentile of BeaverTails 30k_test, and its number of rows.
PROMPT_WORDS = (1, 6, 7, 8, 9, 11, 12, 14, 18, 23, 155)
RESPONSE_WORDS = (1, 15, 25, 36, 46, 56, 66, 76, 88, 107, 325)
RECORDED_ROWS = 3021


@dataclass(frozen=True)
class BenchRows:
    """``examples`` are those that are run, drawn from ``everything``; the paper pads to the longest of the latter."""

    examples: list[Example]
    everything: list[Example]
    source: str


def read_rows(data: Path | None, file: str, count: int, seed: int) -> BenchRows:
    """At most ``count`` rows of ``file`` in the folder ``data``; generated ones when there is no folder.

    Raises:
        DataError: no such folder or file, or a bad row.
    """
    taxonomy = Taxonomy.load(TAXONOMY)
    if data is not None and not data.is_dir():
        raise DataError(f"data folder {str(data)!r} not found; needed: a folder with {TRAIN_FILE} and {EVAL_FILE}")
    if data is None:
        number = max(count, RECORDED_ROWS)
        everything = [generated(random.Random(seed * number + index), taxonomy) for index in range(number)]
        source = "generated rows of random words, lengths of BeaverTails 30k_test"
    else:
        everything = read_file(data / file, taxonomy)
        source = file
    chosen = random.Random(seed).sample(everything, min(count, len(everything)))
    return BenchRows(chosen, everything, f"{source}: {len(chosen):,} of {len(everything):,}")


def generated(chance: random.Random, taxonomy: Taxonomy) -> Example:
    """A row of random words, some of which only harmful rows have; its lengths follow the recorded ones."""
    harmful = chance.random() < 0.5
    words = _WORDS + _WORDS_OF_HARMFUL_ROWS if harmful else _WORDS

    def text(percentiles: tuple[int, ...]) -> str:
        place = chance.random() * (len(percentiles) - 1)
        low = int(place)
        length = percentiles[low] + (place - low) * (percentiles[low + 1] - percentiles[low])
        return " ".join(chance.choice(words) for _ in range(round(length)))

    categories = {name: harmful and chance.random() < 0.1 for name in taxonomy.categories}
    return Example(text(PROMPT_WORDS), text(RESPONSE_WORDS), harmful, categories, "generated")


_WORDS = ("the", "river", "house", "people", "often", "walk", "before", "small", "bread", "light", "make", "water")
_WORDS_OF_HARMFUL_ROWS = ("storm", "thorn")
