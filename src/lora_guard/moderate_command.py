"""The two forms of ``lora-guard moderate``: one text, or rows from and to files or standard streams."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from lora_guard import files
from lora_guard.conversation import TARGETS, Conversation, Target
from lora_guard.data.sources import read_rows
from lora_guard.errors import DataError, InputError, allowed
from lora_guard.guard import Guard
from lora_guard.moderate_file import moderate_file, moderate_stream, stream_rows
from lora_guard.terminal import verdict_table


def moderate_one(
    load: Callable[[], Guard], prompt: str, response: str | None, target: str | None, *, as_json: bool
) -> None:
    """Judge one text and print its verdict; the guard is loaded once the words of the call are found right."""
    conversation = Conversation.of(prompt, response)
    judged = conversation.up_to(_target(target) or conversation.target)
    verdict = load().moderate(judged)
    if as_json:
        print(json.dumps(verdict.to_dict()))
    else:
        text = " ".join(judged.messages[-1].content.split())
        Console(emoji=False).print(verdict_table([(text if len(text) <= 40 else text[:39] + "…", verdict)]))


def moderate_many(load: Callable[[], Guard], source: str, output: str, target: str | None) -> None:
    """Judge rows; ``-`` is stdin or stdout. Between two files the work is resumable."""
    checked = _target(target)
    path = Path(source)
    if source != "-" and not path.is_file():
        raise DataError(f"input {source!r} not found; allowed: a JSONL file, or - for stdin")
    if source != "-" and output != "-":
        if Path(output).exists() and path.samefile(output):
            raise InputError(f"input and output are the same file {source!r}; allowed: two files")
        moderate_file(load(), path, Path(output), checked)
        return
    if output != "-" and Path(output).exists():
        raise InputError(f"output {output!r} exists, and what comes from stdin cannot be resumed; allowed: a new file")
    guard = load()
    rows = stream_rows(sys.stdin.buffer, "stdin") if source == "-" else read_rows(path)
    if output == "-":
        moderate_stream(guard, rows, sys.stdout, checked)
    else:
        with files.writing(Path(output)), Path(output).open("x", encoding="utf-8") as written:
            moderate_stream(guard, rows, written, checked)


def _target(target: str | None) -> Target | None:
    if target is not None and target not in TARGETS:
        raise InputError(f"target {target!r} is unknown; {allowed(target, TARGETS)}")
    return target
