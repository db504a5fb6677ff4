"""What ``lora-guard export`` does: make a bundle or a classifier of a guard, and check a bundle on a GGUF model."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from lora_guard import artifact, token_head
from lora_guard.artifact import LICENCE_FILE, GuardSpec, read_spec
from lora_guard.conversation import Conversation
from lora_guard.data.sources import read_file
from lora_guard.default_model import DEFAULT
from lora_guard.errors import ArtifactError
from lora_guard.export import bundle
from lora_guard.export.adapter_gguf import BaseShape, architecture_of
from lora_guard.progress import progress
from lora_guard.taxonomy import Taxonomy


def export(
    guard: Path, out: Path, *, base: str | None = None, model: str | None = None, data: Path | None = None
) -> tuple[str, bool]:
    """Make a bundle, and measure it on a GGUF model if there is one and llama.cpp is installed.

    Args:
        guard: the guard folder.
        out: the bundle's folder; a bundle is replaced.
        base: another place of the base model than the guard names.
        model: a GGUF file to measure on; the default's own when the guard is on the default.
        data: labelled rows to make test vectors of, beside the package's own texts.

    Returns:
        What to tell the user, and whether the bundle passed what was measured; it is written either way.

    Raises:
        ConfigError: ``out`` holds something else.
        ArtifactError: the guard is missing, or llama.cpp has no place for its adapter.
        ModelError: the base model or the GGUF file cannot be loaded.
        DataError: a bad row.
        ResourceError: no disk space.
    """
    from lora_guard.engine import torch_guard
    from lora_guard.export.vectors import vectors

    artifact.check_out(out, "llama-cpp")
    spec = read_spec(guard)
    if spec.form != "peft":
        raise ArtifactError(f"{guard} is an export already; allowed: a guard folder")
    spec, engine, _, _ = torch_guard.load(guard, base=base, precision="fp32", device="cpu")
    config = engine.base.model.config.get_text_config()
    shape = BaseShape(
        architecture_of(config.model_type),
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    found = vectors(engine, spec.calibration, _conversations(data, spec), token_head=token_head.read(guard, spec))
    assert engine.base.norms is not None  # its type has a mapping, or the shape would have been refused
    base_norms = engine.base.norms

    def write(measured: str) -> None:
        card = _card(spec.name, spec.base.name, measured, licence=(guard / LICENCE_FILE).is_file())
        bundle.write(out, guard, shape, norms=base_norms, vectors=found, card=card)

    write("Not measured yet: `lora-guard export --check BUNDLE --model FILE.gguf`.")
    where = model or (DEFAULT if spec.base.name == DEFAULT else None)
    if where is None:
        return f"{out}: written; measure it on a model: lora-guard export --check {out} --model FILE.gguf", True
    if importlib.util.find_spec("llama_cpp") is None:
        return f"{out}: written; not measured, for the extra 'device' is not installed", True
    measured, passed = check(out, where)
    write(measured)
    return f"{out}: written\n\n{measured}", passed


def export_for_peft(guard: Path, out: Path, *, base: str | None = None, data: Path | None = None) -> str:
    """Write a guard in PEFT's form for sequence classification.

    Args:
        guard: the folder of a guard with a plain LoRA adapter.
        out: the folder to write; an export of this form is replaced.
        base: another place of the base model than the guard names.
        data: labelled rows to make test vectors of, beside the package's own texts.

    Returns:
        What to tell the user.

    Raises:
        ConfigError: ``out`` holds something else.
        ArtifactError: the guard is missing, or the form has no place for it.
        ModelError: the base model cannot be loaded.
        DataError: a bad row.
        ResourceError: no disk space.
    """
    from lora_guard.engine import torch_guard
    from lora_guard.export import peft_seqcls
    from lora_guard.export.vectors import vectors

    artifact.check_out(out, "peft-seqcls")
    saved = artifact.read(guard)
    spec, engine, _, _ = torch_guard.load(guard, base=base, precision="fp32", device="cpu")
    peft_seqcls.check(saved, engine.base.model)
    found = vectors(engine, spec.calibration, _conversations(data, spec))
    labels = ["harmful"] * spec.heads.harmful + list(Taxonomy.from_dict(spec.taxonomy).categories)
    peft_seqcls.write(out, saved, vectors=found, card=_classifier_card(spec, labels))
    return f"{out}: written; {len(labels)} labels"


def check(folder: Path, model: str) -> tuple[str, bool]:
    """Replay a bundle's test vectors on ``default`` or a GGUF file; what was found, and whether it passed.

    Raises:
        ArtifactError: the bundle is missing or corrupted, has no vectors, or does not fit the model.
        ModelError: the file cannot be read, or llama.cpp is not installed.
    """
    from lora_guard.engine.device_guard import checked_model
    from lora_guard.export import parity

    read = bundle.read(folder)
    loaded = checked_model(read.spec, folder, model)
    with progress("check", len(bundle.read_vectors(read)["lengths"])) as tick:
        found = parity.check(read, loaded, tick)
    return found.to_markdown(), found.passed


_ROWS = 256


def _conversations(data: Path | None, spec: GuardSpec) -> list[Conversation]:
    """The first labelled rows of a file; none without one."""
    rows = [] if data is None else read_file(data, Taxonomy.from_dict(spec.taxonomy))
    return [row.conversation() for row in rows[:_ROWS]]


def _card(name: str, base: str, measured: str, *, licence: bool) -> str:
    lines: Sequence[str] = (
        f"# {name} for llama.cpp",
        "",
        f"The guard `{name}` for the chat model `{base}` in any GGUF quantisation. `guard.json` says what it judges",
        "and with which thresholds, chosen on the guard's own model unless a section on calibration below says where.",
        "",
        "llama.cpp loads `adapter.gguf`; `heads.safetensors` maps the last token's hidden state to logits, harmfulness",
        "first.",
        "",
        *(["The weights' licence is in `LICENSE`.", ""] if licence else []),
        "## Measured",
        "",
        measured,
        "",
    )
    return "\n".join(lines)


def _classifier_card(spec: GuardSpec, labels: Sequence[str]) -> str:
    lines = (
        f"# {spec.name} for sequence classification",
        "",
        f"The guard `{spec.name}` for the chat model `{spec.base.name}`, as PEFT and vLLM's pooling runner read it.",
        "",
        f"Its {len(labels)} labels, in the order of the logits: {', '.join(f'`{label}`' for label in labels)}.",
        "",
        "What it takes is the conversation in the chat model's own template, cut before the end of the last turn, and",
        f"then `{json.dumps(spec.invocation)[1:-1]}`. The logits are raw: `guard.json` has a temperature, a bias and",
        "thresholds for each label and target, and a score is `sigmoid(logit / temperature + bias)`.",
        "`test_vectors.safetensors` holds token ids and logits to compare with.",
        "",
    )
    return "\n".join(lines)
