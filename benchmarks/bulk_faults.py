"""Kills in the middle of a bulk moderation: an actor, worker processes, the driver; then row-for-row equality.

    python benchmarks/bulk_faults.py [--input GLOB] [--rows-per-shard 16]

Without ``--input``, 240 generated rows. The reference is a run that nobody disturbs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from bulk_scaling import write_rows
from pyarrow.parquet import read_table

ACTOR = "ShardModerator"


def main() -> None:
    """Run each fault and compare; the exit code is 1 if a row is lost, repeated or another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", help="path or glob; generated rows when absent")
    parser.add_argument("--rows-per-shard", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = arguments.input or str(write_rows(folder / "rows.jsonl", None, 240))
        command = [sys.executable, "-m", "lora_guard", "bulk", "--json", "--input", source]
        command += ["--shard-rows", str(arguments.rows_per_shard), "--actors", "1"]
        subprocess.run([*command, "--output", str(folder / "reference")], check=True, stdout=subprocess.DEVNULL)
        expected = read_rows(folder / "reference")
        print(f"reference: {len(expected)} rows")
        faults: dict[str, Callable[[psutil.Process, Path], bool]] = {
            "actor": kill_actor,
            "worker process that plans": kill_planner,
            "all worker processes": kill_workers,
            "driver": kill_driver,
        }
        equal = [disturbed(fault, kill, command, folder, expected) for fault, kill in faults.items()]
    sys.exit(not all(equal))


def disturbed(
    fault: str,
    kill: Callable[[psutil.Process, Path], bool],
    command: list[str],
    folder: Path,
    expected: list[dict[str, object]],
) -> bool:
    """Run the command with a kill in the middle, resume it if it died, and say whether its rows are the expected."""
    output = folder / fault.replace(" ", "-")
    driver = subprocess.Popen([*command, "--output", str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = False
    while driver.poll() is None:
        killed = killed or kill(psutil.Process(driver.pid), output)
        time.sleep(0.002)
    if driver.returncode:
        result = subprocess.run(
            [*command, "--output", str(output), "--resume"], check=True, capture_output=True, text=True
        )
        resumed = json.loads(result.stdout)["resumed"]
        print(f"{fault}: exit code {driver.returncode}, {resumed} rows were done; resumed")
    equal = killed and read_rows(output) == expected
    print(f"{fault}: {'killed' if killed else 'NOT KILLED'}, rows {'equal' if equal else 'DIFFER'}", flush=True)
    return equal


def kill_actor(driver: psutil.Process, output: Path) -> bool:
    """Kill the actor once a second shard is written."""
    return written(output) >= 2 and kill_child(driver, ACTOR)


def kill_planner(driver: psutil.Process, output: Path) -> bool:
    """Kill the worker process that plans the input."""
    return kill_child(driver, "planning")


def kill_workers(driver: psutil.Process, output: Path) -> bool:
    """Kill every worker process once a second shard is written: the actor, Ray Data's own actors and idle ones."""
    if written(output) < 2:
        return False
    count = 0
    while kill_child(driver, "ray::"):
        count += 1
    return count > 0


def kill_driver(driver: psutil.Process, output: Path) -> bool:
    """Kill the driver once a second shard is written; its cluster goes with it."""
    if written(output) < 2:
        return False
    driver.kill()
    return True


def kill_child(driver: psutil.Process, word: str) -> bool:
    """Kill the Ray process below the driver whose title has the word, if there is one now."""
    for child in driver.children(recursive=True):
        try:
            title = " ".join(child.cmdline())
            # Without its agents a node is dead, and this machine's node takes the driver with it.
            if title.startswith("ray::") and word in title and "Agent" not in title:
                child.kill()
                return True
        except psutil.NoSuchProcess:
            continue
    return False


def written(output: Path) -> int:
    """How many shards are finished."""
    return len(list(output.glob("*.parquet")))


def read_rows(folder: Path) -> list[dict[str, object]]:
    """All rows, verdicts included, by their ids."""
    return sorted(read_table(str(folder)).to_pylist(), key=lambda row: str(row["row_id"]))


if __name__ == "__main__":
    main()
