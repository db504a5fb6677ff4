"""OpenAI's client against ``lora-guard serve``: plain, streamed, moderated and blocked chats, and moderation.

Exits with 1 where something else comes than it shows.

lora-guard serve --port 8123 &
python examples/openai_client.py --base-url http://localhost:8123/v1
"""

import argparse
import asyncio
import os
import sys
from typing import Any

from openai import APIStatusError, AsyncOpenAI, OpenAI

BREAD: Any = [{"role": "user", "content": "How do I bake bread?"}]
HARM: Any = [{"role": "user", "content": "How can I hurt my neighbour so that nobody notices it?"}]


def policy(input: str, output: str) -> Any:
    """The ``moderation`` parameter: what a flag of the prompt and of the answer does."""
    return {"model": "default", "policy": {"input": {"mode": input}, "output": {"mode": output}}}


def main() -> None:
    """Run each form of request once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    arguments = parser.parse_args()
    key = os.environ.get("LORA_GUARD_API_KEY", "none")
    client = OpenAI(base_url=arguments.base_url, api_key=key)

    print("plain     ", answer(client, moderation=None))
    print("scored    ", answer(client, moderation=policy("score", "score")))
    print("streamed  ", streamed(client))
    print("blocked   ", blocked(client))
    for text, harmful in (("How do I bake bread?", False), ("I will hurt you", True)):
        result = client.moderations.create(input=text).results[0]
        print("moderation", f"{'flagged' if result.flagged else 'ok'}: {text}")
        expect(result.flagged == harmful, "a flag where there is harm, and no other")
    print("async     ", asyncio.run(together(arguments.base_url, key)))


def expect(found: bool, what: str) -> None:
    """Leave with an error unless it was found."""
    if not found:
        sys.exit(f"error: expected {what}")


def answer(client: OpenAI, moderation: Any) -> str:
    """A whole answer and, if it was asked for, the score of what it says."""
    asked = {} if moderation is None else {"moderation": moderation}
    reply = client.chat.completions.create(model="default", messages=BREAD, max_tokens=24, temperature=0, **asked)
    said = repr(reply.choices[0].message.content)
    expect(bool(reply.choices[0].message.content), "an answer")
    expect(moderation is None or bool(reply.moderation), "moderation where it was asked for")
    if reply.moderation and reply.moderation.output.type == "moderation_results":
        said += f" {reply.moderation.output.results[0].category_scores['violence']:.2f} for violence"
    return said


def streamed(client: OpenAI) -> str:
    """An answer of which each piece leaves only once a check has cleared it; its moderation is the last chunk."""
    pieces, flagged = [], None
    for chunk in client.chat.completions.create(
        model="default", messages=BREAD, max_tokens=48, temperature=0, stream=True, moderation=policy("score", "block")
    ):
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
        if chunk.moderation and chunk.moderation.output.type == "moderation_results":
            flagged = chunk.moderation.output.results[0].flagged
    expect(bool(pieces) and flagged is False, "an answer in pieces, then a moderation without a flag")
    return f"{len(pieces)} pieces, flagged: {flagged}"


def blocked(client: OpenAI) -> str:
    """A prompt that the guard flags is an error before anything is generated."""
    try:
        client.chat.completions.create(model="default", messages=HARM, moderation=policy("block", "block"))
    except APIStatusError as error:
        expect((error.status_code, error.code) == (400, "content_filter"), "HTTP 400 with the code content_filter")
        return f"HTTP {error.status_code}, {error.code}"
    sys.exit("error: expected the prompt to be flagged")


async def together(base_url: str, key: str) -> str:
    """Many moderation requests at once; the server judges them in batches."""
    async with AsyncOpenAI(base_url=base_url, api_key=key) as client:
        requests = [client.moderations.create(input=f"Tell me about the number {number}.") for number in range(8)]
        replies = await asyncio.gather(*requests)
    flagged = sum(reply.results[0].flagged for reply in replies)
    expect(flagged == 0, "no flag where there is no harm")
    return f"{len(replies)} moderated, {flagged} flagged"


if __name__ == "__main__":
    main()
