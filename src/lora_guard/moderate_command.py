"""The two forms of ``lora-guard moderate``: one text, or rows from and to files or standard streams."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import cast

from rich.console import Console

from lora_guard.conversation import TARGETS, Conversation, Target
from lora_guard.errors import DataError, InputError, allowed
from lora_guard.guard import Guard
from lora_guard.moderate_file import moderate_file, moderate_stream
from lora_guard.terminal import verdict_table


def moderate_one(
    prompt: str,
    response: str | None,
    *,
    target: str | None,
    as_json: bool,
    guard: str,
    base: str | None,
    allow_other_base: bool,
) -> None:
    """Judge one text and print its verdict."""
    conversation = Conversation.of(prompt, response)
    judged = conversation.up_to(_target(target) or conversation.target)
    verdict = Guard.load(guard, base=base, allow_other_base=allow_other_base).moderate(judged)
    if as_json:
        print(json.dumps(verdict.to_dict()))
    else:
        text = " ".join(judged.messages[-1].content.split())
        Console().print(verdict_table([(text if len(text) <= 40 else text[:39] + "…", verdict)]))


def moderate_many(
    source: str, output: str, *, target: str | None, guard: str, base: str | None, allow_other_base: bool
) -> None:
    """Judge rows; ``-`` is stdin or stdout. Between two files the work is resumable."""
    checked = _target(target)
    path = Path(source)
    if source != "-" and not path.is_file():
        raise DataError(f"input {source!r} not found; allowed: a JSONL file, or - for stdin")
    if output != "-" and Path(output).exists() and source != "-" and path.samefile(output):
        raise InputError(f"input and output are the same file {source!r}; allowed: two files")
    loaded = Guard.load(guard, base=base, allow_other_base=allow_other_base)
    if source != "-" and output != "-":
        moderate_file(loaded, path, Path(output), checked)
        return
    with (
        nullcontext(sys.stdin) if source == "-" else path.open(encoding="utf-8") as incoming,
        nullcontext(sys.stdout) if output == "-" else Path(output).open("w", encoding="utf-8") as outgoing,
    ):
        moderate_stream(loaded, incoming, outgoing, checked)


def _target(target: str | None) -> Target | None:
    if target is not None and target not in TARGETS:
        raise InputError(f"target {target!r} is unknown; {allowed(target, TARGETS)}")
    return cast(Target | None, target)
