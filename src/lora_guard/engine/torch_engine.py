"""The torch engine: generation and guard path of one transformers model, one copy of the weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedModel

from lora_guard import adapter
from lora_guard.attention import over_prefixes
from lora_guard.base_model import BaseModel, renderer
from lora_guard.conversation import Conversation, Target
from lora_guard.engine.session import Session, check_judged, check_rewind, check_room, check_sampling
from lora_guard.errors import GuardError, InputError, out_of_memory
from lora_guard.kv_cache import KVCache, Prefix, Together
from lora_guard.model import GuardModel, batched_logits
from lora_guard.progress import in_wholes
from lora_guard.render import Renderer
from lora_guard.verdict import GuardLogits


class TorchEngine:
    """Runs both paths of a :class:`GuardModel`.

    Engines of several guards may share a chat model. Its adapters' switch is state of the shared modules: every forward
    pass, of any session of any of them, runs under the chat model's lock.

    Args:
        base: the chat model.
        model: the guard on it; its adapter is attached to the same weights.
        invocation: the text that the guard reads behind a judged prefix.
        max_length: tokens of one judged window in :meth:`score`.
        precision: of :meth:`score`: ``auto``, ``fp32`` or ``bf16``; sessions judge in the base model's dtype.
        tokens_per_batch: padded tokens of one batch in :meth:`score`.
    """

    def __init__(
        self,
        base: BaseModel,
        model: GuardModel,
        *,
        invocation: str,
        max_length: int,
        precision: str = "auto",
        tokens_per_batch: int = 4096,
    ) -> None:
        self.base = base
        self.model = model.eval()
        self.renderer: Renderer = renderer(base)
        self.stop_tokens = base.stop_tokens
        self.invocation = invocation
        self.max_length = max_length
        self._precision = precision
        self._tokens_per_batch = tokens_per_batch
        self._left = False

    def session(self, *, seed: int = 0, between: Callable[[], None] | None = None) -> "TorchSession":
        """A new, empty conversation (see :class:`lora_guard.engine.session.Engine`)."""
        return TorchSession(self, seed, between)

    def decoder(self) -> Callable[[int], str]:
        """A streaming detokenizer; control tokens yield no text, an unfinished UTF-8 sequence yields none yet."""
        stream = DecodeStream(skip_special_tokens=True)
        tokenizer = self.base.tokenizer.backend_tokenizer
        return lambda token: stream.step(tokenizer, token) or ""

    def score(
        self,
        conversations: Sequence[Conversation],
        targets: Sequence[Target],
        *,
        done: Callable[[int], None] = lambda rows: None,
    ) -> list[GuardLogits]:
        """Judge many conversations, results in input order (see :class:`lora_guard.engine.session.Engine`)."""
        windows = [self.windows(*pair) for pair in zip(conversations, targets, strict=True)]
        rows = [row for group in windows for row in group]
        logits = iter(self.guard_logits(rows, in_wholes(done, len(windows), len(rows))).tolist())
        return [GuardLogits.highest([next(logits) for _ in group]) for group in windows]

    def windows(self, conversation: Conversation, target: Target) -> list[list[int]]:
        """The token id rows that a judgement reads (see :class:`lora_guard.engine.session.Engine`)."""
        return self.renderer.judged(conversation, target, self.invocation).windows(self.max_length)

    def score_windows(self, rows: Sequence[Sequence[int]]) -> list[GuardLogits]:
        """Judge token id rows (see :class:`lora_guard.engine.session.Engine`)."""
        return [GuardLogits.highest([row]) for row in self.guard_logits(rows).tolist()]

    def guard_logits(self, rows: Sequence[Sequence[int]], done: Callable[[int], None] = lambda rows: None) -> Tensor:
        """Guard path: logits ``[rows, 1 + K]`` of token id rows that end with the invocation."""
        with self.base.lock, self._adapted():
            return batched_logits(
                self.model,
                rows,
                pad_id=self.base.pad_id,
                precision=self._precision,
                tokens_per_batch=self._tokens_per_batch,
                done=done,
            )

    def next_logits(
        self, token_ids: Sequence[int], cache: KVCache, between: Callable[[], None] | None = None
    ) -> Tensor:
        """Generation path, adapter off: extend the cache by the ids; the logits ``[vocabulary]`` behind the last.

        ``between`` is called before each decoder layer: cut there, a pass makes way for others and gives the same bits,
        which it would not if its tokens were read in several passes.
        """
        what = f"{len(token_ids)} tokens behind {cache.get_seq_length()}"
        with self._pass(adapter_on=False, what=what), _before_layers(self.model.base, between):
            ids = torch.tensor([list(token_ids)], device=self.device)
            output = self.model.base(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return cast(Tensor, output.logits[0, -1])

    def decode(self, sessions: Sequence[Session], *, batch: bool = False) -> None:
        """Generation path: read the pending tokens of several sessions (see
        :class:`lora_guard.engine.session.Engine`)."""
        waiting = [session for session in map(_torch_session, sessions) if session.pending]
        together = [session for session in waiting if batch and session.position > len(session.pending) == 1]
        for session in waiting:
            if session not in together:
                _ = session.logits
        if not together:
            return
        caches = [session.cache for session in together]
        prefixes = [cache.prefix() for cache in caches]
        with self._pass(adapter_on=False, what=f"{len(together)} decode steps"), over_prefixes(self.model.base):
            logits = self.model.base(
                input_ids=torch.tensor([session.pending for session in together], device=self.device),
                position_ids=torch.cat([prefix.positions for prefix in prefixes])[:, None],
                past_key_values=Together(caches),
                use_cache=True,
                prefixes=prefixes,
            ).logits
        for session, row in zip(together, logits[:, -1], strict=True):
            session.take(row)

    def judge(self, requests: Sequence[tuple[Session, Target, int | None]]) -> list[GuardLogits]:
        """Guard path: judge held conversations in one pass (see :class:`lora_guard.engine.session.Engine`)."""
        prefixes = [_torch_session(session).judged_prefix(target, at) for session, target, at in requests]
        with self._pass(adapter_on=True, what=f"a judgement of {len(prefixes)} conversations"):
            ids = torch.tensor([self.model.invocation] * len(prefixes), device=self.device)
            logits = self.model(ids, prefixes=prefixes)
            return [GuardLogits.highest([row]) for row in logits.tolist()]

    def extend_judged(self, token_ids: Sequence[int], cache: KVCache) -> None:
        """Guard path: extend a cache of its own by the ids, adapter on."""
        with self._pass(adapter_on=True, what=f"{len(token_ids)} judged tokens behind {cache.get_seq_length()}"):
            self.model.extend(torch.tensor([list(token_ids)], device=self.device), cache)

    def leave(self) -> None:
        """Take the adapter off the chat model (see :class:`lora_guard.engine.session.Engine`)."""
        with self.base.lock:
            if self.model.adapter is not None and not self._left:
                adapter.detach(self.model.base, self.model.adapter)
            self._left = True

    @property
    def device(self) -> torch.device:
        """Where both paths run."""
        return self.model.heads.weight.device

    @contextmanager
    def _pass(self, *, adapter_on: bool, what: str) -> Iterator[None]:
        """Hold the lock for a forward pass on one of the paths."""
        with (
            self.base.lock,
            self._adapted() if adapter_on else adapter.switched(self.model.base, None),
            torch.inference_mode(),
            out_of_memory(what),
        ):
            yield

    def _adapted(self) -> AbstractContextManager[None]:
        """The block in which this guard's adapter is on."""
        if self._left:
            raise GuardError("the guard has left the chat model; allowed: to load it again")
        return adapter.switched(self.model.base, self.model.adapter)


class TorchSession:
    """A conversation on the torch engine (see :class:`lora_guard.engine.session.Session`).

    An activated adapter reads the chat's own keys and values. A plain one has other keys and values for every token,
    and so a second cache, which grows by what was said since the last judgement.
    """

    def __init__(self, engine: TorchEngine, seed: int, between: Callable[[], None] | None) -> None:
        self._engine = engine
        self._between = between
        self.cache = KVCache(engine.model.base.config)
        self._judged = KVCache(engine.model.base.config) if engine.model.kind == "lora" else self.cache
        self._ids: list[int] = []
        self._logits: Tensor | None = None  # behind the last cached token; None while there is none
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def position(self) -> int:
        """How many tokens the conversation holds."""
        return len(self._ids)

    @property
    def logits(self) -> Tensor:
        """Next-token logits ``[vocabulary]`` of the generation path.

        Raises:
            InputError: nothing appended yet.
        """
        if not self._ids:
            raise InputError("the session is empty; append the conversation's tokens first")
        if self.pending or self._logits is None:
            self._logits = self._engine.next_logits(self.pending, self.cache, self._between)
        return self._logits

    @property
    def pending(self) -> list[int]:
        """The tokens at the conversation's end that the generation path has not read yet."""
        return self._ids[self.cache.get_seq_length() :]

    def take(self, logits: Tensor) -> None:
        """Accept the next-token logits ``[vocabulary]`` of a step that the engine took for several sessions."""
        self._logits = logits

    @property
    def room(self) -> int:
        """How many more tokens the conversation can hold."""
        return self._engine.base.context - self.position

    def append(self, token_ids: Sequence[int]) -> None:
        """Generation path: extend the conversation."""
        check_room(self.position, len(token_ids), self._engine.base.context)
        if token_ids:
            if self._ids:
                _ = self.logits  # a sampled token is read alone, whether or not a judgement comes before this call
            self._ids.extend(token_ids)
            _ = self.logits

    def sample(self, *, temperature: float = 0.0, top_p: float = 1.0) -> int:
        """Generation path: choose the next token, extend the conversation by it and return it."""
        check_sampling(temperature, top_p)
        check_room(self.position, 1, self._engine.base.context)
        token = choose(self.logits, temperature, top_p, self._generator)
        self._ids.append(token)
        return token

    def judge(self, target: Target, at: int | None = None) -> GuardLogits:
        """Guard path: judge the conversation's first ``at`` tokens; the target is told by the turn they end in."""
        return self._engine.judge([(self, target, at)])[0]

    def judged_prefix(self, target: Target, at: int | None = None) -> Prefix:
        """What a judgement at ``at`` reads: views of a cache, valid until the session goes on.

        Raises:
            InputError: ``at`` outside 1 … ``position``.
        """
        at = check_judged(target, at, self.position)
        held = self._judged.get_seq_length()
        if held < at and self._judged is self.cache:
            _ = self.logits  # the generation path reads the pending token now instead of at the next sample
        elif held < at:
            self._engine.extend_judged(self._ids[held:at], self._judged)
        return self._judged.prefix(at)

    def rewind(self, position: int) -> None:
        """Forget the tokens behind ``position``."""
        check_rewind(position, self.position)
        del self._ids[position:]
        if self.cache.get_seq_length() > position:
            # The logits behind the new last token are gone, so that token is read again.
            self.cache.truncate(max(0, position - 1))
            self._logits = None
        self._judged.truncate(position)


@contextmanager
def _before_layers(model: PreTrainedModel, call: Callable[[], None] | None) -> Iterator[None]:
    """For the block, call a function before each decoder layer of the pass; None costs nothing."""
    if call is None:
        yield
        return
    under_way = False

    def hook(*_: object) -> None:
        nonlocal under_way
        if under_way:  # a pass that the function runs goes through the same layers
            return
        under_way = True
        try:
            call()
        finally:
            under_way = False

    handles = [layer.register_forward_pre_hook(hook) for layer in cast(Any, model).get_decoder().layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _torch_session(session: Session) -> TorchSession:
    if not isinstance(session, TorchSession):
        raise InputError(f"a session of {type(session).__name__} is not the torch engine's; allowed: its own")
    return session


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """The next token from logits ``[vocabulary]``; the first of equal likeliest tokens at temperature 0."""
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    # In fp64 and below zero: no temperature makes a quotient infinite, and no top_p is rounded to nothing.
    scaled = (logits - logits.max()).double() / temperature
    probabilities, order = scaled.softmax(-1).sort(descending=True, stable=True)
    # A token is kept while the sum before it is below top_p, so the likeliest always is.
    probabilities = probabilities.where(probabilities.cumsum(-1) - probabilities < top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
