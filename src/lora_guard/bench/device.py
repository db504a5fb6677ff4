"""Bench device: a checked answer in llama.cpp against the same unchecked, and against a second model as the guard."""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from lora_guard.bench.chat import EVERY, prompt_of, stream
from lora_guard.bench.peak import told
from lora_guard.bench.report import Figure, Report
from lora_guard.bench.rows import EVAL_FILE
from lora_guard.bench.setup import Setup
from lora_guard.bench.timing import Timings, interleave
from lora_guard.guard import Guard
from lora_guard.progress import progress

FILE_TYPES = ("Q8_0", "Q4_1")
SIDES = ("alone", "ours", "second")
PROMPT_TOKENS = 256
ANSWER_TOKENS = 128
ROUNDS = 7
MEMORY_ROUNDS = 3
ROWS = 64


def run(
    setup: Setup,
    *,
    base: str | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
    answer_tokens: int = ANSWER_TOKENS,
    rounds: int = ROUNDS,
    memory_rounds: int = MEMORY_ROUNDS,
) -> Report:
    """Time three sides on the guard's chat model in two file types; compare the peaks of processes in the first.

    Raises:
        ModelError: the guard's base is not the default and ``base`` names no GGUF file, or llama.cpp is not installed.
        ArtifactError: the guard does not fit it.
    """
    from lora_guard.bench.device_chat import bare, checks, quantised
    from lora_guard.engine.device_guard import gguf_file

    rows = setup.read_rows(EVAL_FILE, ROWS)
    source = gguf_file(base or setup.spec.base.name)
    paths = {kind: quantised(source, kind) for kind in FILE_TYPES}
    answers: dict[str, list[int]] = {}
    sides: dict[str, Callable[[], None]] = {}
    for kind, path in paths.items():
        guard, second = Guard.load(setup.guard, engine="llama-cpp", base=str(path)), bare(path)
        prompt = prompt_of(guard.engine.renderer, rows.examples, prompt_tokens)
        for side in SIDES:

            def turn(name: str = f"{side} {kind}", side: str = side, guard=guard, second=second, prompt=prompt) -> None:  # type: ignore[no-untyped-def]
                session = guard.session(seed=setup.seed)
                answers[name] = stream(session, prompt, answer_tokens, checks(side, session, prompt, second))

            sides[f"{side} {kind}"] = turn
    timings = interleave("device", sides, rounds=rounds, deadline=setup.deadline)
    figures = _figures(timings, answer_tokens) | _memory(setup, paths[FILE_TYPES[0]], memory_rounds)
    same = all(answers[f"alone {kind}"] == answers[f"{side} {kind}"] for kind in FILE_TYPES for side in SIDES)
    notes = [
        f"prompt {prompt_tokens}, answer {answer_tokens}; checks on the prompt, every {EVERY} tokens and at the end",
        f"tokens with and without checks: {'the same' if same else 'NOT the same'}",
        *timings.notes,
    ]
    return Report("device", figures, FILE_TYPES[0], rows.source, notes)


def _figures(timings: Timings, answer_tokens: int) -> dict[str, Figure]:
    first, *others = FILE_TYPES
    figures = {
        "ours": Figure(
            f"with our checks ÷ generation alone, {first}", timings.ratios(f"ours {first}", f"alone {first}"), 1.08
        ),
        "second-model": Figure(
            f"with a second model's checks ÷ generation alone, {first}",
            timings.ratios(f"second {first}", f"alone {first}"),
        ),
    }
    for kind in others:
        for side, name in (("ours", "ours"), ("second", "second-model")):
            figures[f"{name}-{kind.lower()}"] = Figure(
                f"likewise, {kind}", timings.ratios(f"{side} {kind}", f"alone {kind}")
            )
    for kind in FILE_TYPES:
        figures[f"tokens-per-second-{kind.lower()}"] = Figure(
            f"generation alone, prompt included, {kind}",
            [answer_tokens / taken for taken in timings.seconds[f"alone {kind}"]],
        )
    return figures


def _memory(setup: Setup, path: Path, rounds: int) -> dict[str, Figure]:
    """Peaks of processes in turns; the second model lies in a file of its own, for pages of one file are shared."""
    peaks: dict[str, list[float]] = {side: [] for side in SIDES}
    data = [] if setup.data is None else [str(setup.data)]
    with TemporaryDirectory() as folder, progress("device, memory", rounds * len(SIDES), unit="processes") as tick:
        copy = shutil.copy(path, folder)
        for number in range(rounds):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                words = [side, setup.guard, str(path), str(copy), str(setup.seed), *data]
                peaks[side].append(float(told("lora_guard.bench.device_probe", words)["peak"]))
                tick(1, f"{side} {peaks[side][-1] / 1e6:,.0f} MB")
    alone = peaks["alone"]
    return {
        "memory": Figure(
            "resident peak with guard ÷ chat model alone",
            [a / b for a, b in zip(peaks["ours"], alone, strict=True)],
            1.03,
        ),
        "memory-second-model": Figure(
            "resident peak with a second model ÷ chat model alone",
            [a / b for a, b in zip(peaks["second"], alone, strict=True)],
        ),
        "alone-megabytes": Figure("resident peak of the chat model alone, MB", [value / 1e6 for value in alone]),
    }
