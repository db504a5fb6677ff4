"""Faults from outside: malformed requests, clients that leave in mid-stream, a full disk, kill -9 and restart.

    python benchmarks/serving/faults.py --malformed 10000

Faults of the guard itself (an exception, a hang, NaN) are among the tests. Linux only: a full disk is a bound on the
size of the server's files. Exits with 1 where a fault has another outcome than it should.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import psutil
from running import chat, server

from lora_guard.serving.audit import read_audit

FORMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat("Count.", 1, "block", lora_guard={"check_every": 1}),
    "/v1/moderations": {"input": ["one", "two"], "model": "any"},
    "/classify": {"input": "one"},
    "/api/v1/text/contents": {"contents": ["one"], "detector_params": {"threshold": 0.5}},
    "/beta/litellm_basic_guardrail_api": {"input_type": "request", "texts": ["one"]},
    "/nothing": {},
}
"""A valid request for each path."""

VALUES = [None, True, -1, 0, 1e308, "", "x", "\ud800", [], [[]], {}, {"role": "user"}, {"a": {"b": []}}, 2**70]


def main() -> None:
    """Run each fault and print its outcome."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=40)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        audit = Path(folder) / "audit.jsonl"
        with server(f"audit={audit}") as (url, process):
            counts = malformed(url, arguments.malformed)
            print("malformed:", dict(sorted(counts.items())))
            left, held = disconnects(url, arguments.streams), drained(url)
            print(f"streams: {arguments.streams}, left in the middle: {left}; requests that the server holds: {held:g}")
            withheld = full_disk(url, process, audit)
            print("full disk, in block and score mode and with room again: HTTP", ", ".join(map(str, withheld)))
            alive = httpx2.get(f"{url}/ready").status_code == 200
            killed_in_mid_stream(url, process)
        before = len(list(read_audit(audit)))
        with server(f"audit={audit}") as (url, _):
            reply = httpx2.post(f"{url}/v1/moderations", json={"input": "Hello"}, timeout=60)
        after = len(list(read_audit(audit)))
        print(f"killed in mid-stream and started again: HTTP {reply.status_code}; audit lines {before}, then {after}")
    right = alive and held == 0 and 500 not in counts and withheld == [503, 200, 200] and after == before + 1
    sys.exit(0 if right else 1)


def malformed(url: str, count: int) -> Counter[int]:
    """Send requests that no client would; the statuses of the answers."""
    order = random.Random(0)
    statuses: Counter[int] = Counter()
    with httpx2.Client(timeout=60) as http:
        for _ in range(count):
            path = order.choice(list(FORMS))
            kind = order.choice(["application/json", "application/json", "application/json", "text/plain", ""])
            reply = http.post(url + path, content=body(order, FORMS[path]), headers={"content-type": kind})
            statuses[reply.status_code] += 1
            if reply.status_code != 200:
                assert set(reply.json()["error"]) >= {"message", "type", "param", "code"}
    return statuses


def body(order: random.Random, form: dict[str, Any]) -> bytes:
    """Random bytes, or a request with wrong values, perhaps cut."""
    if order.random() < 0.2:
        return os.urandom(order.randrange(64))
    names = order.sample(sorted(form), order.randint(0, len(form)))
    text = json.dumps(form | {name: order.choice(VALUES) for name in names}).encode()
    return text[: order.randrange(len(text))] if order.random() < 0.3 else text


def disconnects(url: str, streams: int) -> int:
    """Begin streams and leave every second one after its first pieces; how many were left."""
    left, body = 0, chat("Count.", 24, stream=True)
    for number in range(streams):
        with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
            for index, _ in enumerate(reply.iter_lines()):
                if number % 2 and index > 6:
                    left += 1
                    break
    return left


def full_disk(url: str, process: psutil.Process, audit: Path) -> list[int]:
    """Let the audit log grow no further: the statuses of a chat in ``block`` mode, one in ``score``, and one after."""
    lines = sum(1 for _ in read_audit(audit))
    free = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (audit.stat().st_size + 100, free[1]))  # a line has room for its beginning
    statuses = [answered(url, mode) for mode in ("block", "score")]
    assert sum(1 for _ in read_audit(audit)) == lines
    process.rlimit(psutil.RLIMIT_FSIZE, free)
    return [*statuses, answered(url, "block")]


def answered(url: str, mode: str) -> int:
    """The status of a short chat's answer."""
    return httpx2.post(f"{url}/v1/chat/completions", json=chat("Count.", 4, mode), timeout=60).status_code


def killed_in_mid_stream(url: str, process: psutil.Process) -> None:
    """Kill the server while an answer leaves it."""
    body = chat("Count.", 64, "block", stream=True)
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
        for index, _ in enumerate(reply.iter_lines()):
            if index > 2:
                process.kill()
                return


def drained(url: str) -> float:
    """Requests that the server holds, given ten seconds to see that their clients have left."""
    end = time.monotonic() + 10
    while (held := queue(url)) and time.monotonic() < end:
        time.sleep(0.1)
    return held


def queue(url: str) -> float:
    """Requests that the server says it holds."""
    lines = httpx2.get(f"{url}/metrics", timeout=60).text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("lora_guard_queue_depth ")))


if __name__ == "__main__":
    main()
