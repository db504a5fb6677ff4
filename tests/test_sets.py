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
    (first, second), _ = read_sets([], str(tmp_path), TAXONOMY)
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
    assert [part.name for part in read_sets([str(tmp_path / "mine.jsonl")], str(suite), TAXONOMY)[0]] == ["mine", "a"]
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
    (first,), _ = read_sets(["hub:xstest"], None, TAXONOMY)
    (again,), _ = read_sets(["hub:xstest"], None, TAXONOMY)
    rows[0]["label"] = "unsafe"
    (other,), _ = read_sets(["hub:xstest"], None, TAXONOMY)
    assert (first.name, first.place) == ("xstest", "hub:xstest")
    assert first.sha256 == again.sha256 != other.sha256


def test_a_public_set_that_cannot_be_loaded_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(hub: str, *_: object, **__: object) -> list[dict[str, str]]:
        if hub != "Paul/XSTest":
            raise PermissionError("given out on request")
        return [{"prompt": "p", "type": "homonyms", "label": "safe"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    (found,), left_out = read_sets([], "public", TAXONOMY)
    assert found.name == "xstest"
    assert "given out on request" in left_out["wildguardtest_prompts"]
    with pytest.raises(DataError, match="public set 'mine' is unknown"):
        read_sets(["hub:mine"], "public", TAXONOMY)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match="no public set can be loaded: hub data set"):
        read_sets([], "public", TAXONOMY)


def test_a_file_of_another_taxonomy_is_judged_on_harmfulness_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"prompt": "a", "unsafe": true, "categories": {"spam": true}}\n', "utf-8")
    (found,), _ = read_sets([str(path)], None, TAXONOMY)
    assert found.examples[0].harmful
    assert not found.examples[0].categories
    assert found.note == "its categories are not those of 'mine': harmfulness alone"
    path.write_text('{"prompt": "a", "unsafe": true, "categories": {"spam": true, "rude": true}}\n', "utf-8")
    with pytest.raises(DataError, match="has no category 'spam'"):
        read_sets([str(path)], None, TAXONOMY)


def test_a_file_without_a_label_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text('{"prompt": "a"}\n', "utf-8")
    with pytest.raises(DataError, match="has no label; needed: 'unsafe', or categories of 'mine'"):
        read_sets([str(path)], None, TAXONOMY)
