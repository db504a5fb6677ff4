"""Where the time of a check goes in llama.cpp: a check beside the same with a part of it left out.

    python benchmarks/device_check.py [--guard default] [--file-type Q8_0] [--rounds 20]

The sides take turns. Each is followed by a decode step, which pays for what detaching an adapter leaves to the next
pass; the step's own time is taken off, and what remains is printed in decode steps.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from lora_guard.bench.device_chat import quantised
from lora_guard.bench.timing import interleave
from lora_guard.engine.device_guard import gguf_file
from lora_guard.engine.llama_cpp import Context, Part, threads
from lora_guard.engine.llama_cpp_engine import LlamaCppEngine
from lora_guard.guard import Guard

TOKENS = 320
"""Of the conversation that is judged."""
CHAT, GUARD = 0, 1


def main() -> None:
    """Measure all sides and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guard", default="default", help="of the kind alora")
    parser.add_argument("--model", default="default", help="default or a .gguf file")
    parser.add_argument("--file-type", default="Q8_0", help="llama.cpp's, made of the model if it is another")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    file = quantised(gguf_file(arguments.model), arguments.file_type)
    shares = measure(file, arguments.guard, arguments.rounds)
    print("\n".join(f"{share:5.2f}  {side}" for side, share in shares.items()))


def measure(file: Path, guard: str, rounds: int) -> dict[str, float]:
    """Each side's time beyond the decode step that follows it, in decode steps; medians."""
    engine = Guard.load(guard, engine="llama-cpp", base=str(file)).engine
    assert isinstance(engine, LlamaCppEngine)
    step, sides = prepared(engine)

    turns: dict[str, Callable[[], object]] = {"step": step}
    turns |= {name: lambda side=side: (side(), step()) for name, side in sides.items()}
    timings = interleave("check", turns, rounds=rounds, deadline=math.inf)
    return {name: statistics.median(timings.ratios(name, "step")) - 1 for name in sides}


def prepared(engine: LlamaCppEngine) -> tuple[Callable[[], None], dict[str, Callable[[], None]]]:
    """A decode step of a chat, and its check in variants."""
    ids = (engine.renderer.template_ids("The quick brown fox jumps over the lazy dog. ") * TOKENS)[:TOKENS]
    chat, own = (
        Context(engine.model, tokens=TOKENS + 64, sequences=2, outputs=len(engine.invocation), threads=threads())
        for _ in range(2)
    )
    own.attach(engine.adapter)
    for context in (chat, own):
        context.read([Part(CHAT, 0, ids)])

    def step() -> None:
        chat.read([Part(CHAT, TOKENS, ids[:1])])
        chat.logits()
        chat.forget(CHAT, TOKENS)

    def check(
        context: Context = chat, *, tokens: int | None = None, attach: bool = True, features: bool = True
    ) -> None:
        context.share(CHAT, GUARD, TOKENS)
        if attach:
            context.attach(engine.adapter)
        context.read([Part(GUARD, TOKENS, engine.invocation[:tokens])], features=features)
        if features:
            context.features()
        context.forget(GUARD)
        if attach:
            context.attach(None)

    return step, {
        "a check: attach, the invocation, detach": check,
        "without adapter": lambda: check(attach=False),
        "without adapter, logits of one token": lambda: check(attach=False, features=False),
        "in a context of its own, where the adapter stays attached": lambda: check(own, attach=False),
        "two tokens of the invocation": lambda: check(tokens=2),
        "one token": lambda: check(tokens=1),
        "one token, without adapter, its logits alone": lambda: check(tokens=1, attach=False, features=False),
    }


if __name__ == "__main__":
    main()
