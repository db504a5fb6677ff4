"""The sets of an evaluation: a folder's files, single files and public sets, each with a hash of what was read."""

import hashlib
from pathlib import Path

import datasets
import pytest

from lora_guard.errors import ConfigError, DataError
from lora_guard.evaluation.sets import read_sets
from lora_guard.taxonomy import Taxonomy

TAXONOMY = Taxonomy("mine", ("rude",))
ROW = '{"prompt": "a", "unsafe": true}\n'


def test_a_suite_is_every_data_file_of_the_folder_in_order_of_name(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(ROW, "utf-8")
    (tmp_path / "a.csv").write_text("prompt,unsafe\nx,1\n", "utf-8")
    (tmp_path / "README.md").write_text("not data", "utf-8")
    first, second = read_sets([], str(tmp_path), TAXONOMY)
    assert (first.name, second.name) == ("a", "b")
    assert second.place == "b.jsonl"
    assert second.sha256 == hashlib.sha256(ROW.encode()).hexdigest()
    assert [example.prompt for example in first.examples + second.examples] == ["x", "a"]


def test_files_beside_a_suite_come_first_and_need_names_of_their_own(tmp_path: Path) -> None:
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "a.jsonl").write_text(ROW, "utf-8")
    (tmp_path / "mine.jsonl").write_text(ROW, "utf-8")
    (tmp_path / "a.jsonl").write_text(ROW, "utf-8")
    assert [part.name for part in read_sets([str(tmp_path / "mine.jsonl")], str(suite), TAXONOMY)] == ["mine", "a"]
    with pytest.raises(ConfigError, match="two sets are called 'a'"):
        read_sets([str(tmp_path / "a.jsonl")], str(suite), TAXONOMY)


def test_nothing_to_evaluate_on_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to evaluate on; give --data FILE or --suite FOLDER"):
        read_sets([], None, TAXONOMY)
    with pytest.raises(DataError, match=r"holds no data file; allowed endings: \.jsonl"):
        read_sets([], str(tmp_path), TAXONOMY)
    with pytest.raises(DataError, match="is not a folder; allowed: a folder with data files, or 'public'"):
        read_sets([], str(tmp_path / "none"), TAXONOMY)


def test_a_public_set_is_hashed_by_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "p", "type": "homonyms", "label": "safe"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    (first,) = read_sets(["hub:xstest"], None, TAXONOMY)
    (again,) = read_sets(["hub:xstest"], None, TAXONOMY)
    rows[0]["label"] = "unsafe"
    (other,) = read_sets(["hub:xstest"], None, TAXONOMY)
    assert (first.name, first.place) == ("xstest", "hub:xstest")
    assert first.sha256 == again.sha256 != other.sha256
