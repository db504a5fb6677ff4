"""What a person sees: verdict tables and the terminal conversation."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from lora_guard.conversation import Conversation, Message
from lora_guard.guard import ChatEnd, Guard
from lora_guard.verdict import Verdict


_SHOWN = 3
"""Categories named of one verdict."""


def verdict_table(rows: Sequence[tuple[str, Verdict]]) -> Table:
    """A table of labelled verdicts: flag, score against threshold, and the flagged or highest categories."""
    table = Table(
        Column("text", no_wrap=True, max_width=28),
        "target",
        "verdict",
        "score",
        Column("threshold", overflow="fold"),
        Column("categories", overflow="fold"),
    )
    for label, verdict in rows:
        flag = "[red]flagged[/red]" if verdict.flagged else "[green]ok[/green]"
        windows = f" ({verdict.windows} windows)" if verdict.windows > 1 else ""
        figures = (f"{verdict.score:.3f}{windows}", f"{verdict.threshold:.3f}")
        table.add_row(escape(label), verdict.target, flag, *figures, escape(categories_text(verdict)))
    return table


def categories_text(verdict: Verdict) -> str:
    """The highest flagged categories and how many more there are; none of a text that is not flagged itself."""
    ordered = sorted(verdict.categories.items(), key=lambda item: item[1].score, reverse=True)
    flagged = [f"{name} {decision.score:.2f}" for name, decision in ordered if decision.flagged]
    if not flagged or not verdict.flagged:
        return "–"
    more = f"; {len(flagged) - _SHOWN} more" if len(flagged) > _SHOWN else ""
    return "; ".join(flagged[:_SHOWN]) + more


def verdict_line(verdict: Verdict) -> str:
    """One line on one verdict, in rich markup."""
    flag = "[red]flagged[/red]" if verdict.flagged else "[green]ok[/green]"
    score = f"{verdict.score:.3f} against {verdict.threshold:.3f}"
    return f"[dim]{verdict.target}:[/dim] {flag} [dim]{score}, {escape(categories_text(verdict))}[/dim]"


def converse(
    guard: Guard, *, system: str | None, block: bool, max_tokens: int, temperature: float, top_p: float, seed: int
) -> None:
    """A conversation on the terminal, until end of input. Text streams as it is generated; the verdicts follow."""
    console = Console(highlight=False, soft_wrap=True)
    history: tuple[Message, ...] = (Message("system", system),) if system else ()
    interactive = console.is_terminal
    if interactive:
        console.print("[dim]Write a message; Ctrl-D ends.[/dim]")
    while True:
        try:
            text = console.input("[bold]> [/bold]" if interactive else "")
        except EOFError:
            return
        if not text.strip():
            continue
        asked = Conversation((*history, Message("user", text)))
        settings = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "block": block}
        end = answer(console, guard, asked, **settings)
        history = asked.messages
        if end.response is not None:
            history = asked.with_message("assistant", end.response).messages
        else:
            history = asked.messages[:-1]  # what was withheld is not part of the conversation


def answer(console: Console, guard: Guard, conversation: Conversation, **settings: object) -> ChatEnd:
    """Print one answer as it comes, and its verdicts."""
    for item in guard.chat(conversation, **settings):  # type: ignore[arg-type]
        if isinstance(item, ChatEnd):
            console.print()
            if item.finish_reason == "content_filter":
                what = "prompt" if item.response_verdict is None else "answer"
                console.print(f"[yellow]withheld: the {what} was flagged[/yellow]")
            for verdict in (item.prompt_verdict, item.response_verdict):
                if verdict is not None:
                    console.print(verdict_line(verdict))
            return item
        console.print(item, end="", markup=False)
    raise AssertionError("a chat ends with a ChatEnd")
