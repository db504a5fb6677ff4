"""A sample answer of each route, for the API's own description; a test holds them to the routes' schemas."""

from typing import Any

_SCORES = {
    "flagged": True,
    "categories": {"violence": True, "violence,aiding_and_abetting,incitement": True, "sexual": False},
    "category_scores": {"violence": 0.71, "violence,aiding_and_abetting,incitement": 0.71, "sexual": 0.01},
    "category_applied_input_types": {"violence": ["text"], "sexual": ["text"]},
    "score": 0.62,
    "threshold": 0.4,
}

MODERATION = {"id": "modr-1f0c", "model": "default", "results": [_SCORES]}

COMPLETION = {
    "id": "chatcmpl-7a21",
    "object": "chat.completion",
    "created": 1764000000,
    "model": "default",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Mix flour, water, salt and yeast.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 37, "completion_tokens": 10, "total_tokens": 47},
    "moderation": {
        "input": {
            "type": "moderation_results",
            "model": "default",
            "results": [{**_SCORES, "type": "moderation_result", "model": "default", "flagged": False, "score": 0.03}],
        },
        "output": {"type": "error", "code": "guard_error", "message": "the guard gave no verdict"},
    },
}

STREAM = (
    'data: {"id": "chatcmpl-7a21", "object": "chat.completion.chunk", "created": 1764000000, "model": "default", '
    '"choices": [{"index": 0, "delta": {"content": "Mix flour"}, "logprobs": null, "finish_reason": null}]}\n\n'
    "data: [DONE]\n\n"
)

DETECTIONS = [
    [
        {
            "start": 0,
            "end": 15,
            "text": "I will hurt you",
            "detection_type": "harm",
            "detection": "harmful",
            "score": 0.62,
        }
    ]
]

CLASSIFIED = {
    "id": "classify-93be",
    "object": "list",
    "created": 1764000000,
    "model": "default",
    "data": [{"index": 0, "label": "harmful", "probs": [0.38, 0.62], "num_classes": 2}],
}

GUARDRAIL = {"action": "BLOCKED", "blocked_reason": "flagged as harmful with score 0.620 from 0.400 on"}

MODELS = {
    "object": "list",
    "data": [{"id": "default", "object": "model", "created": 1764000000, "owned_by": "lora-guard"}],
}

ERROR: Any = {
    "error": {
        "message": "messages: the last message must be the user's",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "invalid_value",
    }
}


def answered(sample: Any, kind: str = "application/json") -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route in OpenAPI: its answer with a sample of it."""
    return {200: {"content": {kind: {"example": sample}}}}
