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
from lora_guard.verdict import Calibration, GuardLogits

Array = NDArray[Any]


def vectors(engine: TorchEngine, calibration: Calibration, more: Sequence[Conversation] = ()) -> dict[str, Array]:
    """The contents of ``test_vectors.safetensors``.

    Args:
        engine: of the guard on the model it was trained for, in fp32.
        calibration: the guard's.
        more: conversations to test with beside the package's own; their text goes into the bundle as token ids.

    Returns:
        ``ids`` of all rows one after the other, ``lengths`` [rows], ``responses`` [rows] (1 where a response is judged,
        0 where a prompt is), ``features`` [rows, hidden], ``logits`` [rows, 1 + K], ``flagged`` [rows] (1 or 0) and
        ``own`` [1], the number of leading rows that are the package's own texts.
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
    flagged = [
        calibration.verdict(GuardLogits.highest([row.tolist()]), conversation.target).flagged
        for row, conversation in zip(logits, everything, strict=True)
    ]
    return {
        "ids": np.array([token for row in rows for token in row], dtype=np.int32),
        "lengths": np.array([len(row) for row in rows], dtype=np.int32),
        "responses": np.array([conversation.target == "response" for conversation in everything], dtype=np.uint8),
        "features": features.numpy(),
        "logits": logits.numpy(),
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
