"""Writes the tiny chat models as GGUF files in fp32, as llama.cpp's converter would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny import CHATML, END_ID, START_ID
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

from lora_guard.export.adapter_gguf import architecture_of

NORMAL, CONTROL, UNUSED = 1, 3, 5


def byte_tokenizer(writer: gguf.GGUFWriter, vocabulary: int) -> None:
    """The byte tokenizer of :mod:`tiny`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "<|im_start|>", "<|im_end|>"]
    types = [NORMAL] * len(letters) + [CONTROL, CONTROL]
    unused = vocabulary - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokens, *(f"[unused {place}]" for place in range(unused))])
    writer.add_token_types([*types, *[UNUSED] * unused])
    writer.add_token_merges(["a b"])  # llama.cpp asks for one; no token "ab" makes it idle
    writer.add_bos_token_id(START_ID)
    writer.add_eos_token_id(END_ID)
    writer.add_pad_token_id(END_ID)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)


def tiny_gguf(
    path: Path, model: PreTrainedModel, add_tokenizer: Callable[[gguf.GGUFWriter, int], None] = byte_tokenizer
) -> Path:
    """Write the model with a tokenizer; ``add_tokenizer`` is also told the size of the vocabulary."""
    config: Any = model.config
    name = architecture_of(config.model_type)
    writer = gguf.GGUFWriter(path, name)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or config.max_position_embeddings)
    add_tokenizer(writer, config.vocab_size)
    _add_weights(writer, model, name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_weights(writer: gguf.GGUFWriter, model: PreTrainedModel, name: str) -> None:
    config: Any = model.config
    kind = next(arch for arch, written in gguf.MODEL_ARCH_NAMES.items() if written == name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for key, parameter in model.named_parameters():
        target = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert target is not None, key
        values = parameter.detach().float().numpy()
        if name == "gemma" and target.endswith("norm.weight"):
            values = values + 1
        if name == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            rows, width = values.shape
            values = values.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)
        writer.add_tensor(target, np.ascontiguousarray(values))
