"""The torch engine: generation and guard path of one transformers model, one copy of the weights."""

import threading
from collections.abc import Callable, Sequence
from typing import cast

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import DynamicCache

from lora_guard import adapter
from lora_guard.base_model import BaseModel, renderer
from lora_guard.conversation import Conversation, Target
from lora_guard.errors import InputError, out_of_memory
from lora_guard.model import GuardModel, batched_logits
from lora_guard.render import Renderer
from lora_guard.verdict import GuardLogits


class TorchEngine:
    """Runs both paths of a :class:`GuardModel`.

    PEFT's switches are state of the shared modules: every forward pass, of any session, runs under one lock.

    Args:
        base: the chat model.
        model: the guard on it; its adapter is attached to the same weights.
        invocation: the text that the guard reads behind a judged prefix.
        max_length: tokens of one judged window in :meth:`score`.
        precision: of the guard path: ``auto``, ``fp32`` or ``bf16``.
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
        tokens_per_batch: int = 2048,
    ) -> None:
        self.base = base
        self.model = model.eval()
        self.renderer: Renderer = renderer(base)
        self.stop_tokens = base.stop_tokens
        self._invocation = invocation
        self._max_length = max_length
        self._precision = precision
        self._tokens_per_batch = tokens_per_batch
        self._lock = threading.RLock()

    def session(self, *, seed: int = 0) -> "TorchSession":
        """A new, empty conversation; ``seed`` drives its sampling."""
        return TorchSession(self, seed)

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
        windows = [
            self.renderer.judged(conversation, target, self._invocation).windows(self._max_length)
            for conversation, target in zip(conversations, targets, strict=True)
        ]
        rows = [row for group in windows for row in group]
        share = len(windows) / max(1, len(rows))
        finished = 0.0

        def progress(count: int) -> None:
            nonlocal finished
            before, finished = int(finished), finished + count * share
            done(int(finished + 1e-6) - before)

        logits = iter(self.guard_logits(rows, progress).tolist())
        return [GuardLogits.highest([next(logits) for _ in group]) for group in windows]

    def guard_logits(self, rows: Sequence[Sequence[int]], done: Callable[[int], None] = lambda rows: None) -> Tensor:
        """Guard path: logits ``[rows, 1 + K]`` of token id rows that end with the invocation."""
        with self._lock, adapter.switched(self.model.base, on=True):
            return batched_logits(
                self.model,
                rows,
                pad_id=self.base.pad_id,
                precision=self._precision,
                tokens_per_batch=self._tokens_per_batch,
                done=done,
            )

    def next_logits(self, token_ids: Sequence[int], cache: DynamicCache) -> Tensor:
        """Generation path, adapter off: extend the cache by the ids; the logits ``[vocabulary]`` behind the last."""
        device = self.model.heads.weight.device
        with (
            self._lock,
            adapter.switched(self.model.base, on=False),
            torch.inference_mode(),
            out_of_memory(f"{len(token_ids)} tokens behind {cache.get_seq_length()}"),
        ):
            ids = torch.tensor([list(token_ids)], device=device)
            output = self.model.base(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return cast(Tensor, output.logits[0, -1])

    def judged_logits(self, prefix: Sequence[int]) -> GuardLogits:
        """Guard path on a held prefix: a complete second pass over it and the invocation."""
        rows = [[*prefix, *self.renderer.template_ids(self._invocation)]]
        return GuardLogits.highest(self.guard_logits(rows).tolist())


class TorchSession:
    """A conversation on the torch engine (see :class:`lora_guard.engine.session.Session`)."""

    def __init__(self, engine: TorchEngine, seed: int) -> None:
        self._engine = engine
        self._cache = DynamicCache(config=engine.model.base.config)
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
        pending = self._ids[self._cache.get_seq_length() :]
        if pending or self._logits is None:
            self._logits = self._engine.next_logits(pending, self._cache)
        return self._logits

    def append(self, token_ids: Sequence[int]) -> None:
        """Generation path: extend the conversation."""
        limit = self._engine.base.context
        if len(self._ids) + len(token_ids) > limit:
            raise InputError(
                f"the conversation would hold {len(self._ids) + len(token_ids)} tokens; allowed: the model's {limit}"
            )
        if token_ids:
            self._ids.extend(token_ids)
            self._logits = self._engine.next_logits(self._ids[self._cache.get_seq_length() :], self._cache)

    def sample(self, *, temperature: float = 0.0, top_p: float = 1.0) -> int:
        """Generation path: choose the next token, extend the conversation by it and return it."""
        if temperature < 0:
            raise InputError(f"temperature is {temperature}; allowed: 0 or more")
        if not 0 < top_p <= 1:
            raise InputError(f"top_p is {top_p}; allowed: above 0, up to 1")
        if self.position >= self._engine.base.context:
            raise InputError(f"the context of {self._engine.base.context} tokens is full")
        token = choose(self.logits, temperature, top_p, self._generator)
        self._ids.append(token)
        return token

    def judge(self, target: Target, at: int | None = None) -> GuardLogits:
        """Guard path: judge the conversation's first ``at`` tokens; the target is told by the turn they end in."""
        at = self.position if at is None else at
        if not 1 <= at <= self.position:
            raise InputError(f"{target} cannot be judged at position {at}; allowed: 1 to {self.position}")
        return self._engine.judged_logits(self._ids[:at])

    def rewind(self, position: int) -> None:
        """Forget the tokens behind ``position``."""
        if not 0 <= position <= self.position:
            raise InputError(f"cannot rewind to position {position}; allowed: 0 to {self.position}")
        del self._ids[position:]
        if self._cache.get_seq_length() > position:
            # Not every cache layer can be cut (sliding windows): the next step computes the kept tokens again.
            self._cache = DynamicCache(config=self._engine.model.base.config)
            self._logits = None


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """The next token from logits ``[vocabulary]``; the first of equal likeliest tokens at temperature 0."""
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    # A token is kept while the sum before it is below top_p, so the likeliest always is.
    probabilities = probabilities.where(probabilities.cumsum(-1) - probabilities < top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
