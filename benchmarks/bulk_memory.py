"""Memory of a bulk moderation's processes over an input several times as large as Ray's object store.

    python benchmarks/bulk_memory.py [--megabytes 480] [--files 4] [--actors 1]

A tiny guard with random weights judges rows of 8 KB of generated text, so that reading and writing decide. Resident
memory is sampled from the first finished shard to the last; the peak of the first third of that time stands beside the
peak of the last.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from guards import tiny_guard_folder

ROW = 8 << 10
"""Bytes of a row, all but a short prompt in a column that is passed on."""


def main() -> None:
    """Generate, run, sample and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=480, help="of input")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--actors", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = sum(
            write_rows(folder / f"{number}.jsonl", number, arguments.megabytes * 10**6 // arguments.files)
            for number in range(arguments.files)
        )
        command = [sys.executable, "-m", "lora_guard", "bulk", "--json", "--actors", str(arguments.actors)]
        command += ["--guard", str(tiny_guard_folder(folder / "guard"))]
        command += ["--input", str(folder / "*.jsonl"), "--output", str(folder / "out")]
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        samples = list(sampled(psutil.Process(driver.pid), folder / "out"))
        summary = json.loads(driver.communicate()[0])
    print(
        f"{rows:,} rows, {arguments.megabytes} MB of input; {summary['judged']:,} judged in {summary['seconds']:.0f} s"
    )
    third = len(samples) // 3
    for what in ("driver", "actors", "other workers"):
        first, last = (max(sample[what] for sample in part) for part in (samples[:third], samples[-third:]))
        print(f"{what}: at most {first:,.0f} MB in the first third, {last:,.0f} MB in the last")


def write_rows(path: Path, seed: int, size: int) -> int:
    """A file of about ``size`` bytes; how many rows it has."""
    chance = random.Random(seed)
    count = size // ROW
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {"prompt": f"Text {number} of file {seed}", "context": chance.randbytes(ROW // 2 - 40).hex()}
            file.write(json.dumps(row) + "\n")
    return count


def sampled(driver: psutil.Process, output: Path) -> Iterator[dict[str, float]]:
    """Megabytes of the driver and of Ray's workers below it, four times a second while shards are being finished."""
    while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE:
        if next(output.glob("*.parquet"), None) is not None:
            found = {"driver": driver.memory_info().rss / 1e6, "actors": 0.0, "other workers": 0.0}
            for process in driver.children(recursive=True):
                try:
                    title = " ".join(process.cmdline())
                    if title.startswith("ray::"):
                        kind = "actors" if "ShardModerator" in title else "other workers"
                        found[kind] += process.memory_info().rss / 1e6
                except psutil.NoSuchProcess:
                    continue
            yield found
        time.sleep(0.25)


if __name__ == "__main__":
    main()
