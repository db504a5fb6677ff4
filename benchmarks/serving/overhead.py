"""What the guard costs a chat, and how long a short moderation request waits beside running chats.

    python benchmarks/serving/overhead.py

Chats with output ``score`` and without run in turn, several rounds, and the ratio of their throughputs is printed.
Then short moderation requests are sent beside running chats; their 99th percentile is printed in decode steps, the time
of the same request on an idle server taken off.
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
from running import chat, server

PROMPT = "Tell me a long story about a lighthouse, its keeper and the sea."


def main() -> None:
    """Measure both and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chats", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=100)
    arguments = parser.parse_args()
    with server() as (url, _):
        run(url, 1, 8, None)  # warm
        ratios, steps = [], []
        for _ in range(arguments.rounds):
            without = run(url, arguments.chats, arguments.tokens, None)
            scored = run(url, arguments.chats, arguments.tokens, "score")
            ratios.append(without / scored)
            steps.append(without / (arguments.chats * arguments.tokens))
        step = statistics.median(steps)
        print(f"chat throughput with output score / without: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
        idle, busy = waits(url, arguments.chats, arguments.requests)
        extra = (percentile(busy, 0.99) - statistics.median(idle)) / step
        print(f"a decode step: {1000 * step:.0f} ms; a short moderation alone: {1000 * statistics.median(idle):.0f} ms")
        print(f"beside {arguments.chats} chats: p50 {1000 * statistics.median(busy):.0f} ms, "
              f"p99 {1000 * percentile(busy, 0.99):.0f} ms: its own cost and {extra:.2f} decode steps")  # fmt: skip


def run(url: str, chats: int, tokens: int, mode: str | None) -> float:
    """Seconds until so many chats at once are answered, with moderation of that mode or with none."""
    body: dict[str, Any] = chat(PROMPT, tokens, mode)
    begun = time.monotonic()
    with ThreadPoolExecutor(chats) as pool:
        for reply in pool.map(
            lambda _: httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=600), range(chats)
        ):
            reply.raise_for_status()
    return time.monotonic() - begun


def waits(url: str, chats: int, requests: int) -> tuple[list[float], list[float]]:
    """Seconds of short moderation requests on an idle server, and while chats run all the time."""
    idle = [moderation(url) for _ in range(20)]
    busy: list[float] = []
    with ThreadPoolExecutor(chats) as pool:
        running = [pool.submit(run, url, 1, 256, "score") for _ in range(chats)]
        while len(busy) < requests:
            if all(future.done() for future in running):
                running = [pool.submit(run, url, 1, 256, "score") for _ in range(chats)]
            time.sleep(0.2)
            busy.append(moderation(url))
    return idle, busy


def moderation(url: str) -> float:
    """Seconds of one short request."""
    begun = time.monotonic()
    httpx2.post(f"{url}/v1/moderations", json={"input": "How do I bake bread?"}, timeout=600).raise_for_status()
    return time.monotonic() - begun


def percentile(values: list[float], share: float) -> float:
    """The value that so large a share of all does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


if __name__ == "__main__":
    main()
