"""``examples/average_guards.py`` makes one guard of the mean weights of several that go together."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from guards import tiny_guard_folder

from lora_guard import Conversation, Guard, artifact
from lora_guard.artifact import DataReference

SCRIPT = Path(__file__).parents[1] / "examples" / "average_guards.py"


@pytest.fixture(scope="module")
def guards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two guards on one base model with other weights."""
    folder = tmp_path_factory.mktemp("average")
    return [
        tiny_guard_folder(folder / "one", strength=0.5, token_head=True),
        tiny_guard_folder(folder / "two", strength=0.1),
    ]


def make(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


def test_the_weights_are_the_mean_and_the_guard_judges(guards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = make(*guards, "--out", out)
    assert made.returncode == 0, made.stderr
    one, two, mean = (artifact.read(folder) for folder in (*guards, out))
    for name, tensor in (mean.adapter | mean.heads).items():
        pair = [(part.adapter | part.heads)[name] for part in (one, two)]
        torch.testing.assert_close(tensor, (pair[0] + pair[1]) / 2)
    assert any(not torch.equal(mean.adapter[name], one.adapter[name]) for name in mean.adapter)
    assert (mean.spec.name, mean.spec.token_head) == (one.spec.name, False)
    assert [part["files"] for part in mean.spec.provenance["average_of"]] == [one.spec.files, two.spec.files]
    assert "## Metrics of the training" not in (out / artifact.CARD_FILE).read_text("utf-8")
    assert Guard.load(out).moderate(Conversation.of("Hello")).target == "prompt"


def test_each_source_stands_there_once_with_the_most_rows(guards: list[Path], tmp_path: Path) -> None:
    def write(name: str, rows: dict[str, int], provenance: dict[str, Any] | None = None) -> Path:
        spec = artifact.read_spec(guards[0])
        data = [DataReference(name=source, rows=count, licence=None) for source, count in rows.items()]
        spec = spec.model_copy(update={"name": name, "data": data, "provenance": provenance or {}})
        artifact.rewrite(guards[0], tmp_path / name, spec, card="# A guard\n")
        return tmp_path / name

    start = write("first", {"mine": 9, "yours": 5})
    of_start = {"start_from": {"files": artifact.read_spec(start).files}}
    once = write("once", {"new": 2, "mine": 3, "mine (first, the start)": 9, "yours (first, the start)": 5}, of_start)
    twice = write("twice", {"new": 4, "mine (first, the start)": 9}, of_start)
    assert make(once, twice, start, "--out", tmp_path / "all").returncode == 0
    found = {part.name: part.rows for part in artifact.read_spec(tmp_path / "all").data}
    assert list(found.items()) == [("new", 4), ("mine", 9), ("yours", 5)]
    assert make(once, twice, "--out", tmp_path / "some").returncode == 0
    assert "mine (first, the start)" in {part.name for part in artifact.read_spec(tmp_path / "some").data}


def test_a_guard_that_counts_alone_stays_as_it_is(guards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert make(guards[1], guards[1], "--out", out).returncode == 0
    before, after = artifact.read(guards[1]), artifact.read(out)
    assert all(torch.equal(after.adapter[name], tensor) for name, tensor in before.adapter.items())
    assert all(torch.equal(after.heads[name], tensor) for name, tensor in before.heads.items())


def test_guards_that_do_not_go_together_are_one_line(guards: list[Path], tmp_path: Path) -> None:
    other = tiny_guard_folder(tmp_path / "other", categories=("a",))
    out = tmp_path / "out"
    refused = make(guards[0], other, "--out", out)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "another taxonomy" in refused.stderr
    assert not out.exists()
    (out / "mine").mkdir(parents=True)
    refused = make(*guards, "--out", out)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "is not a guard" in refused.stderr
