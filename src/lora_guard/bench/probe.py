"""One process of bench memory: chats with or without a guard, then prints its own peak as JSON."""

import json
import sys
from pathlib import Path

from lora_guard import base_model
from lora_guard.base_model import BaseModel
from lora_guard.bench.chat import prompt_of, session_check, stream
from lora_guard.bench.dual_path import generate
from lora_guard.bench.peak import peak
from lora_guard.bench.rows import EVAL_FILE
from lora_guard.bench.setup import Setup, dtype_of
from lora_guard.conversation import Conversation

PROMPT_TOKENS = 128
ANSWER_TOKENS = 64
ROWS = 16


def main(side: str, guard: str, seed: str, data: str | None = None) -> None:
    """Chat with checks and judge (``side`` is ``guard``), or load the chat model alone and generate as much."""
    setup = Setup(guard=guard, seed=int(seed), data=None if data is None else Path(data))
    examples = setup.read_rows(EVAL_FILE, ROWS).examples
    if side == "guard":
        loaded = setup.load_guard()
        prompt = prompt_of(loaded.engine.renderer, examples, PROMPT_TOKENS)
        session = loaded.session(seed=setup.seed)
        stream(session, prompt, ANSWER_TOKENS, session_check(session, prompt))
        loaded.moderate(Conversation.of(examples[0].prompt))
        print(json.dumps({"peak": peak()}))
    else:
        base = setup.load_base()
        prompt = prompt_of(base_model.renderer(base), examples, PROMPT_TOKENS)
        generate(base, prompt, ANSWER_TOKENS)
        print(json.dumps({"peak": peak(), "parameters": _parameters(base), "dtype": dtype_of(base)}))


def _parameters(base: BaseModel) -> int:
    return sum(parameter.numel() for parameter in base.model.parameters())


if __name__ == "__main__":
    main(*sys.argv[1:])
