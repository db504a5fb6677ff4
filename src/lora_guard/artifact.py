"""A guard on disk: what the folder holds, how it is written in one step and read with every key checked."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_guard import files
from lora_guard.errors import ArtifactError, ConfigError
from lora_guard.render import RENDER_VERSION
from lora_guard.verdict import Calibration

if TYPE_CHECKING:
    from torch import Tensor  # the on-device engine reads guards where there is no torch

FORMAT_VERSION: Literal[2] = 2
SPEC_FILE = "guard.json"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
HEADS_FILE = "heads.safetensors"
TOKEN_HEAD_FILE = "token_head.safetensors"
CARD_FILE = "README.md"
LICENCE_FILE = "LICENSE"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseReference(_Strict):
    """The chat model a guard was trained for. The fingerprint ties them; name and revision say where to find it."""

    name: str
    revision: str | None
    fingerprint: str
    hidden_size: int
    norms: str | None = None
    """:mod:`lora_guard.norms`' fingerprint, by which a GGUF file of the same model is recognised."""
    note: str | None = None


class HeadsShape(_Strict):
    """The shape of ``heads.safetensors``."""

    bias: bool
    harmful: bool


class DataReference(_Strict):
    """One data source a guard was trained on."""

    name: str
    rows: int
    licence: str | None


Form = Literal["peft", "llama-cpp", "peft-seqcls"]
_FORMS: dict[Form, str] = {"peft": "a guard folder", "llama-cpp": "a bundle", "peft-seqcls": "an export to peft-seqcls"}


class GuardSpec(_Strict):
    """The contents of ``guard.json``."""

    format_version: Literal[2] = FORMAT_VERSION
    form: Form = "peft"
    """What the folder is: a guard, or what ``lora-guard export`` made of one (:mod:`lora_guard.export`)."""
    name: str
    adapter: Literal["lora", "alora", "none"]
    base: BaseReference
    taxonomy: dict[str, Any]
    render_version: int = RENDER_VERSION
    invocation: str
    max_length: int
    heads: HeadsShape
    token_head: bool = False
    """Whether :mod:`lora_guard.token_head` has a part in a prompt's score."""
    calibration: Calibration
    data: list[DataReference] = []
    licence: str | None = None
    metrics: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    files: dict[str, str] = Field(default_factory=dict)
    """File name -> sha256, of every file that decides a score."""


class AdapterConfig(BaseModel):
    """What we read of ``adapter_config.json``; what PEFT adds and we do not have must be absent or off."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    peft_type: Literal["LORA"]
    r: int = Field(ge=1)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str]
    layers_to_transform: list[int] | None = None
    alora_invocation_tokens: list[int] | None = None
    bias: Literal["none"] = "none"
    fan_in_fan_out: Literal[False] | None = None
    use_rslora: Literal[False] | None = None
    use_dora: Literal[False] | None = None
    lora_bias: Literal[False] | None = None
    rank_pattern: dict[str, int] | None = Field(default=None, max_length=0)
    alpha_pattern: dict[str, int] | None = Field(default=None, max_length=0)
    modules_to_save: list[str] | None = Field(default=None, max_length=0)


@dataclass(frozen=True)
class Artifact:
    """A guard folder that was read: the spec and the tensors, checked but not yet attached to a model."""

    folder: Path
    spec: GuardSpec
    adapter: "dict[str, Tensor]"
    heads: "dict[str, Tensor]"


def write(
    folder: Path,
    spec: GuardSpec,
    *,
    adapter_config: dict[str, Any] | None,
    tensors: "dict[str, Tensor]",
    heads: "dict[str, Tensor]",
    card: str,
    licence: str | None = None,
) -> None:
    """Write a guard folder in one step: a reader sees the old one or the new one, never a half.

    Args:
        folder: replaced if it exists.
        spec: its ``files`` are filled in here.
        adapter_config: PEFT's ``adapter_config.json``; None for a guard without adapter.
        tensors: the adapter's, by PEFT's names.
        heads: ``weight`` and perhaps ``bias``.
        card: the model card, Markdown.
        licence: text of the weights' licence.

    Raises:
        ResourceError: no disk space.
    """
    from safetensors.torch import save

    contents = {HEADS_FILE: save(heads)}
    if adapter_config is not None:
        contents[CONFIG_FILE] = (json.dumps(adapter_config, indent=2, sort_keys=True) + "\n").encode()
        contents[WEIGHTS_FILE] = save(tensors, metadata={"format": "pt"})
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    if licence is not None:
        contents[LICENCE_FILE] = licence.encode()
    _write_all(folder, contents, spec.model_copy(update={"files": hashes}), card)


def rewrite(folder: Path, out: Path, spec: GuardSpec, *, card: str, token_head: bytes | None = None) -> None:
    """Write a guard folder with another spec and card; the files that decide a logit stay as they are, to the byte.

    Args:
        folder: the guard that was read.
        out: replaced if it exists; may be ``folder``.
        spec: its ``files`` are those of ``folder``.
        card: the model card, Markdown.
        token_head: contents of a new ``token_head.safetensors``; the old one stays when None.

    Raises:
        ArtifactError: a file of ``folder`` is missing or corrupted.
        ResourceError: no disk space.
    """
    contents = {name: read_checked(folder / name, digest) for name, digest in spec.files.items()}
    if token_head is not None:
        contents[TOKEN_HEAD_FILE] = token_head
        hashes = spec.files | {TOKEN_HEAD_FILE: hashlib.sha256(token_head).hexdigest()}
        spec = spec.model_copy(update={"files": hashes, "token_head": True})
    if (folder / LICENCE_FILE).is_file():
        contents[LICENCE_FILE] = (folder / LICENCE_FILE).read_bytes()
    _write_all(out, contents, spec, card)


def check_out(out: Path, form: Form) -> None:
    """Find before anything is loaded that a folder holds what a guard of this form must not replace.

    Raises:
        ConfigError: something else is there.
        ArtifactError: a guard that cannot be read is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    allowed = f"a new folder, or {_FORMS[form]} to replace"
    if not (out / SPEC_FILE).is_file():
        raise ConfigError(f"{out} exists and is not a guard; allowed: {allowed}")
    if (found := read_spec(out).form) != form:
        raise ConfigError(f"{out} holds {_FORMS[found]}; allowed: {allowed}")


def read(folder: Path) -> Artifact:
    """Read a guard folder: format, render version and every file's hash are checked.

    Raises:
        ArtifactError: what is missing, corrupted or of another version.
    """
    spec, contents = read_files(folder)
    return Artifact(
        folder=folder,
        spec=spec,
        adapter=_tensors(folder / WEIGHTS_FILE, contents.get(WEIGHTS_FILE)),
        heads=_tensors(folder / HEADS_FILE, contents[HEADS_FILE]),
    )


def read_files(folder: Path) -> tuple[GuardSpec, dict[str, bytes]]:
    """The spec, and the bytes of each other file that decides a score by its name; checked as by :func:`read`.

    Raises:
        ArtifactError: what is missing, corrupted or of another version.
    """
    spec = read_spec(folder)
    if spec.form == "llama-cpp":
        raise ArtifactError(
            f"{folder} is a bundle for llama.cpp; allowed: a guard folder, or engine 'llama-cpp' for it"
        )
    if spec.form == "peft-seqcls":
        raise ArtifactError(f"{folder} is an export for sequence classification; allowed: a guard folder")
    names = {HEADS_FILE} | ({CONFIG_FILE, WEIGHTS_FILE} if spec.adapter != "none" else set())
    names |= {TOKEN_HEAD_FILE} if spec.token_head else set()
    if set(spec.files) != names:
        raise ArtifactError(f"{folder / SPEC_FILE}: 'files' lists {sorted(spec.files)}; allowed: {sorted(names)}")
    return spec, {name: read_checked(folder / name, spec.files[name]) for name in sorted(names)}


def read_spec(folder: Path) -> GuardSpec:
    """Read ``guard.json`` alone.

    Raises:
        ArtifactError: it is missing, not of this form, or of another format or render version.
    """
    path = folder / SPEC_FILE
    try:
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is not a guard: it has no {SPEC_FILE}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    for field, supported in {"format_version": FORMAT_VERSION, "render_version": RENDER_VERSION}.items():
        found = raw.get(field) if isinstance(raw, dict) else None
        if found != supported:
            raise ArtifactError(f"{path}: {field} is {found!r}; allowed: {supported} (this version of lora-guard)")
    try:
        return GuardSpec.model_validate(raw)
    except ValidationError as error:
        raise _refused(path, error) from error


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read ``adapter_config.json``.

    Raises:
        ArtifactError: it cannot be read, or a field is missing or wrong.
    """
    try:
        return AdapterConfig.model_validate(json.loads(path.read_text("utf-8")))
    except ValidationError as error:
        raise _refused(path, error) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _refused(path: Path, error: ValidationError) -> ArtifactError:
    problem = error.errors()[0]
    return ArtifactError(f"{path}: field {'.'.join(map(str, problem['loc']))!r}: {problem['msg']}")


def _write_all(folder: Path, contents: dict[str, bytes], spec: GuardSpec, card: str) -> None:
    described = {SPEC_FILE: (spec.model_dump_json(indent=2) + "\n").encode(), CARD_FILE: card.encode()}
    with files.new_folder(folder) as temporary:
        for name, data in (contents | described).items():
            files.write_bytes(temporary / name, data)


def read_checked(path: Path, expected: str) -> bytes:
    """A file's bytes, if they have the expected sha256.

    Raises:
        ArtifactError: it cannot be read or has another hash.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    _check_hash(path, hashlib.sha256(data).hexdigest(), expected)
    return data


def check_file(path: Path, expected: str) -> None:
    """See that a file has the expected sha256, without holding it in memory.

    Raises:
        ArtifactError: it cannot be read or has another hash.
    """
    try:
        found = files.sha256(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    _check_hash(path, found, expected)


def _check_hash(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ArtifactError(f"{path} is corrupted: its sha256 is {found[:12]}…, {SPEC_FILE} says {expected[:12]}…")


def _tensors(path: Path, data: bytes | None) -> "dict[str, Tensor]":
    from safetensors import SafetensorError
    from safetensors.torch import load

    if data is None:
        return {}
    try:
        return load(data)
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a safetensors file: {error}") from error
