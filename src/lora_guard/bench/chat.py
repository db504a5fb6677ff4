"""A chat of known length at the level of token ids: a prompt cut to size, and an answer streamed with checks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_guard.conversation import Conversation
from lora_guard.data.example import Example
from lora_guard.engine.session import Session
from lora_guard.render import Renderer

Check = Callable[[Sequence[int]], object]
"""Judges the chat after the given tokens of the answer; none of them is the prompt alone."""

EVERY = 16
"""Tokens of an answer between two checks."""


@dataclass(frozen=True)
class Prompt:
    """``ids`` open the answer; the prompt is judged at ``end``; ``content`` are the ids of its text alone."""

    ids: list[int]
    end: int
    content: list[int]


def prompt_of(renderer: Renderer, examples: Sequence[Example], length: int) -> Prompt:
    """A single user message, rendered, of ``length`` tokens: the rows' texts one after the other, cut."""
    words = " ".join(f"{example.prompt} {example.response or ''}" for example in examples)
    words = " ".join([words] * (1 + 8 * length // max(1, len(words))))  # a token has seldom more than eight letters
    conversation = Conversation.of(words)
    ids, end = renderer.chat(conversation)
    before = end - len(renderer.judged(conversation, "prompt", "").target)
    end = length - (len(ids) - end)
    return Prompt(ids[:end] + ids[len(ids) - (length - end) :], end, ids[before:end])


def stream(session: Session, prompt: Prompt, tokens: int, check: Check | None = None) -> list[int]:
    """Answer greedily, exactly ``tokens`` long; check the prompt, the answer every 16 tokens and at its end."""
    session.append(prompt.ids)
    if check:
        check([])
    answer: list[int] = []
    for number in range(1, tokens + 1):
        answer.append(session.sample())
        if check and (number % EVERY == 0 or number == tokens):
            check(answer)
    return answer


def session_check(session: Session, prompt: Prompt) -> Check:
    """The session's own judgement, of the prompt and of the answer so far."""
    return lambda answer: session.judge("response") if answer else session.judge("prompt", at=prompt.end)
