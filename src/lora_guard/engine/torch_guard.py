"""Puts a saved guard on a chat model in memory, as the torch engine runs it, and saves one from there."""

from pathlib import Path
from typing import Any

import torch

from lora_guard import adapter, artifact, base_model
from lora_guard.artifact import Artifact, GuardSpec
from lora_guard.engine.torch_engine import TorchEngine
from lora_guard.errors import ArtifactError
from lora_guard.heads import GuardHeads
from lora_guard.model import GuardModel, takes_bf16
from lora_guard.sharding import whole
from lora_guard.taxonomy import Taxonomy


def load(
    folder: Path,
    *,
    on: TorchEngine | None = None,
    base: str | None = None,
    allow_other_base: bool = False,
    precision: str = "auto",
    device: str | None = None,
    bulk: bool = False,
) -> tuple[GuardSpec, TorchEngine, int, str]:
    """Load a guard folder and the chat model it was trained for (see :meth:`lora_guard.guard.Guard.load`).

    With ``on`` the chat model is that engine's, and both engines go on sharing it.

    Returns:
        What the guard is, the engine, the parameters of adapter and heads, and the chat model's fingerprint.

    Raises:
        ArtifactError: the guard is missing, corrupted, or made for other weights.
        ModelError: the base model cannot be loaded.
    """
    saved = artifact.read(folder)
    spec = saved.spec
    if on is not None:
        chat_model = on.base
    else:
        chat_model = base_model.load(base or spec.base.name, revision=None if base else spec.base.revision)
    if chat_model.fingerprint != spec.base.fingerprint and not allow_other_base:
        raise ArtifactError(
            f"{saved.folder} was trained on weights {spec.base.fingerprint[:19]}… of {spec.base.name!r}, and "
            f"{chat_model.name!r} has {chat_model.fingerprint[:19]}…; allowed: the same, or --allow-other-base"
        )
    place = on.device if on is not None else torch.device(device) if device else base_model.device()
    with chat_model.lock:  # other guards on it may be at work
        model = build(chat_model, saved).to(place)
    if bulk and takes_bf16(place, precision):
        base_model.convert(chat_model.model, torch.bfloat16)  # the adapter with it: it was saved in bf16
        precision = "fp32"  # nothing is left to cast
    engine = TorchEngine(chat_model, model, invocation=spec.invocation, max_length=spec.max_length, precision=precision)
    parameters = sum(tensor.numel() for tensor in [*saved.adapter.values(), *saved.heads.values()])
    return spec, engine, parameters, chat_model.fingerprint


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
    attached: adapter.Adapter | None = None
    if spec.adapter != "none":
        named = invocation if spec.adapter == "alora" else None
        attached = adapter.attach_saved(base.model, saved.folder, saved.adapter, named)
    model = GuardModel(base.model, heads, kind=spec.adapter, invocation=invocation, attached=attached)
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
    tensors, heads = adapter.weights(model.adapter, torch.bfloat16), whole(model.heads.state_dict())
    if not main:
        return
    config: dict[str, Any] | None = None
    if model.adapter is not None:
        config = adapter.config_dict(model.adapter, spec.base.name)
    artifact.write(
        folder,
        spec,
        adapter_config=config,
        tensors=tensors,
        heads=heads,
        card=card,
        licence=licence,
    )
