"""Guard: what users hold. Load one, moderate conversations with it, chat through both paths."""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, cast, get_args, overload

from lora_guard import artifact
from lora_guard.artifact import GuardSpec
from lora_guard.conversation import Conversation, Target
from lora_guard.engine.session import Engine, Session
from lora_guard.engine.stream import ChatEnd, Check, StreamSettings, moderated
from lora_guard.errors import ArtifactError, ConfigError, InputError, allowed
from lora_guard.normalise import forms
from lora_guard.progress import in_wholes
from lora_guard.taxonomy import Taxonomy
from lora_guard.verdict import GuardLogits, Verdict

if TYPE_CHECKING:
    from lora_guard.token_head import TokenHead  # numpy comes with the engines

SHIPPED = {"default": "smollm2-135m-alora", "commercial": "smollm2-135m-commercial"}
"""The guards in the package, by what callers name them; the second is for commercial use too."""

EngineName = Literal["torch", "llama-cpp"]
ENGINES: tuple[str, ...] = get_args(EngineName)


class Guard:
    """A chat model and the guard on it.

    Args:
        spec: what the guard is: base, taxonomy, calibration.
        engine: runs both paths; several guards may share one.
        parameters: of adapter and heads on features, which are held in memory beside the chat model, if that is known.
        base_fingerprint: of the chat model's weights, if they may be others than those the guard was trained on.
        policy: whose thresholds decide; the guard's default policy when absent.
        token_head: has its part in the score of a prompt; given where ``spec`` says that there is one.

    Raises:
        ConfigError: the guard has no such policy, or has a token head that was not given.
    """

    def __init__(
        self,
        spec: GuardSpec,
        engine: Engine,
        parameters: int | None = None,
        base_fingerprint: str | None = None,
        *,
        policy: str | None = None,
        token_head: "TokenHead | None" = None,
    ) -> None:
        if spec.token_head and token_head is None:
            raise ConfigError(f"guard {spec.name!r} has a token head; allowed: with it (token_head=guard.token_head)")
        self.spec = spec
        self.engine = engine
        self.token_head = token_head
        self.parameters = parameters
        if parameters is not None and token_head is not None:
            self.parameters = parameters + token_head.weight.size
        self.base_fingerprint = base_fingerprint or spec.base.fingerprint
        self.policy = spec.calibration.policy(policy)
        self.taxonomy = Taxonomy.from_dict(spec.taxonomy)

    @classmethod
    def load(
        cls,
        guard: str | Path = "default",
        *,
        on: "Guard | None" = None,
        base: str | None = None,
        allow_other_base: bool = False,
        engine: EngineName = "torch",
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        device: str | None = None,
        bulk: bool = False,
        policy: str | None = None,
    ) -> Self:
        """Load a guard and the chat model it was trained for.

        Args:
            guard: ``default`` or ``commercial``, which ship in the package, a guard or run folder, a bundle for
                llama.cpp, or a hub id.
            on: a guard on the torch engine whose chat model this one shares; it may be at work meanwhile.
            base: another place of the base model than the guard names: a hub id, a folder or a .gguf file.
            allow_other_base: accept a base whose weights differ from those the guard was trained on; scores then mean
                little without a new calibration.
            engine: ``torch``, or ``llama-cpp`` (the extra ``device``): the chat model is a .gguf file, often quantised,
                and neither torch nor a conversion is needed.
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
            InputError: an unknown engine, or a setting that it does not have, or that contradicts ``on``.
            ModelError: the base model cannot be loaded, or the engine is not installed.
        """
        from lora_guard import token_head

        folder = find(guard)
        spec = artifact.read_spec(folder)
        spec.calibration.policy(policy)  # a mistyped name is found before the base is loaded
        tokens = token_head.read(folder, spec)
        if engine_name(engine) == "llama-cpp":
            if on is not None:
                raise InputError("guards share a chat model on the torch engine alone; allowed: engine 'torch'")
            if device is not None or bulk or precision != "auto":
                raise InputError(
                    "precision, device and bulk belong to the torch engine; allowed: engine 'torch' for them"
                )
            from lora_guard.engine import device_guard

            device_loaded = device_guard.load(folder, base=base, allow_other_base=allow_other_base)
            return cls(*device_loaded, policy=policy, token_head=tokens)
        from lora_guard.engine import torch_engine, torch_guard

        shared = None if on is None else on.engine
        if shared is not None and not isinstance(shared, torch_engine.TorchEngine):
            raise InputError("the guard to share a chat model with is not on the torch engine; allowed: one that is")
        if shared is not None and (base is not None or device is not None or bulk):
            raise InputError(
                "the chat model is in memory already; allowed beside another guard: no base, device or bulk"
            )
        loaded = torch_guard.load(
            folder,
            on=shared,
            base=base,
            allow_other_base=allow_other_base,
            precision=precision,
            device=device,
            bulk=bulk,
        )
        return cls(*loaded, policy=policy, token_head=tokens)

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
        """What :meth:`moderate` decides on: the heads' outputs before calibration, the token head's part added.

        Where normalising changes the text (:mod:`lora_guard.normalise`), both forms are judged and the higher logits
        count.

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
        groups = [
            forms(conversation.up_to(judged)) for conversation, judged in zip(conversations, targets, strict=True)
        ]
        rows = [(form, judged) for group, judged in zip(groups, targets, strict=True) for form in group]
        counted = in_wholes(done, len(groups), len(rows))
        logits = iter(self.engine.score([form for form, _ in rows], [judged for _, judged in rows], done=counted))
        found = [reduce(GuardLogits.or_higher, islice(logits, len(group))) for group in groups]
        return [self.with_tokens(*judged) for judged in zip(found, conversations, targets, strict=True)]

    def with_tokens(self, logits: GuardLogits, conversation: Conversation, target: Target) -> GuardLogits:
        """What an engine made of a conversation, with the part that the token head has in a prompt's score.

        Raises:
            InputError: the conversation has no prompt to judge.
        """
        if self.token_head is None or target == "response":
            return logits
        part = self.token_head.part(self.engine.renderer, conversation.up_to("prompt").messages[-1].content)
        return logits._replace(harmful=logits.harmful + part)

    def verdict(self, logits: GuardLogits, target: Target) -> Verdict:
        """Apply the saved calibration and the policy's thresholds to a judgement.

        One of a prompt by :meth:`Session.judge` goes through :meth:`with_tokens` before.
        """
        return self.spec.calibration.verdict(logits, target, self.policy)

    def chat_verdict(self, conversation: Conversation) -> Callable[[GuardLogits, Target], Verdict]:
        """:meth:`verdict` for the checks of a chat, which read what the chat holds: the conversation as it came.

        Where normalising changes the conversation, a verdict on the prompt takes a pass over its normalised form too,
        and the higher logits count. The answer is judged as it is.

        Raises:
            InputError: the conversation has no prompt.
        """
        normalised = forms(conversation.up_to("prompt"))[1:]

        def verdict(logits: GuardLogits, target: Target) -> Verdict:
            if target == "prompt" and normalised:
                (found,) = self.engine.score(normalised, ["prompt"])
                logits = logits.or_higher(found)
            return self.verdict(self.with_tokens(logits, conversation, target), target)

        return verdict

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
            self.chat_verdict(conversation),
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


def engine_name(name: str) -> EngineName:
    """The engine of that name.

    Raises:
        InputError: there is none.
    """
    if name not in ENGINES:
        raise InputError(f"engine {name!r} is unknown; {allowed(name, ENGINES)}")
    return cast(EngineName, name)


def find(guard: str | Path) -> Path:
    """The folder of a guard: ``default``, ``commercial``, a guard or run folder, or a hub id.

    Raises:
        ArtifactError: there is none.
    """
    if str(guard) in SHIPPED:
        return Path(__file__).parent / "guards" / SHIPPED[str(guard)]
    folder = Path(guard)
    if folder.is_dir():
        run = folder / "guard"  # a training run keeps its guard there
        return run if (run / artifact.SPEC_FILE).is_file() and not (folder / artifact.SPEC_FILE).is_file() else folder
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "adapter.gguf", "*.md", "LICENSE"]
        return Path(snapshot_download(str(guard), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        # The hub refuses what cannot be an id with a ValueError: it was meant for a path.
        reason = "no such folder" if isinstance(error, ValueError) else str(error).splitlines()[0]
        raise ArtifactError(
            f"guard {str(guard)!r} not found: {reason}; allowed: {', '.join(SHIPPED)}, a folder, a hub id"
        ) from error
