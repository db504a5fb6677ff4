"""Bulk moderation on Ray: every input row once, through kills of its processes; a refused call is one line."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pytest
from clusters import local_cluster
from guards import tiny_guard_folder
from pyarrow.parquet import read_table, write_table

from lora_guard.errors import ConfigError, DataError, InputError, LoraGuardError

ray = pytest.importorskip("ray", reason="needs the extra 'scale'; make test-extras installs it")
from lora_guard.scale import bulk  # noqa: E402 - imports ray
from lora_guard.scale.bulk import BulkSettings, moderate_bulk  # noqa: E402

# Ray leaves sockets and processes to its own exit, and warns of its own next versions.
pytestmark = [
    pytest.mark.extras,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

TEXTS = [f"Text {number} {'of some length ' * (number % 5)}" for number in range(30)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_cluster():
        yield


@pytest.fixture(scope="module")
def guard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_guard_folder(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def asked(guard_folder: Path, tmp_path: Path) -> BulkSettings:
    """Three forms of input with 30 good rows and 2 bad ones, in 12 shards."""
    source = tmp_path / "in"
    source.mkdir()
    lines = [json.dumps({"prompt": text, "nested": {"n": [1]}}) for text in TEXTS[:12]]
    (source / "a.jsonl").write_text("\n".join([*lines, "bad"]))
    (source / "b.csv").write_text("prompt,extra\n" + "".join(f'"{text}",1\n' for text in TEXTS[12:20]) + "alone\n")
    write_table(pyarrow.table({"prompt": TEXTS[20:], "when": range(10)}), source / "c.parquet")
    return BulkSettings(f"{source}/*", str(tmp_path / "out"), guard=str(guard_folder), shard_rows=3, actors=1)


def rows_of(folder: str) -> list[dict[str, Any]]:
    return sorted(read_table(folder).to_pylist(), key=lambda row: str(row["row_id"]))


@pytest.mark.usefixtures("cluster")
def test_every_row_comes_out_once_with_its_columns_and_verdict(asked: BulkSettings) -> None:
    summary = moderate_bulk(asked, shown=False)
    assert (summary.rows, summary.judged, summary.dead, summary.resumed) == (32, 30, 2, 0)
    rows = rows_of(asked.output)
    assert sorted(row["prompt"] for row in rows) == sorted(TEXTS)
    assert len({row["row_id"] for row in rows}) == 30
    assert {row["nested"] for row in rows} == {None, '{"n": [1]}'}
    assert sorted(row["when"] for row in rows if row["when"] is not None) == list(range(10))
    letters = [line for path in Path(asked.output, "_dead").iterdir() for line in path.read_text().splitlines()]
    assert sorted(json.loads(letter)["row"] for letter in letters) == ["alone", "bad"]


@pytest.mark.usefixtures("cluster")
def test_a_stopped_run_goes_on_where_it_was_and_comes_to_the_same(asked: BulkSettings, tmp_path: Path) -> None:
    moderate_bulk(asked, shown=False)
    whole = {path.name: path.read_bytes() for path in Path(asked.output).glob("*.parquet")}
    removed = sorted(whole)[::3]
    for name in removed:
        Path(asked.output, name).unlink()
        Path(asked.output, f".{name}.x1").write_bytes(whole[name][:50])
    kept = {path: path.stat().st_mtime_ns for path in Path(asked.output).glob("*.parquet")}
    summary = moderate_bulk(replace(asked, resume=True), shown=False)
    assert summary.rows == summary.judged + summary.dead == 32
    assert 0 < summary.resumed < 32
    assert {path.name: path.read_bytes() for path in Path(asked.output).glob("*.parquet")} == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(Path(asked.output).glob(".*"))
    assert moderate_bulk(replace(asked, resume=True), shown=False).resumed == 32


@pytest.mark.usefixtures("cluster")
def test_a_run_whose_output_stands_among_its_input_is_resumed(asked: BulkSettings) -> None:
    folder = Path(asked.input).parent
    asked = replace(asked, input=f"{folder}/**", output=f"{folder}/out", shard_rows=32)
    assert moderate_bulk(asked, shown=False).rows == 32
    Path(asked.output, "part-00001-000000.parquet").unlink()
    summary = moderate_bulk(replace(asked, resume=True), shown=False)
    assert (summary.rows, summary.resumed) == (32, 23)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("blocks", [10_000, 2])  # with two, a kill gives several finished shards to the next actor
def test_an_actor_that_is_killed_again_and_again_loses_and_repeats_nothing(
    asked: BulkSettings, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "_MOST_BLOCKS", blocks)
    asked = replace(asked, shard_rows=1)
    moderate_bulk(asked, shown=False)
    again = replace(asked, output=f"{asked.output}-killed")
    killed: set[int] = set()
    over = threading.Event()

    def kill() -> None:
        while not over.is_set() and len(killed) < 2:
            written = len(list(Path(again.output).glob("*.parquet")))
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    name = " ".join(process.cmdline())
                    if name.startswith("ray::") and "ShardModerator" in name and written > 4 * len(killed):
                        process.kill()
                        killed.add(process.pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        summary = moderate_bulk(again, shown=False)
    finally:
        over.set()
        killer.join()
    assert killed
    assert (summary.judged, summary.dead) == (30, 2)
    assert rows_of(again.output) == rows_of(asked.output)


@pytest.mark.usefixtures("cluster")
def test_a_call_that_cannot_be_right_is_refused_in_one_line(asked: BulkSettings) -> None:
    with pytest.raises(ConfigError, match=r"--actors 3 is more than the cluster has processors; allowed: 1 to 2"):
        moderate_bulk(replace(asked, actors=3), shown=False)
    with pytest.raises(DataError, match=r"matches no file"):
        moderate_bulk(replace(asked, input=f"{asked.input}.txt"), shown=False)
    with pytest.raises(ConfigError, match=r"policy 'nobody' is unknown"):
        moderate_bulk(replace(asked, policy="nobody"), shown=False)
    assert not Path(asked.output).exists()
    moderate_bulk(asked, shown=False)
    with pytest.raises(InputError, match=r"holds a bulk run; allowed: --resume"):
        moderate_bulk(asked, shown=False)
    with pytest.raises(InputError, match=r"was begun with policy 'balanced', not 'strict'"):
        moderate_bulk(replace(asked, policy="strict", resume=True), shown=False)
    with pytest.raises(InputError, match=r"was begun with shard_rows 3, not 4"):
        moderate_bulk(replace(asked, shard_rows=4, resume=True), shown=False)


@pytest.mark.usefixtures("cluster")
def test_an_error_of_an_actor_or_a_planning_task_is_one_line(asked: BulkSettings, guard_folder: Path) -> None:
    broken = Path(asked.input).parent / "d.parquet"
    broken.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"d\.parquet is not Parquet") as found:
        moderate_bulk(asked, shown=False)
    assert "Traceback" not in str(found.value)
    broken.unlink()
    with pytest.raises(LoraGuardError, match="nowhere") as lost:
        moderate_bulk(replace(asked, base="nowhere"), shown=False)
    assert "Traceback" not in str(lost.value)


def test_a_driver_that_is_killed_is_resumed_by_the_next(asked: BulkSettings) -> None:
    command = [sys.executable, "-m", "lora_guard", "bulk", "--json", "--shard-rows", "1", "--actors", "1"]
    command += ["--input", asked.input, "--output", asked.output, "--guard", asked.guard]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while driver.poll() is None and len(list(Path(asked.output).glob("*.parquet"))) < 3:
        time.sleep(0.005)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    result = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, check=True)
    summary = json.loads(result.stdout)
    assert (summary["rows"], summary["judged"], summary["dead"]) == (32, 30, 2)
    assert summary["resumed"] >= 3
    assert sorted(row["prompt"] for row in rows_of(asked.output)) == sorted(TEXTS)
    lines = result.stderr.splitlines()
    size = sum(path.stat().st_size * (1 + (path.suffix != ".parquet")) for path in Path(asked.input).parent.iterdir())
    assert any(line.startswith(f"plan: {size}/{size} bytes, ETA") for line in lines)
    others = [line for line in lines if not line.startswith(("plan: ", "bulk: "))]
    assert all("Set ray log level" in line for line in others)  # Ray's one word that no setting silences


def test_the_summary_of_a_person_says_what_became_of_every_row() -> None:
    summary = bulk.BulkSummary(1200, 1190, 10, 200, 3, 2, 1.5, 100.0, "/out")
    assert bulk.as_text(summary) == (
        "1,200 rows in, 1,190 judged, 10 dead; see /out/_dead; 200 were done before; 10.0 rows/s with 2 actors; "
        "3 files in /out"
    )
    assert json.loads(bulk.as_json(summary))["dead"] == 10
