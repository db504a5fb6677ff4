"""The only place where a conversation becomes token ids, for training, moderation and chat alike.

A chat template, run in a sandbox, gives segments ``(text, is_control)``: template text is control, message content is
not. Each segment is encoded on its own by a function the caller gives, so this module needs neither torch nor
transformers, and no content can form a control token, alone or across a boundary.

What a guard judges, in the order of :class:`Rendered`'s fields (ChatML as the example)::

    <|im_start|>user\\n How do I …? <|im_end|>\\n<|im_start|>assistant\\n First … <|im_end|>
    └──── opening ────┘└─ context ─┘└───────────── header ──────────────┘└ target ┘└ invocation ┘
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lora_guard.conversation import Conversation, Message, Target
from lora_guard.errors import ConfigError, InputError, ModelError

RENDER_VERSION = 1
"""Saved with a guard: a guard is only read by a renderer that gives the ids it was trained on."""

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ message['role'] + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
"""For models without a chat template: role, colon, content, each turn on lines of its own."""

Encode = Callable[[str, int | None], list[int]]
"""Text, and the id that it follows (None at the beginning) -> token ids, control tokens parsed, nothing added."""


# Stands for the id of some text before a piece; no control token has it.
_TEXT = -1


class Segment(NamedTuple):
    """A run of rendered text; ``message`` is the index of the message it is the content of, None for template text."""

    text: str
    message: int | None

    @property
    def is_control(self) -> bool:
        return self.message is None


@dataclass(frozen=True, slots=True)
class Rendered:
    """A judged text as token ids, in five parts (see the module's drawing)."""

    opening: list[int]
    context: list[int]
    header: list[int]
    target: list[int]
    invocation: list[int]

    @property
    def prefix(self) -> list[int]:
        """Exactly what a chat holds up to the target's last content token."""
        return self.opening + self.context + self.header + self.target

    @property
    def ids(self) -> list[int]:
        """The prefix and the invocation; the guard reads the features of the last of them."""
        return self.prefix + self.invocation

    def windows(self, max_length: int) -> list[list[int]]:
        """Token ids of at most ``max_length`` each that together show every token; one window when all fit.

        A long target is cut in overlapping windows, each behind the end of the context. A long context is cut likewise,
        each window before the start of the target. Opening, header and invocation are in every window.

        Raises:
            ConfigError: ``max_length`` has no room beside the parts that every window needs.
        """
        if len(self.ids) <= max_length:
            return [self.ids]
        room = max_length - len(self.opening) - len(self.header) - len(self.invocation)
        if room < _MIN_ROOM:
            needed = max_length - room + _MIN_ROOM
            raise ConfigError(
                f"max_length {max_length} leaves no room beside the chat template; allowed: {needed} or more"
            )
        targets = _overlapping(self.target, max(room - len(self.context), room // 2))
        contexts = _overlapping(self.context, room - len(targets[0]))
        pairs = [(contexts[-1], target) for target in targets] + [(context, targets[0]) for context in contexts[:-1]]
        return [self.opening + context + self.header + target + self.invocation for context, target in pairs]


class Renderer:
    """Renders conversations for one chat model.

    Args:
        template: the model's chat template (jinja2).
        encode: text and the id before it -> token ids, control tokens parsed.
        control_tokens: the tokenizer's special and added tokens; message content never yields one of them.
        variables: what the template may name beside ``messages``: ``bos_token``, ``eos_token`` and the like.
        blank_begins_word: whether a blank is encoded with the word behind it alone, so that a blank at the end of
            template text belongs to the content that follows.

    Raises:
        ModelError: the template is not valid jinja2.
    """

    def __init__(
        self,
        template: str,
        encode: Encode,
        *,
        control_tokens: Collection[str],
        variables: Mapping[str, Any] | None = None,
        blank_begins_word: bool = False,
    ) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        # No strftime_now: templates that can name the date fall back to a fixed one; ids depend on the text alone.
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(_GENERATION_TAG.sub("", template))
        except TemplateError as error:
            raise ModelError(f"chat template is not valid jinja2: {error}") from error
        self._encode = encode
        self._variables = dict(variables or {})
        self._blank_begins_word = blank_begins_word
        self._template_ids: dict[tuple[str, int | None], list[int]] = {}
        tokens = sorted((re.escape(token) for token in control_tokens if token.strip()), key=len, reverse=True)
        self._control = re.compile(f"(?=(?:{'|'.join(tokens)}))") if tokens else None

    def segments(self, conversation: Conversation, *, generation_prompt: bool = False) -> list[Segment]:
        """The conversation as template text and message contents, in order; joined they are the rendered text.

        Raises:
            InputError: the template refuses the conversation.
            ModelError: it does not show each message once.
        """
        messages = conversation.messages
        marked = [{"role": message.role, "content": _mark(index)} for index, message in enumerate(messages)]
        try:
            text = self._template.render(messages=marked, add_generation_prompt=generation_prompt, **self._variables)
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise InputError(f"the chat template refuses messages of roles {roles}: {error}") from error
        segments = list(_split(text, messages))
        return list(_move_blanks(segments)) if self._blank_begins_word else segments

    def judged(self, conversation: Conversation, target: Target, invocation: str) -> Rendered:
        """What the guard reads to judge the conversation's last message of the target's kind.

        Raises:
            InputError: the conversation has no such message.
            InputError, ModelError: see :meth:`segments`.
        """
        judged = conversation.up_to(target)
        segments = self.segments(judged)
        last = len(judged.messages) - 1
        first_content = next(i for i, segment in enumerate(segments) if not segment.is_control)
        content = next(i for i, segment in enumerate(segments) if segment.message == last)
        header = content - (content > first_content and segments[content - 1].is_control)
        ids = self._ids(segments)
        return Rendered(
            opening=_joined(ids[:first_content]),
            context=_joined(ids[first_content:header]),
            header=_joined(ids[header:content]),
            target=ids[content],
            invocation=self.template_ids(invocation),
        )

    def chat(self, conversation: Conversation, *, held: int = 0) -> tuple[list[int], int]:
        """Token ids to append to a chat before the model answers, and how many of them end the prompt.

        Args:
            conversation: all messages so far; the last is the user's.
            held: how many of the messages the chat already holds, the last one up to its final content token.

        Returns:
            The ids, and the number of them up to the last content token, where the prompt is judged.
        """
        segments = self.segments(conversation, generation_prompt=True)
        if held:
            segments = segments[next(i for i, s in enumerate(segments) if s.message == held - 1) + 1 :]
        end = next(i for i, s in enumerate(segments) if s.message == len(conversation.messages) - 1) + 1
        ids = self._ids(segments, begins=not held)
        return _joined(ids), len(_joined(ids[:end]))

    @cached_property
    def end_of_turn(self) -> str:
        """The text that ends an assistant's turn, without trailing blanks; a newline if the template has no marker.

        It begins every invocation: after it the guard reads a prompt, half a response and a whole one alike.
        """
        exchange = Conversation((Message("user", ""), Message("assistant", "")))
        after = self.segments(exchange)[-1]
        return (after.text.rstrip() if after.is_control else "") or "\n"

    @cached_property
    def guard_turn(self) -> str:
        """The text between an assistant's message and a turn of role ``guard`` that follows it.

        Where the template refuses that role or does not show it: the text that begins the next user's turn.
        """
        exchange = [{"role": "user", "content": ""}, {"role": "assistant", "content": _mark(0)}]
        for role in ("guard", "user"):
            messages = [*exchange, {"role": role, "content": _mark(1)}]
            try:
                text = self._template.render(messages=messages, add_generation_prompt=False, **self._variables)
            except TemplateError:
                continue
            marks = list(_MARK.finditer(text))
            if [int(mark[2]) for mark in marks] == [0, 1]:
                return text[marks[0].end() : marks[1].start()]
        raise ModelError("the chat template shows no turn behind an answer; allowed: a guard with its own 'invocation'")

    def template_ids(self, text: str, before: int | None = _TEXT) -> list[int]:
        """Ids of template text, control tokens parsed; ``before`` is the id that it follows, some text's by default."""
        if (text, before) not in self._template_ids:
            self._template_ids[text, before] = self._encode(text, before)
        return self._template_ids[text, before]

    def content_ids(self, text: str, before: int | None = _TEXT) -> list[int]:
        """Ids of message content: a control token spelled out in it is cut after its first character and stays text."""
        matches = [] if self._control is None else self._control.finditer(text)
        cuts = [0, *(match.start() + 1 for match in matches), len(text)]
        ids: list[int] = []
        for piece in (text[start:end] for start, end in pairwise(cuts) if start < end):
            ids += self._encode(piece, _TEXT if ids else before)
        return ids

    def _ids(self, segments: Sequence[Segment], *, begins: bool = True) -> list[list[int]]:
        """The ids of each segment; ``begins`` says that the first begins the text rather than follows content."""
        before = None if begins else _TEXT
        parts: list[list[int]] = []
        for segment in segments:
            ids = (self.template_ids if segment.is_control else self.content_ids)(segment.text, before)
            parts.append(ids)
            if ids:
                before = ids[-1] if segment.is_control else _TEXT
        return parts


def shared_start(rows: Sequence[Sequence[int]], least: int) -> int:
    """How many tokens all rows begin with, leaving at least ``least`` of its own to each."""
    # What the first and the last in order share, all between them share.
    first, last = min(map(list, rows)), max(map(list, rows))
    differing = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    shortest = min(map(len, rows))
    return max(0, min(next(differing, shortest), shortest - least))


# A window with less room for text than this shows too little to be judged.
_MIN_ROOM = 16

# transformers marks the assistant's part with these tags for its loss masks; they render nothing.
_GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")

_MARK = re.compile("(\u2003?)\ue000(\\d+)\ue001(\u2003?)")


def _mark(index: int) -> str:
    """The stand-in for a message's content while the template runs; contents themselves never meet the template.

    The em spaces at its ends tell whether the template trims: it writes none itself, and a trim removes them.
    """
    return f"\u2003\ue000{index}\ue001\u2003"


def _split(text: str, messages: Sequence[Message]) -> Iterator[Segment]:
    """Cut rendered text at the marks. A template that trims a mark trims the content there too."""
    position = 0
    shown = []
    for match in _MARK.finditer(text):
        if match.start() > position:
            yield Segment(text[position : match.start()], None)
        index = int(match[2])
        content = messages[index].content
        content = content if match[1] else content.lstrip()
        yield Segment(content if match[3] else content.rstrip(), index)
        shown.append(index)
        position = match.end()
    if position < len(text):
        yield Segment(text[position:], None)
    if shown != list(range(len(messages))):
        raise ModelError("the chat template does not show each message once and in order; allowed: one that does")


def _move_blanks(segments: Sequence[Segment]) -> Iterator[Segment]:
    """Move the blanks at the end of template text to the content behind it."""
    moved = ""
    for segment, following in zip(segments, [*segments[1:], Segment("", None)], strict=True):
        text, moved = moved + segment.text, ""
        if segment.is_control and not following.is_control and following.text:
            kept = text.rstrip(" ")
            text, moved = kept, text[len(kept) :]
        yield Segment(text, segment.message)


def _joined(parts: Sequence[Sequence[int]]) -> list[int]:
    return [token for part in parts for token in part]


def _overlapping(ids: list[int], size: int) -> list[list[int]]:
    """Cut ``ids`` in pieces of ``size`` that overlap by an eighth; the last ends where ``ids`` end."""
    if len(ids) <= size:
        return [ids]
    starts = range(0, len(ids) - size, size - size // 8)
    return [ids[start : start + size] for start in starts] + [ids[-size:]]


def _raise(message: str) -> NoReturn:
    """``raise_exception`` of chat templates."""
    raise TemplateError(message)
