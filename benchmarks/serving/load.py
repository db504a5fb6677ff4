"""Load: many clients mix chats, streams and moderation; every answer is compared with the one computed alone before.

    python benchmarks/serving/load.py --clients 64 --seconds 300

Prints requests, errors other than 429, answers that differ, and the memory of the server over time. Exits with 1 if an
error occurred or an answer differs.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any

import httpx2
from running import chat, server

TOPICS = ["bread", "tea", "rivers", "old maps", "bicycles", "rain", "chess", "bees", "glass", "lighthouses"]
PROMPTS = [f"Tell me one thing about {topic}." for topic in TOPICS]
TOLERANCE = 0.02
"""Of scores: rows are judged in bf16 and in batches of changing shape, which rounds differently."""


def main() -> None:
    """Run the load and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=16)
    arguments = parser.parse_args()
    with server() as (url, process):
        expected = alone(url, arguments.tokens)
        counts, memory = asyncio.run(load(url, process, expected, arguments))
    megabytes = ", ".join(f"{bytes_ / 2**20:.0f}" for bytes_ in memory)
    for name, count in sorted(counts.items()):
        print(f"{name:36}{count}")
    print(f"{'server memory, MB':36}{megabytes}")
    bad = sum(count for name, count in counts.items() if name.startswith(("error", "wrong")))
    sys.exit(1 if bad else 0)


def bodies(tokens: int) -> list[tuple[str, dict[str, Any]]]:
    """Each kind of request for each prompt."""
    kinds = []
    for prompt in PROMPTS:
        kinds.append(("/v1/chat/completions", chat(prompt, tokens)))
        kinds.append(("/v1/chat/completions", chat(prompt, tokens, "block")))
        kinds.append(("/v1/chat/completions", {**chat(prompt, tokens, "block"), "stream": True}))
        kinds.append(("/v1/moderations", {"input": prompt}))
        kinds.append(("/v1/moderations", {"input": [f"{prompt} {other}" for other in PROMPTS[:4]]}))
    return kinds


def alone(url: str, tokens: int) -> list[Any]:
    """The answer to each request when nothing else runs."""
    return [essence(httpx2.post(url + path, json=body, timeout=300)) for path, body in bodies(tokens)]


def essence(reply: httpx2.Response) -> tuple[str | None, list[float]]:
    """The text of an answer and its scores."""
    streamed = reply.headers["content-type"].startswith("text/event-stream")
    answer = joined(reply.text) if streamed else reply.json()
    if "choices" in answer:
        scores = [side["results"][0]["score"] for side in answer["moderation"].values()]
        return answer["choices"][0]["message"]["content"], scores
    return None, [result["score"] for result in answer["results"]]


def joined(events: str) -> dict[str, Any]:
    """A stream as the answer it would have been in one piece; one that breaks off has no moderation."""
    lines = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    deltas = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk.get("choices", [])]
    moderation = [chunk["moderation"] for chunk in chunks if chunk.get("moderation")]
    whole = lines[-1:] == ["[DONE]"] and len(moderation) == 1
    return {"choices": [{"message": {"content": "".join(deltas)}}], "moderation": moderation[0] if whole else {}}


def same(answer: tuple[str | None, list[float]], expected: tuple[str | None, list[float]]) -> bool:
    """The same text to the letter, as many scores, and the same within the tolerance."""
    (text, scores), (text_alone, scores_alone) = answer, expected
    pairs = zip(scores, scores_alone, strict=False)
    near = len(scores) == len(scores_alone) and all(abs(ours - theirs) <= TOLERANCE for ours, theirs in pairs)
    return text == text_alone and near


async def load(url: str, process: Any, expected: list[Any], arguments: Any) -> tuple[Counter[str], list[int]]:
    """Keep the clients asking until the time is over."""
    counts: Counter[str] = Counter()
    memory: list[int] = []
    end = time.monotonic() + arguments.seconds
    requests = bodies(arguments.tokens)

    async def client(seed: int) -> None:
        order = random.Random(seed)
        async with httpx2.AsyncClient(timeout=600) as http:
            while time.monotonic() < end:
                index = order.randrange(len(requests))
                path, body = requests[index]
                reply = await http.post(url + path, json=body)
                counts[outcome(path + (" stream" if body.get("stream") else ""), reply, expected[index])] += 1
                if reply.status_code == 429:
                    await asyncio.sleep(float(reply.headers["retry-after"]))

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(process.memory_info().rss)
            await asyncio.sleep(arguments.seconds / 6)

    await asyncio.gather(watch(), *(client(seed) for seed in range(arguments.clients)))
    memory.append(process.memory_info().rss)
    return counts, memory


def outcome(path: str, reply: httpx2.Response, expected: Any) -> str:
    """How a reply is counted."""
    if reply.status_code == 429:
        return "busy (429)"
    if reply.status_code != 200:
        return f"error {reply.status_code} {path}"
    return f"right {path}" if same(essence(reply), expected) else f"wrong {path}"


if __name__ == "__main__":
    main()
