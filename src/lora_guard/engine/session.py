"""The protocol every engine implements: one conversation state, two readers (the chat and the guard)."""

from collections.abc import Callable, Sequence
from typing import Protocol

from lora_guard.conversation import Conversation, Target
from lora_guard.errors import InputError
from lora_guard.render import Renderer
from lora_guard.verdict import GuardLogits


class Session(Protocol):
    """One conversation as token ids, extended by the chat and judged by the guard.

    The engine knows token ids only; :class:`lora_guard.render.Renderer` makes them from text. A judgement leaves the
    generation path bit for bit as it was: the same ``append`` and ``sample`` calls give the same tokens and logits with
    any number of judgements among them.
    """

    @property
    def position(self) -> int:
        """How many tokens the conversation holds."""
        ...

    @property
    def room(self) -> int:
        """How many more tokens the conversation can hold."""
        ...

    def append(self, token_ids: Sequence[int]) -> None:
        """Generation path: extend the conversation.

        Raises:
            InputError: the conversation would be longer than the model's context.
        """
        ...

    def sample(self, *, temperature: float = 0.0, top_p: float = 1.0) -> int:
        """Generation path: choose the next token, extend the conversation by it and return it.

        Args:
            temperature: 0 takes the likeliest token; above, logits are divided by it.
            top_p: draw from the smallest set of likeliest tokens whose probabilities reach this sum.

        Raises:
            InputError: a value outside its range, nothing appended yet, or a full context.
        """
        ...

    def judge(self, target: Target, at: int | None = None) -> GuardLogits:
        """Guard path: judge the conversation's first ``at`` tokens, all of them by default.

        ``at`` is the position after the target's last content token. Tokens behind it are not seen.

        Raises:
            InputError: ``at`` outside 1 … ``position``.
        """
        ...

    def rewind(self, position: int) -> None:
        """Forget the tokens behind ``position``.

        Raises:
            InputError: ``position`` outside 0 … the present one.
        """
        ...


class Engine(Protocol):
    """One chat model with a guard attached, from one copy of the weights."""

    @property
    def renderer(self) -> Renderer:
        """Makes this model's token ids."""
        ...

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Token ids that end an answer."""
        ...

    def session(self, *, seed: int = 0, between: Callable[[], None] | None = None) -> Session:
        """A new, empty conversation.

        Args:
            seed: drives its sampling.
            between: called now and then within the passes of its generation path, where other passes may run, of other
                sessions or of none, without a bit of this one changing.
        """
        ...

    def decode(self, sessions: Sequence[Session], *, batch: bool = False) -> None:
        """Generation path: read the last token of several sessions, so that each can sample at once.

        One after the other by default, which leaves each session bit for bit what it is alone. ``batch`` reads them in
        one pass: faster, and not bit-exact, since a matrix product of one row differs in bits from the same row in a
        batch.
        """
        ...

    def judge(self, requests: Sequence[tuple[Session, Target, int | None]]) -> list[GuardLogits]:
        """Guard path: :meth:`Session.judge` for several sessions, or several positions of them, in one pass.

        Args:
            requests: session, target and position of each judgement; None is the session's present position.

        Raises:
            InputError: a position outside its conversation.
        """
        ...

    def decoder(self) -> Callable[[int], str]:
        """A streaming detokenizer: call it with each new token id; it returns the text that became complete."""
        ...

    def score(
        self,
        conversations: Sequence[Conversation],
        targets: Sequence[Target],
        *,
        done: Callable[[int], None] = lambda rows: None,
    ) -> list[GuardLogits]:
        """Judge many conversations, results in input order; ``done`` is called with the number of rows as they finish.

        Raises:
            InputError: a conversation has no message of its target's kind.
            ResourceError: no memory for a batch.
        """
        ...

    def windows(self, conversation: Conversation, target: Target) -> list[list[int]]:
        """The token id rows that :meth:`score` reads for one conversation: several that overlap, if it is long.

        Raises:
            InputError: the conversation has no message of the target's kind.
        """
        ...

    def leave(self) -> None:
        """Give up what the engine put on the chat model; no pass of it follows. Others on that model go on."""
        ...

    def score_windows(self, rows: Sequence[Sequence[int]]) -> list[GuardLogits]:
        """Judge rows of :meth:`windows`; the highest of a conversation's rows are its logits.

        Raises:
            ResourceError: no memory for a batch.
        """
        ...


def check_room(position: int, new: int, context: int) -> None:
    """Raise :class:`InputError` unless a conversation of ``position`` tokens can take ``new`` more."""
    if position + new > context:
        raise InputError(f"the conversation would hold {position + new} tokens; allowed: {context}")


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise :class:`InputError` unless both are in their ranges."""
    if temperature < 0:
        raise InputError(f"temperature is {temperature}; allowed: 0 or more")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; allowed: above 0, up to 1")


def check_judged(target: Target, at: int | None, position: int) -> int:
    """Where a conversation of ``position`` tokens is judged; raise :class:`InputError` unless it holds that place."""
    at = position if at is None else at
    if not 1 <= at <= position:
        raise InputError(f"{target} cannot be judged at position {at}; allowed: 1 to {position}")
    return at


def check_rewind(to: int, position: int) -> None:
    """Raise :class:`InputError` unless a conversation of ``position`` tokens can be cut back to ``to``."""
    if not 0 <= to <= position:
        raise InputError(f"cannot rewind to position {to}; allowed: 0 to {position}")
