"""Other services' request shapes over the same guard: FMS detectors, vLLM's classification, LiteLLM's guardrail."""

import time
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Request
from pydantic import BaseModel, ConfigDict, Field

from lora_guard.conversation import Conversation
from lora_guard.serving.disconnect import unless_disconnected
from lora_guard.serving.guards import Served
from lora_guard.serving.moderations import bounded
from lora_guard.serving.samples import CLASSIFIED, DETECTIONS, GUARDRAIL, answered
from lora_guard.serving.schemas import Open
from lora_guard.serving.service import Service
from lora_guard.serving.wire import error_responses
from lora_guard.verdict import Verdict

Texts = Annotated[list[str], Field(min_length=1)]


class DetectorParams(Open):
    """Parameters of an FMS detector."""

    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """Scores from here on are detections; the guard's own thresholds when absent."""


class DetectorRequest(Open):
    """``POST /api/v1/text/contents``, as NeMo Guardrails and TrustyAI send it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"contents": ["I will hurt you"], "detector_params": {"threshold": 0.5}}]},
    )

    contents: Texts
    detector_params: DetectorParams = Field(default_factory=DetectorParams)


class Detection(BaseModel):
    """One finding on a whole content."""

    start: int
    end: int
    """Characters of the content."""
    text: str
    detection_type: Literal["harm", "harm_category"]
    detection: str
    """``harmful``, or the category's name."""
    score: float


class ClassifyRequest(Open):
    """``POST /classify``, as vLLM takes it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": ["I will hurt you"]}]})

    model: str | None = None
    input: str | Texts


class Classified(BaseModel):
    """One text's class."""

    index: int
    label: Literal["harmful", "unharmful"]
    probs: list[float]
    """Of unharmful and harmful."""
    num_classes: Literal[2] = 2


class ClassifyResponse(BaseModel):
    """The response of ``POST /classify``."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classified]


class GuardrailRequest(Open):
    """``POST /beta/litellm_basic_guardrail_api``, as LiteLLM's generic guardrail sends it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input_type": "request", "texts": ["I will hurt you"]}]})

    texts: list[str] | None = None
    """None where a call holds no text; images and tool calls are not judged."""
    input_type: Literal["request", "response"]


class GuardrailResponse(BaseModel):
    """LiteLLM's verdict: whether the call may go on."""

    action: Literal["BLOCKED", "NONE"]
    blocked_reason: str | None = None


def routes(service: Service) -> APIRouter:
    """The routes over a service."""
    router = APIRouter(responses=error_responses(400, 401, 413, 421, 429, 500, 503, 504))

    async def judged(
        request: Request, conversations: list[Conversation], model: str | None = None, *, blocks: bool = False
    ) -> tuple[Served, list[Verdict]]:
        work = service.moderate(conversations, request.state.request_id, model, blocks=blocks)
        return await unless_disconnected(request, work)

    @router.post("/api/v1/text/contents", responses=answered(DETECTIONS))
    async def text_contents(
        request: Request, body: DetectorRequest, detector_id: Annotated[str | None, Header()] = None
    ) -> list[list[Detection]]:
        """Judge each content as a prompt; a list of detections for each. The header names a guard."""
        conversations = [Conversation.of(text) for text in bounded(body.contents, service)]
        _, verdicts = await judged(request, conversations, detector_id)
        threshold = body.detector_params.threshold
        judged_texts = [conversation.messages[-1].content for conversation in conversations]  # without lone surrogates
        return [_detections(*pair, threshold) for pair in zip(judged_texts, verdicts, strict=True)]

    @router.post("/classify", responses=answered(CLASSIFIED))
    async def classify(request: Request, body: ClassifyRequest) -> ClassifyResponse:
        """Judge each text as a prompt; its class and probabilities."""
        texts = bounded([body.input] if isinstance(body.input, str) else body.input, service)
        served, verdicts = await judged(request, [Conversation.of(text) for text in texts], body.model)
        data = [
            Classified(
                index=index,
                label="harmful" if verdict.flagged else "unharmful",
                probs=[1 - verdict.score, verdict.score],
            )
            for index, verdict in enumerate(verdicts)
        ]
        created = int(time.time())
        return ClassifyResponse(id=f"classify-{uuid.uuid4().hex}", created=created, model=served.name, data=data)

    @router.post("/beta/litellm_basic_guardrail_api", responses=answered(GUARDRAIL))
    async def litellm_guardrail(request: Request, body: GuardrailRequest) -> GuardrailResponse:
        """Judge prompts before a call or answers after it; one flagged text blocks."""
        texts = bounded(body.texts or [], service)
        if not texts:
            return GuardrailResponse(action="NONE")
        is_prompt = body.input_type == "request"
        conversations = [Conversation.of(text) if is_prompt else Conversation.of("", text) for text in texts]
        _, verdicts = await judged(request, conversations, blocks=True)
        flagged = [verdict for verdict in verdicts if verdict.flagged]
        if not flagged:
            return GuardrailResponse(action="NONE")
        worst = max(flagged, key=lambda verdict: verdict.score)
        return GuardrailResponse(action="BLOCKED", blocked_reason=_reason(worst))

    return router


def _detections(text: str, verdict: Verdict, threshold: float | None) -> list[Detection]:
    found: list[dict[str, Any]] = []
    if verdict.flagged if threshold is None else verdict.score >= threshold:
        found.append({"detection_type": "harm", "detection": "harmful", "score": verdict.score})
        for name, decision in verdict.categories.items():
            if decision.flagged if threshold is None else decision.score >= threshold:
                found.append({"detection_type": "harm_category", "detection": name, "score": decision.score})
    return [Detection(start=0, end=len(text), text=text, **fields) for fields in found]


def _reason(verdict: Verdict) -> str:
    """Score and categories; nothing of the text."""
    names = [name for name, decision in verdict.categories.items() if decision.flagged]
    listed = f": {'; '.join(names)}" if names else ""
    return f"flagged as harmful with score {verdict.score:.3f} from {verdict.threshold:.3f} on{listed}"
