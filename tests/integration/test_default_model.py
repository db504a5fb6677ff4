"""The real default: its converted folder is the quantised file's model, bit for bit."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lora_guard import base_model, default_model
from lora_guard.conversation import Conversation

pytestmark = pytest.mark.integration


def test_the_converted_default_is_the_gguf_model_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_GUARD_CACHE", str(tmp_path))
    read = base_model._weights
    dequantised = cache(lambda where, file: read("default", where, {"trust_remote_code": False, "gguf_file": file}))

    def weights(name: str, where: str, options: dict[str, Any]) -> PreTrainedModel:
        """Dequantise once: it takes many seconds, and what is compared is what the folder makes of it."""
        return dequantised(where, options["gguf_file"]) if "gguf_file" in options else read(name, where, options)

    monkeypatch.setattr(base_model, "_weights", weights)
    gguf, _ = default_model.packaged()
    converted = base_model.load()
    direct = base_model.load(str(gguf))
    assert capfd.readouterr().err == ""

    assert {path.name for path in tmp_path.iterdir()} == {".lock", base_model.default_folder().name}
    assert converted.fingerprint == base_model.fingerprint(converted.model) == direct.fingerprint
    assert converted.chat_template == direct.chat_template
    assert converted.tokenizer.pad_token == "<|im_end|>"

    conversation = Conversation.of("How do I bake bread?")
    ids = [base_model.renderer(base).chat(conversation)[0] for base in (converted, direct)]
    assert ids[0] == ids[1]
    with torch.no_grad():
        logits = [base.model(torch.tensor([ids[0]])).logits for base in (converted, direct)]
    assert torch.equal(logits[0], logits[1])
