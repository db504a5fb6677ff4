"""What is judged: chat messages, and whether the prompt or the response is the target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

from lora_guard.errors import InputError, allowed

Role = Literal["system", "user", "assistant"]
Target = Literal["prompt", "response"]

ROLES: tuple[str, ...] = get_args(Role)
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn. Any string is a valid content, the empty one too; lone surrogates become U+FFFD.

    Raises:
        InputError: a role outside ``ROLES`` or a content that is not a string.
    """

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InputError(f"message role {self.role!r} is unknown; {allowed(self.role, ROLES)}")
        if not isinstance(self.content, str):
            raise InputError(
                f"{self.role} message has content of type {type(self.content).__name__}; "
                "allowed: a string (use '' for an empty message)"
            )
        object.__setattr__(self, "content", valid_unicode(self.content))


@dataclass(frozen=True, slots=True)
class Conversation:
    """A non-empty sequence of messages.

    Raises:
        InputError: no message at all.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        if not self.messages:
            raise InputError("conversation is empty; allowed: at least one message")

    @classmethod
    def of(cls, prompt: str, response: str | None = None, *, system: str | None = None) -> Self:
        """A single exchange: ``Conversation.of("How do I bake bread?", "Mix flour and water.")``."""
        messages = [Message("user", prompt)]
        if system is not None:
            messages.insert(0, Message("system", system))
        if response is not None:
            messages.append(Message("assistant", response))
        return cls(tuple(messages))

    @classmethod
    def from_messages(cls, messages: Sequence[Mapping[str, str]]) -> Self:
        """From the ``[{"role": …, "content": …}]`` form of chat APIs.

        Raises:
            InputError: a message without ``role`` or ``content``, or with a bad value.
        """
        built = []
        for index, message in enumerate(messages):
            missing = {"role", "content"} - set(message)
            if missing:
                raise InputError(f"message {index} lacks {', '.join(sorted(missing))}; needed: role, content")
            built.append(Message(message["role"], message["content"]))  # type: ignore[arg-type]
        return cls(tuple(built))

    @property
    def target(self) -> Target:
        """What is judged unless the caller says otherwise: the last message that is not a system turn."""
        return "response" if self.messages[-1].role == "assistant" else "prompt"

    def up_to(self, target: Target) -> "Conversation":
        """The conversation that ends with the target's last message.

        Raises:
            InputError: it holds no message of that kind.
        """
        if target not in TARGETS:
            raise InputError(f"target {target!r} is unknown; {allowed(target, TARGETS)}")
        role = "assistant" if target == "response" else "user"
        for index in range(len(self.messages) - 1, -1, -1):
            if self.messages[index].role == role:
                return Conversation(self.messages[: index + 1])
        raise InputError(f"target {target!r} needs a message of role {role!r}; the conversation has none")

    def with_message(self, role: Role, content: str) -> "Conversation":
        """The conversation with one more message at its end."""
        return Conversation((*self.messages, Message(role, content)))


def valid_unicode(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates, which no tokenizer accepts, by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
