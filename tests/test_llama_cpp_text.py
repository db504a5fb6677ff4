"""Text in llama.cpp's SentencePiece vocabularies: the ids are those of transformers' tokenizer, piece by piece."""

import string
from collections.abc import Callable
from itertools import product
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from tiny_gguf import CONTROL, NORMAL, tiny_gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from lora_guard import Conversation, base_model
from lora_guard.base_model import BaseModel
from lora_guard.errors import ModelError
from lora_guard.render import Renderer

llama_cpp_text = pytest.importorskip(
    "lora_guard.engine.llama_cpp_text", reason="needs the extra 'device'", exc_type=ModelError
)
pytestmark = pytest.mark.extras

UNKNOWN, BYTE = 2, 6
SPECIAL = ["<unk>", "<s>", "</s>"]
MARKERS = ["<|user|>", "<|assistant|>", "<|end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["How", "do", "I", "bake", "bread", "Mix", "flour", "water", "user", "assistant", "INST", "aaaa"]
LETTERS = ["▁", *sorted(set(string.printable) - {" "}), "ü"]
MERGED = list(
    dict.fromkeys(word[:end] for plain in WORDS for word in (f"▁{plain}", plain) for end in range(2, len(word) + 1))
)
PIECES = [*SPECIAL, *BYTES, *MERGED, "▁▁", *LETTERS, *MARKERS]
TYPES = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(MERGED) + 1 + len(LETTERS)), *[CONTROL] * 3]
SCORES = [0.0 if kind != NORMAL else -float(place) for place, kind in enumerate(TYPES)]

PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"phi": PHI, "llama": LLAMA}
KINDS = list(product(("llama", "gemma"), TEMPLATES))
"""Llama's and Phi-3's tokenizers put a blank before a text, Gemma's do not."""


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """As transformers makes one of a SentencePiece file: any two pieces that join to a piece merge, by its rank."""
    ids = {piece: place for place, piece in enumerate(PIECES)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in [*MERGED, "▁▁"]
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    made = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    blanks = normalizers.Replace(" ", "▁")
    made.normalizer = blanks if kind == "gemma" else normalizers.Sequence([normalizers.Prepend("▁"), blanks])
    begin = [] if kind == "gemma" else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *begin])
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in [*SPECIAL, *MARKERS]])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def vocabulary(kind: str, template: str) -> Callable[[gguf.GGUFWriter, int], None]:
    """The same as llama.cpp's converter writes it."""

    def add(writer: gguf.GGUFWriter, size: int) -> None:
        assert size == len(PIECES)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(PIECES)
        writer.add_token_scores(SCORES)
        writer.add_token_types(TYPES)
        writer.add_unk_token_id(PIECES.index("<unk>"))
        writer.add_bos_token_id(PIECES.index("<s>"))
        writer.add_eos_token_id(PIECES.index("</s>"))
        writer.add_add_space_prefix(kind != "gemma")
        writer.add_chat_template(template)

    return add


Pair = tuple[PreTrainedTokenizerFast, Renderer, "llama_cpp_text.Model"]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """transformers' tokenizer, the renderer with it, and the same vocabulary in llama.cpp."""
    kind, template = request.param[0], TEMPLATES[request.param[1]]
    path: Path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    model = tiny_model(vocab=len(PIECES))
    plain = tokenizer(kind)
    file = llama_cpp_text.Model(tiny_gguf(path, model, vocabulary(kind, template)))
    return plain, base_model.renderer(BaseModel(model, plain, "tiny", None, "", template)), file


parts = st.one_of(
    st.sampled_from([*WORDS, *SPECIAL, *MARKERS, " ", "  ", "<|", "▁", "aaa", "<0x41>"]), st.text(max_size=4)
)
texts = st.lists(parts, max_size=6).map("".join)


@given(prompt=texts, response=texts)
def test_a_conversation_has_the_ids_of_transformers_tokenizer(pair: Pair, prompt: str, response: str) -> None:
    _, plain, model = pair
    device = llama_cpp_text.renderer(model)
    once = Conversation.of(prompt, response)
    for conversation in (once, once.with_message("user", response).with_message("assistant", prompt)):
        for target in ("prompt", "response"):
            assert device.judged(conversation, target, "") == plain.judged(conversation, target, "")
    asked = once.with_message("user", response)
    assert device.chat(asked) == plain.chat(asked)
    assert device.chat(asked, held=2) == plain.chat(asked, held=2)
    assert device.guard_turn == plain.guard_turn


@given(texts)
def test_a_stream_of_tokens_becomes_the_text(pair: Pair, text: str) -> None:
    tokenizer, _, model = pair
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(map(llama_cpp_text.decoder(model), ids)) == expected
