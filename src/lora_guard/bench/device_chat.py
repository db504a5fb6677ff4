"""The sides of bench device: a GGUF model that chats alone, under its guard, or beside a second model as the guard."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from lora_guard import files
from lora_guard.bench.chat import Check, Prompt, session_check
from lora_guard.default_model import cache_folder
from lora_guard.engine.llama_cpp import Model, file_type_number, quantise
from lora_guard.engine.llama_cpp_engine import Heads, LlamaCppEngine
from lora_guard.engine.session import Session


def quantised(source: Path, file_type: str) -> Path:
    """A GGUF model in a file type: the file itself if it is of that type, else made once into the user's cache.

    Raises:
        ModelError: the source cannot be read, or there is no such type.
        ResourceError: the cache cannot be written.
    """
    if Model(source).file_type == file_type_number(file_type):
        return source
    key = hashlib.sha256(f"{source} {source.stat().st_size} {source.stat().st_mtime_ns}".encode()).hexdigest()
    folder = cache_folder() / "quantised"
    path = folder / f"{source.name.partition('.')[0]}-{key[:12]}.{file_type}.gguf"
    with files.writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.is_file():
            partial = path.with_name(f".{path.name}.partial")
            quantise(source, partial, file_type)
            with files.writing(path):
                partial.rename(path)
    return path


_LONGEST = 2048  # of a text that a second guard reads


def bare(path: Path) -> LlamaCppEngine:
    """A model without guard: it chats, and its features go to a head of zeros."""
    model = Model(path)
    heads = Heads(np.zeros((1, model.hidden_size), np.float32), None, harmful=True)
    return LlamaCppEngine(model, None, kind="none", heads=heads, invocation="\n", max_length=_LONGEST)


def second_check(guard: LlamaCppEngine, prompt: Prompt) -> Check:
    """A separate guard's judgement: its own model reads the prompt, or prompt and answer, from the beginning."""

    def check(answer: Sequence[int]) -> object:
        ids = [*(prompt.ids if answer else prompt.ids[: prompt.end]), *answer, *guard.invocation]
        return [guard.heads(row) for _, rows in guard.features([ids]) for row in rows]

    return check


def checks(side: str, session: Session, prompt: Prompt, second: LlamaCppEngine | None) -> Check | None:
    """What judges the chat on a side."""
    if side == "second":
        assert second is not None
        return second_check(second, prompt)
    return session_check(session, prompt) if side == "ours" else None
