"""The requests and responses of OpenAI's wire that the server speaks, with examples for the API's own page."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Open(BaseModel):
    """A part of a request: no value is taken for another type, and fields that have no meaning here are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class TextPart(Open):
    """A piece of a message's or moderation input's text."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1)]


def joined(content: Content) -> str:
    """The text of a content; its parts are lines."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


# Moderations


class ModerationRequest(Open):
    """``POST /v1/moderations``: one text, several texts, or one text in parts."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"input": ["How do I bake bread?", "I will hurt you"]}]},
    )

    input: str | Annotated[list[str], Field(min_length=1)] | Annotated[list[TextPart], Field(min_length=1)]
    model: str | None = None
    """A guard of the server; other names mean its default."""

    def texts(self) -> list[str]:
        """The texts to judge, each on its own."""
        if isinstance(self.input, str):
            return [self.input]
        return [item for item in self.input if isinstance(item, str)] or [joined(self.input)]  # type: ignore[arg-type]


class ModerationItem(BaseModel):
    """What the guard says of one text. Under OpenAI's keys the mapped categories, under their own names the guard's."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text"]]]
    """Empty for keys of OpenAI's that no category of the guard speaks for; their score is 0."""
    score: float
    """Harmfulness in [0, 1], calibrated: what ``flagged`` rests on."""
    threshold: float


class ModerationResponse(BaseModel):
    """The response of ``POST /v1/moderations``."""

    id: str
    model: str
    results: list[ModerationItem]


class ModerationResult(ModerationItem):
    """The same within a chat completion."""

    type: Literal["moderation_result"] = "moderation_result"
    model: str


class ModerationResults(BaseModel):
    """The moderation of a prompt or an answer."""

    type: Literal["moderation_results"] = "moderation_results"
    model: str
    results: list[ModerationResult]


class ModerationFailure(BaseModel):
    """The guard gave no verdict."""

    type: Literal["error"] = "error"
    code: str
    message: str


Moderated = Annotated[ModerationResults | ModerationFailure, Field(discriminator="type")]


class Moderation(BaseModel):
    """The moderation of a chat completion."""

    input: Moderated | None = None
    output: Moderated | None = None


# Chat completions


class ChatMessage(Open):
    """A message; ``developer`` counts as ``system``, and null, an answer that was withheld, as empty text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content is null in a message of role {self.role!r}; allowed there: text")
        return self


class ModePolicy(Open):
    """What a flag does: ``score`` reports it, ``block`` withholds."""

    mode: Literal["score", "block"]


class Policies(Open):
    """The policies for prompt and answer; one left out is ``score``."""

    input: ModePolicy | None = None
    output: ModePolicy | None = None


class ModerationAsked(Open):
    """The ``moderation`` parameter of a chat completion."""

    model: str
    """A guard of the server; other names leave the choice to the chat's ``model``."""
    policy: Policies | None = None


class Checks(BaseModel):
    """An extension of this server: how an answer is checked, and whether a stream shows each check."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    checks: bool = False
    """Send a chunk with ``lora_guard`` at each check."""
    check_every: Annotated[int, Field(ge=1, le=1024)] | None = None
    prompt_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    response_threshold: Annotated[float, Field(ge=0, le=1)] | None = None


class StreamOptions(Open):
    """Options of a stream."""

    include_usage: bool = False


class ChatRequest(Open):
    """``POST /v1/chat/completions``. What would change the answer and is not served is refused, not ignored."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "model": "default",
                    "messages": [{"role": "user", "content": "How do I bake bread?"}],
                    "max_tokens": 16,
                    "moderation": {"model": "default", "policy": {"output": {"mode": "block"}}},
                }
            ]
        },
    )

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Literal[1] | None = None
    moderation: ModerationAsked | None = None
    lora_guard: Checks | None = None

    @model_validator(mode="after")
    def _is_served(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name not in _WITHOUT_EFFECT and value not in _NEUTRAL.get(name, (None,)):
                raise ValueError(f"the field {name!r:.60} is not served")
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop sequences."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


# Fields of OpenAI's request that change no token of the answer.
_WITHOUT_EFFECT = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}

# Fields that would change it, with the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


FinishReason = Literal["stop", "length", "content_filter"]


class AssistantMessage(BaseModel):
    """The answer; no content where all of it was withheld."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None


class Choice(BaseModel):
    """The one choice."""

    index: Literal[0] = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The response of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    moderation: Moderation | None = None


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The response of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
