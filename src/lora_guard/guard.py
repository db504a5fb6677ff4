"""Guard: what users hold. Load one, moderate conversations with it, chat through both paths."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch
from huggingface_hub import snapshot_download

from lora_guard import adapter, artifact, base_model
from lora_guard.artifact import Artifact, GuardSpec
from lora_guard.conversation import Conversation, Target
from lora_guard.engine.session import Engine, Session
from lora_guard.engine.stream import ChatEnd, Check, StreamSettings, moderated
from lora_guard.engine.torch_engine import TorchEngine
from lora_guard.errors import ArtifactError, InputError
from lora_guard.heads import GuardHeads
from lora_guard.model import GuardModel, takes_bf16
from lora_guard.sharding import whole
from lora_guard.taxonomy import Taxonomy
from lora_guard.verdict import GuardLogits, Verdict

DEFAULT_GUARD = "smollm2-135m-alora"
"""The guard that ships in the package."""


class Guard:
    """A chat model and the guard on it.

    Args:
        spec: what the guard is: base, taxonomy, calibration.
        engine: runs both paths; several guards may share one.
        policy: whose thresholds decide; the guard's default policy when absent.

    Raises:
        ConfigError: the guard has no such policy.
    """

    def __init__(self, spec: GuardSpec, engine: Engine, *, policy: str | None = None) -> None:
        self.spec = spec
        self.engine = engine
        self.policy = spec.calibration.policy(policy)
        self.taxonomy = Taxonomy.from_dict(spec.taxonomy)

    @classmethod
    def load(
        cls,
        guard: str | Path = "default",
        *,
        base: str | None = None,
        allow_other_base: bool = False,
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        device: str | None = None,
        bulk: bool = False,
        policy: str | None = None,
    ) -> Self:
        """Load a guard and the chat model it was trained for.

        Args:
            guard: ``default`` (ships in the package), a guard or run folder, or a hub id.
            base: another place of the base model than the guard names: a hub id, a folder or a .gguf file.
            allow_other_base: accept a base whose weights differ from those the guard was trained on; scores then mean
                little without a new calibration.
            precision: of :meth:`moderate`; ``auto`` takes bf16 where that is measured to be faster. A session judges in
                the dtype of the base model, whose keys and values it reads.
            device: where both paths run; the machine's fastest when absent.
            bulk: for many rows and no chat: hold the base model itself in the precision's dtype; in bf16 half the
                memory, and faster. A chat would not be that of the model as it was stored.
            policy: whose thresholds decide: ``strict``, ``balanced``, ``permissive``, or what else the guard has; its
                default policy when absent.

        Raises:
            ArtifactError: the guard is missing, corrupted, or made for other weights.
            ConfigError: the guard has no such policy.
            ModelError: the base model cannot be loaded.
        """
        saved = artifact.read(find(guard))
        spec = saved.spec
        spec.calibration.policy(policy)  # a mistyped name is found before the base model is loaded
        chat_model = base_model.load(base or spec.base.name, revision=None if base else spec.base.revision)
        if chat_model.fingerprint != spec.base.fingerprint and not allow_other_base:
            raise ArtifactError(
                f"{saved.folder} was trained on weights {spec.base.fingerprint[:19]}… of {spec.base.name!r}, and "
                f"{chat_model.name!r} has {chat_model.fingerprint[:19]}…; allowed: the same, or --allow-other-base"
            )
        place = torch.device(device) if device else base_model.device()
        model = build(chat_model, saved).to(place)
        if bulk and takes_bf16(place, precision):
            base_model.convert(chat_model.model, torch.bfloat16)  # the adapter with it: it was saved in bf16
            precision = "fp32"  # nothing is left to cast
        engine = TorchEngine(
            chat_model, model, invocation=spec.invocation, max_length=spec.max_length, precision=precision
        )
        return cls(spec, engine, policy=policy)

    @overload
    def moderate(self, conversations: Conversation, *, target: Target | None = ...) -> Verdict: ...

    @overload
    def moderate(
        self, conversations: Sequence[Conversation], *, target: Target | None = ..., done: Callable[[int], None] = ...
    ) -> list[Verdict]: ...

    def moderate(
        self,
        conversations: Conversation | Sequence[Conversation],
        *,
        target: Target | None = None,
        done: Callable[[int], None] = lambda rows: None,
    ) -> Verdict | list[Verdict]:
        """Judge a conversation, or a list of them in one go.

        Args:
            conversations: one, or several.
            target: ``prompt`` or ``response``; by default the last message decides.
            done: called with the number of conversations as they finish.

        Returns:
            A verdict, or a list in input order.

        Raises:
            InputError: a conversation has no message of the target's kind.
            ResourceError: no memory for a batch.
        """
        if isinstance(conversations, Conversation):
            return self.moderate([conversations], target=target)[0]
        rows = self.logits(conversations, target=target, done=done)
        pairs = zip(rows, conversations, strict=True)
        return [self.verdict(row, target or conversation.target) for row, conversation in pairs]

    def logits(
        self,
        conversations: Sequence[Conversation],
        *,
        target: Target | None = None,
        done: Callable[[int], None] = lambda rows: None,
    ) -> list[GuardLogits]:
        """What :meth:`moderate` decides on: the heads' outputs before calibration.

        Args:
            conversations: what to judge.
            target: ``prompt`` or ``response``; by default the last message decides.
            done: called with the number of conversations as they finish.

        Returns:
            One ``GuardLogits`` a conversation, in input order; :meth:`verdict` makes a verdict of it.

        Raises:
            InputError: a conversation has no message of the target's kind.
            ResourceError: no memory for a batch.
        """
        targets = [target or conversation.target for conversation in conversations]
        return self.engine.score(conversations, targets, done=done)

    def verdict(self, logits: GuardLogits, target: Target) -> Verdict:
        """Apply the saved calibration and the policy's thresholds to what :meth:`Session.judge` returned."""
        return self.spec.calibration.verdict(logits, target, self.policy)

    def session(self, *, seed: int = 0) -> Session:
        """A new conversation at the level of token ids (see :class:`lora_guard.engine.session.Session`)."""
        return self.engine.session(seed=seed)

    def stream(
        self,
        conversation: Conversation,
        settings: StreamSettings = StreamSettings(),  # noqa: B008 - frozen
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str | Check | ChatEnd]:
        """Answer the conversation's last prompt and check the answer meanwhile; :meth:`chat` is the short form.

        Args:
            conversation: ends with a user message.
            settings: when to check, and what a flag does.
            max_tokens: the longest answer, in tokens.
            temperature: 0 is greedy.
            top_p: nucleus sampling.
            seed: of the sampling.

        Yields:
            A :class:`Check` of the prompt; the answer's text and its checks; a :class:`ChatEnd`. Their order is that of
            :func:`lora_guard.engine.stream.moderated`.

        Raises:
            InputError: the last message is not the user's, or the context is full.
        """
        if conversation.messages[-1].role != "user":
            raise InputError("the last message must be the user's; there is nothing to answer")
        session = self.session(seed=seed)
        ids, prompt_end = self.engine.renderer.chat(conversation)
        session.append(ids)
        yield from moderated(
            self.engine,
            session,
            prompt_end,
            self.verdict,
            settings,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
        )

    def chat(
        self,
        conversation: Conversation,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        block: bool = False,
    ) -> Iterator[str | ChatEnd]:
        """:meth:`stream` without its checks: yield the answer's text as it is generated, then a :class:`ChatEnd`.

        Args:
            conversation: ends with a user message.
            max_tokens: the longest answer, in tokens.
            temperature: 0 is greedy.
            top_p: nucleus sampling.
            seed: of the sampling.
            block: do not answer a flagged prompt, yield text only once it has been judged unflagged, and end at a flag.

        Raises:
            InputError: the last message is not the user's, or the context is full.
        """
        settings = StreamSettings("block" if block else "score")
        events = self.stream(
            conversation, settings, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        for event in events:
            if not isinstance(event, Check):
                yield event


def find(guard: str | Path) -> Path:
    """The folder of a guard: ``default``, a guard or run folder, or a hub id.

    Raises:
        ArtifactError: there is none.
    """
    if str(guard) == "default":
        return Path(__file__).parent / "guards" / DEFAULT_GUARD
    folder = Path(guard)
    if folder.is_dir():
        run = folder / "guard"  # a training run keeps its guard there
        return run if (run / artifact.SPEC_FILE).is_file() and not (folder / artifact.SPEC_FILE).is_file() else folder
    try:
        return Path(snapshot_download(str(guard), allow_patterns=["*.json", "*.safetensors", "*.md", "LICENSE"]))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(
            f"guard {str(guard)!r} not found: {reason}; allowed: default, a folder, a hub id"
        ) from error


def build(base: base_model.BaseModel, saved: Artifact) -> GuardModel:
    """Attach a guard that was read to the chat model in memory.

    Raises:
        ArtifactError: its tensors do not fit the model or its own taxonomy.
    """
    spec = saved.spec
    hidden = base.model.config.get_text_config().hidden_size
    if spec.base.hidden_size != hidden:
        raise ArtifactError(f"{saved.folder} is for features of {spec.base.hidden_size}; {base.name!r} has {hidden}")
    names = Taxonomy.from_dict(spec.taxonomy).categories
    if spec.calibration.categories != names:
        raise ArtifactError(f"{saved.folder / artifact.SPEC_FILE}: calibration and taxonomy name other categories")
    heads = GuardHeads(hidden, len(names), bias=spec.heads.bias, harmful=spec.heads.harmful)
    expected = {name: tensor.shape for name, tensor in heads.state_dict().items()}
    adapter.check_tensors(saved.heads, expected, saved.folder / artifact.HEADS_FILE)
    heads.load_state_dict(saved.heads)
    invocation = base_model.renderer(base).template_ids(spec.invocation)
    if spec.adapter != "none":
        adapter.attach_saved(base.model, saved.folder, saved.adapter, invocation if spec.adapter == "alora" else None)
    model = GuardModel(base.model, heads, kind=spec.adapter, invocation=invocation)
    return model.eval().requires_grad_(False)


def save(
    model: GuardModel, spec: GuardSpec, folder: Path, *, card: str, licence: str | None = None, main: bool = True
) -> None:
    """Write the guard of a model to a folder, adapter in bf16 and heads in fp32, in one step.

    Where several processes hold the model every one of them calls this, for it gathers sharded parameters; the ``main``
    one writes.

    Raises:
        ResourceError: no disk space.
    """
    tensors, heads = adapter.weights(model.base, torch.bfloat16), whole(model.heads.state_dict())
    if not main:
        return
    config: dict[str, Any] | None = None
    if spec.adapter != "none":
        config = adapter.config_dict(model.base, spec.base.name)
    artifact.write(
        folder,
        spec,
        adapter_config=config,
        tensors=tensors,
        heads=heads,
        card=card,
        licence=licence,
    )
