"""A plain LoRA guard in PEFT's form for sequence classification, which PEFT and vLLM's pooling runner read.

::

    adapter_config.json         PEFT's, with task type SEQ_CLS and ``score`` among the modules to save
    adapter_model.safetensors   the adapter in bf16, and ``score``: the heads' weight [1 + K, hidden] in fp32
    guard.json                  as in a guard folder, with form "peft-seqcls"
    test_vectors.safetensors    token ids and the logits that ``score`` gives for them (see export/vectors.py)
    README.md

``score`` has no bias in that form: the calibration in ``guard.json`` takes it in, and these logits as they are.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import numpy as safetensors_numpy
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lora_guard import artifact, files
from lora_guard.artifact import Artifact
from lora_guard.errors import ArtifactError
from lora_guard.verdict import Calibration, TargetCalibration

SCORE = "base_model.model.score.weight"
VECTORS_FILE = "test_vectors.safetensors"
_PREFIX = "base_model.model."


def check(guard: Artifact, model: PreTrainedModel) -> None:
    """Refuse a guard that this form has no place for.

    Args:
        guard: the guard that was read.
        model: its chat model.

    Raises:
        ArtifactError: why.
    """
    spec = guard.spec
    if spec.adapter != "lora":
        raise ArtifactError(
            f"{guard.folder} has adapter {spec.adapter!r}; allowed for peft-seqcls: 'lora', for every token of a "
            "request passes the adapter there"
        )
    if spec.token_head:
        raise ArtifactError(
            f"{guard.folder} has a token head, for which peft-seqcls has no place; allowed: the guard before "
            "'calibrate --learn-tokens'"
        )
    if not spec.heads.harmful and spec.heads.bias:
        raise ArtifactError(
            f"{guard.folder} takes the highest category, biases included; allowed for peft-seqcls: an output for "
            "harmfulness, or heads without bias"
        )
    kind = model.config.model_type
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(model.config)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ArtifactError(f"models of type {kind!r} have no form for sequence classification") from error
    modules = {name for name, _ in classifier.named_modules()}
    adapted = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in guard.adapter}
    missing = sorted({*adapted, "score"} - modules)
    if missing:
        raise ArtifactError(f"models of type {kind!r} for sequence classification have no module {missing[0]!r}")


def write(folder: Path, guard: Artifact, *, vectors: dict[str, NDArray[Any]], card: str) -> None:
    """Write the form in one step.

    Args:
        folder: replaced if it exists.
        guard: the guard that was read and :func:`check` let pass.
        vectors: of :func:`lora_guard.export.vectors.vectors`.
        card: contents of ``README.md``.

    Raises:
        ArtifactError: a file of the guard is missing or corrupted.
        ResourceError: no disk space.
    """
    config = json.loads((guard.folder / artifact.CONFIG_FILE).read_text("utf-8"))
    config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    weight, bias = guard.heads["weight"], guard.heads.get("bias")
    kept = {name: vectors[name] for name in ("ids", "lengths", "responses")}
    logits = vectors["logits"][:, 0 if guard.spec.heads.harmful else 1 :]  # without the maximum, which ``score`` lacks
    if bias is not None:
        logits = logits - bias.numpy()
    contents = {
        artifact.CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        artifact.WEIGHTS_FILE: save(guard.adapter | {SCORE: weight}, metadata={"format": "pt"}),
        VECTORS_FILE: safetensors_numpy.save({**kept, "logits": logits}),
    }
    spec = guard.spec.model_copy(
        update={
            "form": "peft-seqcls",
            "heads": guard.spec.heads.model_copy(update={"bias": False}),
            "calibration": without_bias(guard.spec.calibration, bias),
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        }
    )
    if (guard.folder / artifact.LICENCE_FILE).is_file():
        contents[artifact.LICENCE_FILE] = (guard.folder / artifact.LICENCE_FILE).read_bytes()
    contents[artifact.SPEC_FILE] = (spec.model_dump_json(indent=2) + "\n").encode()
    contents[artifact.CARD_FILE] = card.encode()
    with files.new_folder(folder) as temporary:
        for name, data in contents.items():
            files.write_bytes(temporary / name, data)


def without_bias(calibration: Calibration, bias: Tensor | None) -> Calibration:
    """The calibration that gives the same scores for logits from which the heads' bias ``[1 + K]`` is left out."""
    if bias is None:
        return calibration

    def moved(part: TargetCalibration) -> TargetCalibration:
        heads = [
            head.model_copy(update={"bias": head.bias + value / head.temperature})
            for head, value in zip(part.heads, bias.tolist(), strict=True)
        ]
        return TargetCalibration(harmful=heads[0], categories=dict(zip(part.categories, heads[1:], strict=True)))

    return calibration.model_copy(update={"prompt": moved(calibration.prompt), "response": moved(calibration.response)})
