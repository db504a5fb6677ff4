"""The on-device engine: generation and guard path of one GGUF model in llama.cpp, one copy of the weights.

An activated adapter shares the conversation's cells with a second sequence, in which the invocation is read with the
adapter on and then forgotten::

    sequence 0 (chat)   ████████████████
    sequence 1 (guard)  ░░░░░░░░░░░░▓▓▓     ░ the same cells   ▓ the invocation, its own cells for one pass

A plain adapter has other keys and values for every token, and so a context of its own on the same weights.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lora_guard.conversation import Conversation, Target
from lora_guard.engine.llama_cpp import PASS_TOKENS, Adapter, Context, Model, Part, threads
from lora_guard.engine.llama_cpp_text import decoder, renderer
from lora_guard.engine.session import Session, check_judged, check_rewind, check_room, check_sampling
from lora_guard.errors import InputError
from lora_guard.render import Renderer, shared_start
from lora_guard.verdict import GuardLogits

Array = NDArray[np.float32]


class Heads:
    """Features ``[hidden]`` -> logits ``[1 + K]``, harmfulness first, in fp32.

    Args:
        weight: ``[outputs, hidden]``.
        bias: ``[outputs]``, or None.
        harmful: whether the first output is harmfulness; if not, it is the highest category.
    """

    def __init__(self, weight: Array, bias: Array | None, *, harmful: bool) -> None:
        self.weight = weight
        self.bias = bias
        self.harmful = harmful

    def __call__(self, features: Array) -> Array:
        logits = self.weight @ features
        if self.bias is not None:
            logits = logits + self.bias
        return logits if self.harmful else np.concatenate([logits.max(keepdims=True), logits])


class LlamaCppEngine:
    """Runs both paths of a model in llama.cpp; each pass, of any session, runs under one lock.

    Args:
        model: the chat model.
        adapter: the guard's, None for a guard without.
        kind: of the adapter.
        heads: map features to logits.
        invocation: the text that the guard reads behind a judged prefix.
        max_length: tokens of one judged window in :meth:`score`.
        context: tokens of a session, the invocation behind its conversation among them; their memory is taken when it
            begins.
    """

    def __init__(
        self,
        model: Model,
        adapter: Adapter | None,
        *,
        kind: Literal["lora", "alora", "none"],
        heads: Heads,
        invocation: str,
        max_length: int,
        context: int = 2048,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.kind = kind
        self.heads = heads
        self.renderer: Renderer = renderer(model)
        self.stop_tokens = model.end_tokens()
        self.invocation = self.renderer.template_ids(invocation)
        self.context = min(context, model.context) - len(self.invocation)
        """The longest conversation of a session, in tokens."""
        self.lock = threading.RLock()
        self._invocation_text = invocation
        self._max_length = max_length
        self._bulk: Context | None = None
        self._bulk_lock = threading.RLock()

    def session(self, *, seed: int = 0, between: Callable[[], None] | None = None) -> "LlamaCppSession":
        """A new, empty conversation (see :class:`lora_guard.engine.session.Engine`)."""
        return LlamaCppSession(self, seed, between)

    def decoder(self) -> Callable[[int], str]:
        """A streaming detokenizer; control tokens yield no text, an unfinished UTF-8 sequence yields none yet."""
        return decoder(self.model)

    def decode(self, sessions: Sequence[Session], *, batch: bool = False) -> None:
        """Generation path: read the last token of several sessions, one after the other.

        Each has a cache of its own, or its bits would depend on the others', so ``batch`` is not faster here.
        """
        for session in map(_own, sessions):
            if session.position:
                _ = session.logits

    def judge(self, requests: Sequence[tuple[Session, Target, int | None]]) -> list[GuardLogits]:
        """Guard path: judge held conversations, one after the other."""
        return [_own(session).judge(target, at) for session, target, at in requests]

    def score(
        self,
        conversations: Sequence[Conversation],
        targets: Sequence[Target],
        *,
        done: Callable[[int], None] = lambda rows: None,
    ) -> list[GuardLogits]:
        """Judge many conversations, results in input order (see :class:`lora_guard.engine.session.Engine`).

        As many windows as fit go into one pass.
        """
        grouped = [self.windows(*pair) for pair in zip(conversations, targets, strict=True)]
        owners = [index for index, windows in enumerate(grouped) for _ in windows]
        logits: list[list[list[float]]] = [[] for _ in grouped]
        for first, rows in self.features([window for windows in grouped for window in windows]):
            for index, row in zip(owners[first:], rows, strict=False):
                logits[index].append(self.heads(row).tolist())
            touched = set(owners[first : first + len(rows)])
            done(sum(len(logits[index]) == len(grouped[index]) for index in touched))
        return [GuardLogits.highest(rows) for rows in logits]

    def windows(self, conversation: Conversation, target: Target) -> list[list[int]]:
        """The token id rows that a judgement reads (see :class:`lora_guard.engine.session.Engine`)."""
        return self.renderer.judged(conversation, target, self._invocation_text).windows(self._max_length)

    def score_windows(self, rows: Sequence[Sequence[int]]) -> list[GuardLogits]:
        """Judge token id rows (see :class:`lora_guard.engine.session.Engine`)."""
        return [GuardLogits.highest([self.heads(row).tolist()]) for _, part in self.features(rows) for row in part]

    def leave(self) -> None:
        """Nothing to do: no other engine shares the model, and both are freed together."""

    def features(self, windows: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[Array]]]:
        """Guard path: the features ``[hidden]`` of token id rows that end with the invocation.

        What all of them begin with is read once; as many rows as fit are read together.

        Yields:
            The place of a pass's first row, and the pass's features.

        Raises:
            ResourceError: no memory.
        """
        shared = shared_start(windows, len(self.invocation)) if len(windows) > 1 else 0
        with self._bulk_lock:
            context = self._bulk = self._bulk or self._bulk_context()
            try:
                if shared:
                    with self.lock:
                        context.attach(self.adapter if self.kind == "lora" else None)
                        context.read([Part(_OPENING, 0, windows[0][:shared])])
                first = 0
                while first < len(windows):
                    batch = windows[first : first + _fitting(windows[first:], shared)]
                    with self.lock:  # a pass at a time, so that chats go on meanwhile
                        rows = self._pass(context, batch, shared)
                    yield first, rows
                    first += len(batch)
            finally:
                context.forget(_OPENING)

    def _pass(self, context: Context, windows: Sequence[Sequence[int]], shared: int) -> list[Array]:
        """The features of rows that are read together, behind their shared beginning."""
        end = len(self.invocation)
        prefixes = [Part(row, shared, ids[shared:-end]) for row, ids in enumerate(windows) if len(ids) > shared + end]
        endings = [Part(row, len(ids) - end, ids[-end:]) for row, ids in enumerate(windows)]
        try:
            for row in range(len(windows) if shared else 0):
                context.share(_OPENING, row, shared)
            context.attach(self.adapter if self.kind == "lora" else None)
            if prefixes:
                context.read(prefixes)
            context.attach(self.adapter)
            context.read(endings, features=True)
            return [context.features(row) for row in range(len(endings))]
        finally:
            for row in range(len(windows)):
                context.forget(row)

    def _bulk_context(self) -> Context:
        return Context(
            self.model,
            tokens=max(_TOKENS_AT_ONCE, self._max_length),
            sequences=_ROWS_AT_ONCE + 1,
            outputs=_ROWS_AT_ONCE * len(self.invocation),
            threads=threads(),
        )


class LlamaCppSession:
    """A conversation in llama.cpp (see :class:`lora_guard.engine.session.Session`)."""

    def __init__(self, engine: LlamaCppEngine, seed: int, between: Callable[[], None] | None) -> None:
        self._engine = engine
        self._between = between
        self._ids: list[int] = []
        self._chat = self._new_context()
        self._read = 0  # tokens of the conversation that the generation path has read
        self._guard = self._new_context() if engine.kind == "lora" else self._chat
        self._judged = 0  # likewise by a plain adapter's own context
        if engine.kind == "lora":
            self._guard.attach(engine.adapter)
        self._logits: Array | None = None  # behind the last token that was read; None while there is none
        self._random = np.random.default_rng(seed)

    @property
    def position(self) -> int:
        """How many tokens the conversation holds."""
        return len(self._ids)

    @property
    def logits(self) -> Array:
        """Next-token logits ``[vocabulary]`` of the generation path.

        Raises:
            InputError: nothing appended yet.
        """
        if not self._ids:
            raise InputError("the session is empty; append the conversation's tokens first")
        if self._logits is None or self._read < len(self._ids):
            self._logits = self._next_logits()
        return self._logits

    def _next_logits(self) -> Array:
        """Read what the generation path has not read yet, in the pieces that llama.cpp would make of it anyway."""
        while True:
            piece = self._ids[self._read : self._read + PASS_TOKENS]
            with self._engine.lock:
                self._chat.read([Part(_CHAT, self._read, piece)])
                logits = self._chat.logits()
            self._read += len(piece)
            if self._read == len(self._ids):
                return logits
            if self._between is not None:
                self._between()

    @property
    def room(self) -> int:
        """How many more tokens the conversation can hold."""
        return self._engine.context - self.position

    def append(self, token_ids: Sequence[int]) -> None:
        """Generation path: extend the conversation."""
        check_room(self.position, len(token_ids), self._engine.context)
        if token_ids:
            if self._ids:
                _ = self.logits  # a sampled token is read alone, whether or not a judgement comes before this call
            self._ids.extend(token_ids)
            _ = self.logits

    def sample(self, *, temperature: float = 0.0, top_p: float = 1.0) -> int:
        """Generation path: choose the next token, extend the conversation by it and return it."""
        check_sampling(temperature, top_p)
        check_room(self.position, 1, self._engine.context)
        token = choose(self.logits, temperature, top_p, self._random)
        self._ids.append(token)
        return token

    def judge(self, target: Target, at: int | None = None) -> GuardLogits:
        """Guard path: judge the conversation's first ``at`` tokens; the target is told by the turn they end in."""
        features = self.features(check_judged(target, at, self.position))
        return GuardLogits.highest([self._engine.heads(features).tolist()])

    def features(self, at: int) -> Array:
        """The features ``[hidden]`` of the invocation behind the first ``at`` tokens."""
        engine, shared = self._engine, self._guard is self._chat
        with engine.lock:
            if shared:
                _ = self.logits  # the generation path reads the pending token now instead of at the next sample
            elif self._judged < at:
                self._guard.read([Part(_CHAT, self._judged, self._ids[self._judged : at])])
                self._judged = at
            self._guard.share(_CHAT, _GUARD, at)
            try:
                if shared:
                    self._guard.attach(engine.adapter)
                self._guard.read([Part(_GUARD, at, engine.invocation)], features=True)
                return self._guard.features()
            finally:
                self._guard.forget(_GUARD)
                if shared:
                    self._guard.attach(None)

    def rewind(self, position: int) -> None:
        """Forget the tokens behind ``position``."""
        check_rewind(position, self.position)
        del self._ids[position:]
        with self._engine.lock:
            if self._read > position:
                # The logits behind the new last token are gone, so that token is read again.
                self._read = max(0, position - 1)
                self._chat.forget(_CHAT, self._read)
                self._logits = None
            if self._judged > position:
                self._judged = position
                self._guard.forget(_CHAT, position)

    def _new_context(self) -> Context:
        engine = self._engine
        extra = len(engine.invocation)
        return Context(
            engine.model, tokens=engine.context + extra, sequences=_SEQUENCES, outputs=extra, threads=threads()
        )


def choose(logits: Array, temperature: float, top_p: float, random: np.random.Generator) -> int:
    """The next token from logits ``[vocabulary]``; the first of equal likeliest tokens at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    below = logits[order].astype(np.float64) - logits[order[0]]
    with np.errstate(over="ignore"):  # at a temperature near 0, minus infinity is right
        probabilities = np.exp(below / temperature)
    probabilities /= probabilities.sum()
    # A token is kept while the sum before it is below top_p, so the likeliest always is.
    kept = probabilities.cumsum() - probabilities < top_p
    return int(random.choice(order[kept], p=probabilities[kept] / probabilities[kept].sum()))


_CHAT, _GUARD, _SEQUENCES = 0, 1, 2
_ROWS_AT_ONCE = 16
_OPENING = _ROWS_AT_ONCE  # the sequence behind the rows'
_TOKENS_AT_ONCE = 1024


def _fitting(windows: Sequence[Sequence[int]], shared: int) -> int:
    """How many of the first windows are read together, behind their shared beginning: one at least."""
    tokens = shared
    for number, window in enumerate(windows[:_ROWS_AT_ONCE]):
        tokens += len(window) - shared
        if number and tokens > _TOKENS_AT_ONCE:
            return number
    return min(len(windows), _ROWS_AT_ONCE)


def _own(session: Session) -> LlamaCppSession:
    if not isinstance(session, LlamaCppSession):
        raise InputError(f"a session of {type(session).__name__} is not the llama.cpp engine's; allowed: its own")
    return session
