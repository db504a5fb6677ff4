"""One process of bench device: chats on one of its sides, then prints its own peak as JSON; it imports no torch."""

import json
import os
import sys
from pathlib import Path

from lora_guard.bench.chat import prompt_of, stream
from lora_guard.bench.device_chat import bare, checks
from lora_guard.bench.peak import peak
from lora_guard.bench.rows import EVAL_FILE, read_rows
from lora_guard.guard import Guard
from lora_guard.process_memory import suit_llama_cpp

PROMPT_TOKENS = 128
ANSWER_TOKENS = 64
ROWS = 16


def main(side: str, guard: str, file: str, copy: str, seed: str, data: str | None = None) -> None:
    """Chat on a side (``alone``, ``ours`` or ``second``) with the model in ``file``; ``copy`` is a second guard's."""
    suit_llama_cpp(os.environ)  # as a guard does when it is loaded: without, a side keeps blocks that the other frees
    examples = read_rows(None if data is None else Path(data), EVAL_FILE, ROWS, int(seed)).examples
    engine = Guard.load(guard, engine="llama-cpp", base=file).engine if side == "ours" else bare(Path(file))
    prompt = prompt_of(engine.renderer, examples, PROMPT_TOKENS)
    session = engine.session(seed=int(seed))
    second = bare(Path(copy)) if side == "second" else None
    stream(session, prompt, ANSWER_TOKENS, checks(side, session, prompt, second))
    print(json.dumps({"peak": peak()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
