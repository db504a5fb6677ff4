"""What a person sees: verdict tables and the terminal conversation."""

import unicodedata
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from lora_guard.conversation import Conversation, Message
from lora_guard.engine.stream import ChatEnd, Check, StreamSettings
from lora_guard.errors import InputError
from lora_guard.guard import Guard
from lora_guard.verdict import Verdict

_SHOWN = 3
"""Categories named of one verdict."""


def verdict_table(rows: Sequence[tuple[str, Verdict]]) -> Table:
    """A table of labelled verdicts of one guard: flag, score and flagged categories; fits 80 columns."""
    table = Table(
        Column("text", no_wrap=True, max_width=24),
        "target",
        "verdict",
        "score",
        Column("categories", overflow="fold"),
        box=SIMPLE,
        caption=_thresholds([verdict for _, verdict in rows]),
    )
    for label, verdict in rows:
        windows = f"\n{verdict.windows} windows" if verdict.windows > 1 else ""
        score = f"{verdict.score:.3f}{windows}"
        table.add_row(
            escape(printable(label)), verdict.target, _flag(verdict), score, escape("\n".join(_categories(verdict)))
        )
    return table


def _thresholds(verdicts: Sequence[Verdict]) -> str | None:
    """From which score on a text is flagged, a target each where that differs; None without verdicts."""
    found = {verdict.target: f"{verdict.threshold:.3f}" for verdict in verdicts}
    if len(set(found.values())) > 1:
        return "flagged from: " + ", ".join(f"{target} {threshold}" for target, threshold in found.items())
    return next((f"flagged from {threshold} on" for threshold in found.values()), None)


def printable(text: str) -> str:
    """Text without control characters, which could move a terminal's cursor or rewrite what it shows.

    Blanks of other scripts and widths stay, which Python does not count as printable.
    """
    return "".join(c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" else "\ufffd" for c in text)


def verdict_line(verdict: Verdict) -> str:
    """One line on one verdict, in rich markup."""
    score = f"{verdict.score:.3f} against {verdict.threshold:.3f}"
    categories = "".join(f", {category}" for category in _categories(verdict))
    return f"[dim]{verdict.target}:[/dim] {_flag(verdict)} [dim]{score}{escape(categories)}[/dim]"


def _flag(verdict: Verdict) -> str:
    return "[red]flagged[/red]" if verdict.flagged else "[green]ok[/green]"


def _categories(verdict: Verdict) -> list[str]:
    """The highest flagged categories of a flagged text, and how many more there are."""
    ordered = sorted(verdict.categories.items(), key=lambda item: item[1].score, reverse=True)
    flagged = [f"{name.partition(',')[0]} {decision.score:.2f}" for name, decision in ordered if decision.flagged]
    if not verdict.flagged:
        return []
    return flagged[:_SHOWN] + ([f"{len(flagged) - _SHOWN} more"] if len(flagged) > _SHOWN else [])


def converse(
    guard: Guard,
    settings: StreamSettings,
    *,
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    """A conversation on the terminal, until end of input. Text streams as the settings let it; the verdicts follow."""
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    history: tuple[Message, ...] = (Message("system", system),) if system else ()
    interactive = console.is_terminal
    if interactive:
        console.print("[dim]Write a message; Ctrl-D ends.[/dim]")
    while True:
        try:
            text = console.input("[bold]> [/bold]" if interactive else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError("the message is not UTF-8; allowed: text") from error
        if not text.strip():
            continue
        asked = Conversation((*history, Message("user", text)))
        events = guard.stream(asked, settings, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        end = show_answer(console, events)
        if end.response is not None:
            history = asked.with_message("assistant", end.response).messages
        # What was withheld as a whole is not part of the conversation, and neither is its prompt.


def show_answer(console: Console, events: Iterable[str | Check | ChatEnd]) -> ChatEnd:
    """Print one answer as it comes, then what was withheld, the verdicts and how often the answer was checked."""
    checks = 0
    for event in events:
        if isinstance(event, str):
            console.print(printable(event), end="", markup=False)
        elif isinstance(event, Check):
            checks += event.verdict.target == "response"
        else:
            if event.response:
                console.print()
            if event.finish_reason == "content_filter":
                console.print(f"[yellow]withheld: {_withheld(event)} was flagged[/yellow]")
            if event.prompt_verdict is not None:
                console.print(verdict_line(event.prompt_verdict))
            if event.response_verdict is not None:
                times = f"{checks} check{'s' if checks > 1 else ''}"
                console.print(f"{verdict_line(event.response_verdict)}[dim], {times}[/dim]")
            return event
    raise AssertionError("a chat ends with a ChatEnd")


def _withheld(end: ChatEnd) -> str:
    if end.response_verdict is None:
        return "the prompt"
    return "the answer" if end.response is None else "the rest of the answer"
