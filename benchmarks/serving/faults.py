"""Faults from outside: malformed requests, clients that leave in mid-stream, kill -9 and restart.

    python benchmarks/serving/faults.py --malformed 10000

Faults of the guard itself (an exception, a hang, NaN) and a full disk are among the tests.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import httpx2
from running import chat, server

from lora_guard.serving.audit import read_audit

PATHS = ["/v1/chat/completions", "/v1/moderations", "/classify", "/api/v1/text/contents", "/nothing"]
VALUES = [None, True, -1, 1e308, "", "x", "\ud800", [], [[]], {}, {"role": "user"}, {"a": {"b": []}}, 2**70]


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
            left = disconnects(url, arguments.streams)
            print(f"streams: {arguments.streams}, left in the middle: {left}; queue now: {queue(url)}")
            alive = httpx2.get(f"{url}/ready").status_code == 200
            process.kill()
        before = len(list(read_audit(audit)))
        with server(f"audit={audit}") as (url, _):
            reply = httpx2.post(f"{url}/v1/moderations", json={"input": "Hello"}, timeout=60)
        after = len(list(read_audit(audit)))
        print(f"killed and started again: HTTP {reply.status_code}; audit lines {before}, then {after}")
    sys.exit(0 if alive and 500 not in counts and after == before + 1 else 1)


def malformed(url: str, count: int) -> Counter[int]:
    """Send requests that no client would; the statuses of the answers."""
    order = random.Random(0)
    statuses: Counter[int] = Counter()
    with httpx2.Client(timeout=60) as http:
        for _ in range(count):
            kind = order.choice(["application/json", "application/json", "text/plain", ""])
            reply = http.post(url + order.choice(PATHS), content=body(order), headers={"content-type": kind})
            statuses[reply.status_code] += 1
            if reply.status_code != 200:
                assert set(reply.json()["error"]) >= {"message", "type", "param", "code"}
    return statuses


def body(order: random.Random) -> bytes:
    """Random bytes, cut JSON, or JSON with wrong values under right names."""
    names = ["model", "messages", "stream", "temperature", "max_tokens", "stop", "moderation", "input", "contents"]
    if order.random() < 0.2:
        return os.urandom(order.randrange(64))
    form = {order.choice(names): order.choice(VALUES) for _ in range(order.randrange(5))}
    text = json.dumps(form).encode()
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


def queue(url: str) -> float:
    """Requests that the server holds, once it had time to see the last one leave."""
    lines = httpx2.get(f"{url}/metrics", timeout=60).text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("lora_guard_queue_depth ")))


if __name__ == "__main__":
    main()
