"""The calls of llama.cpp that the on-device engine makes: a model, an adapter on it, contexts and what they compute."""

import ctypes
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_guard import norms
from lora_guard.errors import ArtifactError, ModelError, ResourceError

if TYPE_CHECKING:
    llama: Any
else:
    try:
        import llama_cpp as llama
    except ImportError as error:
        raise ModelError(
            "engine 'llama-cpp' is not installed; run: pip install 'lora-guard[device]', as docs/on-device.md says"
        ) from error

Array = NDArray[np.float32]

F32 = 0
"""llama.cpp's file type of a model with all weights in fp32."""

PASS_TOKENS = 512
"""llama.cpp reads more tokens than these in several passes."""


class Part(NamedTuple):
    """Tokens to read: consecutive ones of a sequence from the position ``start`` on."""

    sequence: int
    start: int
    ids: Sequence[int]


class Model:
    """A chat model's weights, mapped into memory from a GGUF file, and its vocabulary.

    Args:
        path: the GGUF file.

    Raises:
        ModelError: it cannot be read, or is not a decoder language model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        # Weights repacked for one processor would be a second copy in memory.
        params.use_extra_bufts = False
        # The renderer says itself where a word begins; see engine/llama_cpp_text.py.
        overrides = (llama.llama_model_kv_override * 2)()
        overrides[0].tag = llama.LLAMA_KV_OVERRIDE_TYPE_BOOL
        overrides[0].key = b"tokenizer.ggml.add_space_prefix"
        overrides[0].value.val_bool = False
        params.kv_overrides = overrides
        with _log() as lines:
            self.handle = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise ModelError(
                f"base model {str(path)!r} cannot be loaded: {_reason(lines)}; allowed: a .gguf chat model"
            )
        weakref.finalize(self, llama.llama_model_free, self.handle)
        if not llama.llama_model_has_decoder(self.handle) or llama.llama_model_is_recurrent(self.handle):
            raise ModelError(f"base model {str(path)!r} is not a decoder with attention; allowed: such language models")
        self.vocabulary = llama.llama_model_get_vocab(self.handle)
        self.is_sentencepiece = llama.llama_vocab_type(self.vocabulary) == llama.LLAMA_VOCAB_TYPE_SPM
        self.vocabulary_size = int(llama.llama_vocab_n_tokens(self.vocabulary))
        self.hidden_size = int(llama.llama_model_n_embd(self.handle))
        self.context = int(llama.llama_model_n_ctx_train(self.handle))
        self.file_type = int(llama.llama_model_ftype(self.handle))

    @cached_property
    def norms(self) -> str:
        """:func:`lora_guard.norms.of_gguf` of the file, by which a guard recognises its chat model."""
        return norms.of_gguf(self.path)

    def meta(self, key: str) -> str | None:
        """A value of the file's metadata as text; None when the file has none of that key."""
        size = int(llama.llama_model_meta_val_str(self.handle, key.encode(), None, 0))
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        llama.llama_model_meta_val_str(self.handle, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8")

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, control tokens parsed, nothing added."""
        data = text.encode("utf-8")
        room = len(data) + 8
        ids = (llama.llama_token * room)()
        count = llama.llama_tokenize(self.vocabulary, data, len(data), ids, room, False, True)
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; none for a control token."""
        buffer = ctypes.create_string_buffer(_PIECE)
        size = llama.llama_token_to_piece(self.vocabulary, token, buffer, _PIECE, 0, False)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = llama.llama_token_to_piece(self.vocabulary, token, buffer, -size, 0, False)
        return buffer.raw[:size]

    def text(self, token: int) -> str:
        """How the vocabulary writes a token, control tokens too."""
        return str(llama.llama_vocab_get_text(self.vocabulary, token).decode("utf-8", "replace"))

    def control_tokens(self) -> list[int]:
        """The tokens that are no pieces of text."""
        of_text = llama.LLAMA_TOKEN_ATTR_NORMAL | llama.LLAMA_TOKEN_ATTR_BYTE | llama.LLAMA_TOKEN_ATTR_UNUSED
        attributes, vocabulary = llama.llama_vocab_get_attr, self.vocabulary
        return [token for token in range(self.vocabulary_size) if not attributes(vocabulary, token) & of_text]

    def end_tokens(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ends, vocabulary = llama.llama_vocab_is_eog, self.vocabulary
        return frozenset(token for token in range(self.vocabulary_size) if ends(vocabulary, token))

    def named_tokens(self) -> dict[str, int]:
        """``bos_token`` and the like, as chat templates name them, as far as the vocabulary has them."""
        named = {
            "bos_token": llama.llama_vocab_bos(self.vocabulary),
            "eos_token": llama.llama_vocab_eos(self.vocabulary),
            "pad_token": llama.llama_vocab_pad(self.vocabulary),
        }
        return {name: int(token) for name, token in named.items() if token != llama.LLAMA_TOKEN_NULL}


class Adapter:
    """A low-rank adapter in memory, attached to no context yet.

    Raises:
        ArtifactError: the file is not an adapter of this model's architecture and sizes.
    """

    def __init__(self, model: Model, path: Path) -> None:
        with _log() as lines:
            handle = llama.llama_adapter_lora_init(model.handle, os.fsencode(path))
        if not handle:
            raise ArtifactError(f"{path} does not fit {str(model.path)!r}: {_reason(lines)}")
        self.model = model  # owns the adapter: llama.cpp frees both together
        address = ctypes.cast(handle, ctypes.c_void_p)
        self.pointer = (llama.llama_adapter_lora_p_ctypes * 1)(ctypes.cast(address, llama.llama_adapter_lora_p_ctypes))
        count = int(llama.llama_adapter_get_alora_n_invocation_tokens(handle))
        tokens = llama.llama_adapter_get_alora_invocation_tokens(handle)
        self.invocation = list(tokens[:count]) if count else None


class Context:
    """Keys, values and buffers of one or several sequences, all in one cache whose cells they may share.

    Args:
        model: computes in it.
        tokens: cells of the cache.
        sequences: at most this many.
        outputs: at most so many tokens of one pass give features or logits.
        threads: of the processor.

    Raises:
        ModelError: the model cannot be read in so many sequences.
        ResourceError: no memory for it.
    """

    def __init__(self, model: Model, *, tokens: int, sequences: int, outputs: int, threads: int) -> None:
        self.model = model
        self.tokens = tokens
        params = llama.llama_context_default_params()
        params.n_ctx = tokens
        params.n_batch = tokens
        params.n_ubatch = min(tokens, PASS_TOKENS)
        params.n_seq_max = sequences
        params.n_outputs_max = max(outputs, sequences)  # llama.cpp aborts the process on fewer
        params.n_threads = params.n_threads_batch = threads
        params.pooling_type = llama.LLAMA_POOLING_TYPE_NONE
        params.embeddings = False
        # Without a unified cache, copying a sequence copies whole buffers, and part of one cannot be copied.
        params.kv_unified = True
        params.no_perf = True
        if model.file_type == F32:  # whoever keeps fp32 weights wants fp32 results; both defaults round to fp16
            params.type_k = params.type_v = llama.GGML_TYPE_F32
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with _log() as lines:
            self.handle = llama.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise ResourceError(f"no context of {tokens} tokens: {_reason(lines)}; allowed: what fits into memory")
        weakref.finalize(self, llama.llama_free, self.handle)
        if llama.llama_n_seq_max(self.handle) < sequences:
            raise ModelError(f"llama.cpp holds {llama.llama_n_seq_max(self.handle)} sequences; needed: {sequences}")
        self._memory = llama.llama_get_memory(self.handle)
        self._batch = llama.llama_batch_init(tokens, 0, 1)
        weakref.finalize(self, llama.llama_batch_free, self._batch)
        self._outputs: dict[int, int] = {}

    def attach(self, adapter: Adapter | None) -> None:
        """Read with the adapter from now on, or as the model alone."""
        scales = (ctypes.c_float * 1)(1.0)
        code = llama.llama_set_adapters_lora(self.handle, adapter and adapter.pointer, int(adapter is not None), scales)
        if code:
            raise ResourceError(f"llama.cpp cannot attach the adapter (code {code}); needed: memory for it")

    def read(self, parts: Sequence[Part], *, features: bool = False) -> None:
        """One pass over the parts; afterwards each part's last token has logits, or ``features``.

        Raises:
            ResourceError: no cells left, or no memory.
        """
        llama.llama_set_embeddings(self.handle, features)
        batch, place = self._batch, 0
        self._outputs.clear()
        for number, part in enumerate(parts):
            for offset, token in enumerate(part.ids):
                batch.token[place] = token
                batch.pos[place] = part.start + offset
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = part.sequence
                # With features, llama.cpp takes every token for an output and would warn of those not marked.
                batch.logits[place] = features
                place += 1
            batch.logits[place - 1] = True
            self._outputs[number] = place - 1
        batch.n_tokens = place
        with _log() as lines:
            code = llama.llama_decode(self.handle, batch)
        if code:
            raise ResourceError(f"llama.cpp cannot read {place} tokens (code {code}): {_reason(lines)}")

    def logits(self, part: int = 0) -> Array:
        """Next-token logits ``[vocabulary]`` behind a part of the last pass; a copy."""
        values = llama.llama_get_logits_ith(self.handle, self._outputs[part])
        return np.ctypeslib.as_array(values, (self.model.vocabulary_size,)).copy()

    def features(self, part: int = 0) -> Array:
        """The last hidden state ``[hidden]`` at a part's last token; a copy."""
        values = llama.llama_get_embeddings_ith(self.handle, self._outputs[part])
        return np.ctypeslib.as_array(values, (self.model.hidden_size,)).copy()

    def share(self, source: int, sequence: int, end: int) -> None:
        """Let a sequence begin with the first ``end`` tokens of another, in the same cells."""
        llama.llama_memory_seq_cp(self._memory, source, sequence, 0, end)

    def forget(self, sequence: int, start: int = 0) -> None:
        """Remove a sequence's tokens from ``start`` on; cells that another sequence shares stay."""
        if not llama.llama_memory_seq_rm(self._memory, sequence, start, -1):
            raise ModelError("llama.cpp cannot take tokens of this model back; allowed: models with a key-value cache")


def quantise(source: Path, target: Path, file_type: str) -> None:
    """Write a model in another of llama.cpp's file types, such as ``Q8_0`` or ``Q4_K_M``.

    Raises:
        ModelError: no such type, or the source cannot be read.
    """
    params = llama.llama_model_quantize_default_params()
    params.ftype = file_type_number(file_type)
    params.allow_requantize = True  # the default model is quantised already
    params.nthread = threads()
    with _log() as lines:
        code = llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)
    if code:
        raise ModelError(f"{str(source)!r} cannot be written as {file_type}: {_reason(lines)}")


def file_type_number(file_type: str) -> int:
    """llama.cpp's number of a file type, as :attr:`Model.file_type` has it.

    Raises:
        ModelError: no such type.
    """
    number = F32 if file_type == "F32" else getattr(llama, f"LLAMA_FTYPE_MOSTLY_{file_type}", None)
    if number is None:
        raise ModelError(f"file type {file_type!r} is unknown to llama.cpp; allowed: F32, Q8_0, Q4_K_M and the like")
    return int(number)


def threads() -> int:
    """Threads to compute with: ``OMP_NUM_THREADS``, else the cores this process may use."""
    if (named := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        return max(1, int(named))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_PIECE = 64
_WARNING = 3

_lines: list[str] = []


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _keep(level: int, text: bytes, _: Any) -> None:
    if level >= _WARNING:
        _lines.append(text.decode("utf-8", "replace").strip())


llama.llama_log_set(_keep, None)  # it would write to stderr


@contextmanager
def _log() -> Iterator[list[str]]:
    """What llama.cpp says of a block's calls."""
    _lines.clear()
    yield _lines


def _reason(lines: Sequence[str]) -> str:
    """The first line that is more than dots and continuations."""
    return next((line for line in lines if len(line) > _PIECE // 4), "llama.cpp gives no reason")
