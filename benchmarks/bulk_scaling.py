"""Rows a second of bulk moderation with one and two actors, and what Ray costs beside the same work without it.

    python benchmarks/bulk_scaling.py [--input FILE.jsonl] [--rows 1536] [--runs 3] [--json]

Every actor has one thread, as has the run without Ray: the same guard, loaded alike, over ``moderate``'s own function,
and as many rows at a time.
The sides take turns. Start-up (Ray, planning, loading the guard) is reported apart: rates are those between the first
finished shard and the last.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lora_guard.bench.rows import generated
from lora_guard.taxonomy import Taxonomy

GROUP = 256
"""Rows that ``moderate`` judges together, and those of a shard: in groups of 32 either side has half the rate."""

ALONE = """
import json, os, sys, time
from pathlib import Path
from lora_guard import Guard
from lora_guard.process_memory import suit_torch
from lora_guard.moderate_file import moderate_file
suit_torch(os.environ)
began = time.time()
guard = Guard.load(bulk=True)
guard.moderate([])
loaded = time.time()
rows = moderate_file(guard, Path(sys.argv[1]), Path(sys.argv[2]))
print(json.dumps({"rate": rows / (time.time() - loaded), "start": loaded - began}))
"""


def main() -> None:
    """Measure all sides in turns and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, help="rows (.jsonl); generated ones when absent")
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_rows(folder / "rows.jsonl", arguments.input, arguments.rows)
        found: dict[str, list[dict[str, float]]] = {"without Ray": [], "1 actor": [], "2 actors": []}
        for run in range(arguments.runs):
            found["without Ray"].append(alone(source, folder / f"alone-{run}.jsonl"))
            for actors, side in ((1, "1 actor"), (2, "2 actors")):
                found[side].append(bulk(source, folder / f"bulk-{actors}-{run}", actors))
    show(found, as_json=arguments.json)


def show(found: dict[str, list[dict[str, float]]], *, as_json: bool) -> None:
    """Print rates, start-up and the two ratios."""
    rate = {side: statistics.median(run["rate"] for run in runs) for side, runs in found.items()}
    start = {side: statistics.median(run["start"] for run in runs) for side, runs in found.items()}
    ratios = {
        "two_actors_over_one": rate["2 actors"] / rate["1 actor"],
        "overhead_of_ray": rate["without Ray"] / rate["1 actor"] - 1,
    }
    if as_json:
        print(json.dumps({"rows_per_second": rate, "start_seconds": start, **ratios, "runs": found}))
        return
    for side in found:
        print(f"{side}: {rate[side]:.1f} rows/s, start-up {start[side]:.1f} s")
    print(f"2 actors over 1: {ratios['two_actors_over_one']:.2f} × (target ≥ 1.7)")
    print(f"Ray's overhead: {ratios['overhead_of_ray']:.1%} (target ≤ 15 %)")


def alone(source: Path, output: Path) -> dict[str, float]:
    """Rate and start-up in seconds of ``moderate``'s function in a process of one thread."""
    return dict(json.loads(run([sys.executable, "-c", ALONE, str(source), str(output)])))


def bulk(source: Path, output: Path, actors: int) -> dict[str, float]:
    """Rate and start-up in seconds of a bulk run.

    The first shard of each actor is finished when it has loaded its guard; the files' times say how long the rest took.
    """
    settings = ["--json", "--shard-rows", str(GROUP), "--actors", str(actors)]
    command = [sys.executable, "-m", "lora_guard", "bulk", *settings]
    summary = json.loads(run([*command, "--input", str(source), "--output", str(output)]))
    times = sorted(path.stat().st_mtime for path in output.glob("*.parquet"))
    rows = summary["judged"] * (len(times) - actors) / len(times)
    took = times[-1] - times[actors - 1]
    return {"rate": rows / took, "start": summary["start_seconds"] + summary["seconds"] - took}


def run(command: list[str]) -> str:
    """The last line of what a process of one thread prints."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads}
    ).stdout.splitlines()[-1]


def write_rows(path: Path, source: Path | None, count: int) -> Path:
    """The first rows of a file, or generated ones."""
    if source is not None:
        with source.open("rb") as file:
            path.write_bytes(b"".join(line for _, line in zip(range(count), file, strict=False)))
        return path
    taxonomy = Taxonomy.load("beavertails")
    examples = [generated(random.Random(index), taxonomy) for index in range(count)]
    path.write_text("".join(json.dumps({"prompt": e.prompt, "response": e.response}) + "\n" for e in examples), "utf-8")
    return path


if __name__ == "__main__":
    main()
