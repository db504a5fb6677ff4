"""The rows of benches: generated ones follow the recorded lengths, files are those of a data folder."""

import random
import statistics
from pathlib import Path

import pytest

from lora_guard.bench.rows import EVAL_FILE, RESPONSE_WORDS, generated, read_rows
from lora_guard.errors import DataError
from lora_guard.taxonomy import Taxonomy


def test_generated_rows_have_the_recorded_lengths_and_both_labels() -> None:
    taxonomy = Taxonomy.load("beavertails")
    rows = [generated(random.Random(index), taxonomy) for index in range(1000)]
    lengths = [len((row.response or "").split()) for row in rows]
    assert abs(statistics.median(lengths) - RESPONSE_WORDS[5]) < 5
    assert max(lengths) <= RESPONSE_WORDS[-1]
    assert 400 < sum(row.harmful is True for row in rows) < 600
    assert not any(any(row.categories.values()) for row in rows if not row.harmful)


def test_rows_without_a_folder_are_generated_say_so_and_depend_on_the_seed() -> None:
    rows = read_rows(None, EVAL_FILE, 10, 0)
    assert len(rows.examples) == 10
    assert all(example in rows.everything for example in rows.examples)
    assert rows.source == "generated rows of random words, lengths of BeaverTails 30k_test: 10 of 3,021"
    assert read_rows(None, EVAL_FILE, 10, 0) == rows
    assert read_rows(None, EVAL_FILE, 10, 1).examples != rows.examples


def test_rows_of_a_folder_are_a_sample_of_the_named_file(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / EVAL_FILE).write_text("".join(f'{{"prompt": "p{i}", "unsafe": true}}\n' for i in range(5)), "utf-8")
    rows = read_rows(tmp_path, EVAL_FILE, 3, 0)
    assert (len(rows.examples), len(rows.everything)) == (3, 5)
    assert rows.source == f"{EVAL_FILE}: 3 of 5"
    assert len(read_rows(tmp_path, EVAL_FILE, 9, 0).examples) == 5


def test_a_folder_that_is_not_there_or_lacks_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data folder '.*none' not found; needed: a folder with train/"):
        read_rows(tmp_path / "none", EVAL_FILE, 3, 0)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_rows(tmp_path, EVAL_FILE, 3, 0)
