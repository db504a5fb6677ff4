"""Test vectors of a bundle: token ids, and the features and logits that the guard's own model gives for them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lora_guard import adapter
from lora_guard.conversation import Conversation
from lora_guard.engine.torch_engine import TorchEngine
from lora_guard.export.texts import conversations
from lora_guard.model import GuardModel
from lora_guard.token_head import TokenHead
from lora_guard.verdict import Calibration, GuardLogits

Array = NDArray[Any]


def vectors(
    engine: TorchEngine,
    calibration: Calibration,
    more: Sequence[Conversation] = (),
    *,
    token_head: TokenHead | None = None,
) -> dict[str, Array]:
    """The contents of ``test_vectors.safetensors``.

    Args:
        engine: of the guard on the model it was trained for, in fp32.
        calibration: the guard's.
        more: conversations to test with beside the package's own; their text goes into the bundle as token ids.
        token_head: the guard's, if it has one.

    Returns:
        ``ids`` of all rows one after the other, ``lengths`` [rows], ``responses`` [rows] (1 where a response is judged,
        0 where a prompt is), ``features`` [rows, hidden], ``logits`` [rows, 1 + K] of these, ``token_logits`` [rows]
        (what the token head adds to the first of them), ``flagged`` [rows] (1 or 0) and ``own`` [1], the number of
        leading rows that are the package's own texts.
    """
    own = conversations()
    everything = [*own, *more]
    rows = [
        engine.renderer.judged(conversation, conversation.target, engine.invocation).windows(engine.max_length)[0]
        for conversation in everything
    ]
    with torch.inference_mode():
        features = torch.stack([_features(engine.model, row) for row in rows])
        logits = engine.model.heads(features)
    added = np.zeros(len(everything), dtype=np.float32)
    for index, conversation in enumerate(everything):
        if token_head is not None and conversation.target == "prompt":
            added[index] = token_head.part(engine.renderer, conversation.messages[-1].content)
    flagged = [
        calibration.verdict(GuardLogits.highest([[row[0] + part, *row[1:]]]), conversation.target).flagged
        for row, part, conversation in zip(logits.tolist(), added.tolist(), everything, strict=True)
    ]
    return {
        "ids": np.array([token for row in rows for token in row], dtype=np.int32),
        "lengths": np.array([len(row) for row in rows], dtype=np.int32),
        "responses": np.array([conversation.target == "response" for conversation in everything], dtype=np.uint8),
        "features": features.numpy(),
        "logits": logits.numpy(),
        "token_logits": added,
        "flagged": np.array(flagged, dtype=np.uint8),
        "own": np.array([len(own)], dtype=np.int32),
    }


def _features(model: GuardModel, row: Sequence[int]) -> torch.Tensor:
    """The features ``[hidden]`` of one row, alone and unpadded."""
    ids, end = torch.tensor([row]), len(model.invocation)
    with adapter.switched(model.base, model.adapter):
        if model.kind != "alora" or len(row) == end:
            return model.features(ids)[0]
        prefix = model.read(ids[:, :-end], torch.ones_like(ids[:, :-end]))
        return model.features_behind(ids[:, -end:], [prefix])[0]
