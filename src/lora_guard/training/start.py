"""Begins a run with the weights of a guard: its shape for the config, its adapter and heads for the model."""

from typing import Any

import torch

from lora_guard import adapter, artifact
from lora_guard.artifact import CONFIG_FILE, HEADS_FILE, WEIGHTS_FILE, Artifact
from lora_guard.config import TrainConfig
from lora_guard.errors import ArtifactError, ConfigError
from lora_guard.guard import find
from lora_guard.heads import GuardHeads
from lora_guard.model import GuardModel
from lora_guard.taxonomy import BUILT_IN, Taxonomy

# Another value would not fit the weights, or they would mean something else by it.
_DECIDED = {
    "adapter",
    "invocation",
    "lora_r",
    "lora_alpha",
    "target_modules",
    "layers",
    "head_bias",
    "harmful_head",
}


def read(config: TrainConfig) -> tuple[TrainConfig, Artifact | None]:
    """The config as a run from ``start_from`` has it, and that guard; the config as it is where it names none.

    What the guard decides (base model, adapter, invocation, taxonomy, heads, window) is taken from it where the config
    says nothing.

    Raises:
        ArtifactError: there is no such guard, or it is corrupted.
        ConfigError: the config says something else than the guard, or no taxonomy where the guard's is not built in.
    """
    if config.start_from is None:
        return config, None
    saved = artifact.read(find(config.start_from))
    shape = _shape(saved)
    for name in sorted(_DECIDED & shape.keys() & config.model_fields_set):
        given = getattr(config, name)
        if (sorted(given) if isinstance(given, list) else given) != shape[name]:
            raise ConfigError(
                f"{name} is {given!r}, and start_from {config.start_from!r} has {shape[name]!r}; "
                f"allowed: that, or no {name}"
            )
    said = config.model_fields_set | ({"revision"} if "base_model" in config.model_fields_set else set())
    unsaid = {name: value for name, value in shape.items() if name not in said}
    if "taxonomy" not in said:
        unsaid["taxonomy"] = _built_in(Taxonomy.from_dict(saved.spec.taxonomy), config.start_from)
    return config.with_values(unsaid), saved


def fill(model: GuardModel, saved: Artifact, taxonomy: Taxonomy, fingerprint: str) -> None:
    """Give a fresh model the guard's adapter, and its heads for harmfulness and for the categories that both have.

    A category that the guard does not know keeps its fresh head.

    Args:
        model: of the shape that :func:`read` gave.
        saved: the guard.
        taxonomy: the run's.
        fingerprint: of the run's base model.

    Raises:
        ArtifactError: the guard was trained on other weights, or its tensors do not fit.
    """
    if saved.spec.base.fingerprint != fingerprint:
        raise ArtifactError(
            f"start_from {saved.folder} was trained on weights {saved.spec.base.fingerprint[:19]}… and the base model "
            f"has {fingerprint[:19]}…; allowed: the same"
        )
    expected = {} if model.adapter is None else model.adapter.parameters()
    adapter.check_tensors(saved.adapter, {n: p.shape for n, p in expected.items()}, saved.folder / WEIGHTS_FILE)
    theirs = _outputs(Taxonomy.from_dict(saved.spec.taxonomy), model.heads)
    ours = _outputs(taxonomy, model.heads)
    shapes = {name: torch.Size([len(theirs), *p.shape[1:]]) for name, p in model.heads.named_parameters()}
    adapter.check_tensors(saved.heads, shapes, saved.folder / HEADS_FILE)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(saved.adapter[name])
        for name, parameter in model.heads.named_parameters():
            for output in set(ours).intersection(theirs):
                parameter[ours.index(output)] = saved.heads[name][theirs.index(output)]


def _built_in(taxonomy: Taxonomy, start_from: str) -> str:
    """The name by which a config can name the guard's taxonomy."""
    for name in BUILT_IN:
        if Taxonomy.load(name) == taxonomy:
            return name
    raise ConfigError(
        f"start_from {start_from!r} has a taxonomy of its own, {taxonomy.name!r}, and the config names none; allowed: "
        f"taxonomy: FILE, or one of {', '.join(map(repr, BUILT_IN))}"
    )


def _outputs(taxonomy: Taxonomy, heads: GuardHeads) -> list[str | None]:
    """What each row of the heads is for: harmfulness, if it has one, as None, then the categories."""
    return [*([None] if heads.harmful else []), *taxonomy.categories]


def _shape(saved: Artifact) -> dict[str, Any]:
    """The fields of a config that a guard decides, with its values."""
    spec = saved.spec
    shape: dict[str, Any] = {
        "base_model": spec.base.name,
        "revision": spec.base.revision,
        "adapter": spec.adapter,
        "invocation": spec.invocation,
        "max_length": spec.max_length,
        "head_bias": spec.heads.bias,
        "harmful_head": spec.heads.harmful,
    }
    if spec.adapter != "none":
        config = artifact.read_adapter_config(saved.folder / CONFIG_FILE)
        shape |= {
            "lora_r": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "target_modules": sorted(config.target_modules),
            "layers": config.layers_to_transform,
        }
    return shape
