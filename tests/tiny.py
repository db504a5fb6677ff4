"""Builders of tiny chat models and a byte tokenizer in memory, so that tests need no download and no seconds."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

START, END = "<|im_start|>", "<|im_end|>"
START_ID, END_ID = 256, 257

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CONFIGS: dict[str, type[Any]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "phi3": Phi3Config,
    "phi": PhiConfig,
}
ARCHITECTURES = tuple(CONFIGS)


def tiny_model(
    architecture: str = "llama", seed: int = 0, hidden: int = 32, layers: int = 2, vocab: int = 300
) -> PreTrainedModel:
    """A causal language model of the architecture with seeded random fp32 weights, in eval mode."""
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": START_ID,
        "eos_token_id": END_ID,
        "pad_token_id": END_ID,
    }
    if architecture in ("gemma", "qwen3"):  # their head size does not follow from hidden and heads
        settings["head_dim"] = hidden // 4
    if architecture == "phi3":
        settings["original_max_position_embeddings"] = 512
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        factory: Any = AutoModelForCausalLM
        model: PreTrainedModel = factory.from_config(CONFIGS[architecture](**settings), dtype=torch.float32)
    model.train(False)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One id for each of the 256 bytes, then ``<|im_start|>`` and ``<|im_end|>`` (end of text and padding)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    kind: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = kind(tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END)
    fast.chat_template = CHATML
    return fast


def tiny_folder(path: Path, architecture: str = "llama", **settings: int) -> Path:
    """Save a tiny model (``settings`` go to :func:`tiny_model`) and the byte tokenizer into the folder."""
    tiny_model(architecture, **settings).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path
