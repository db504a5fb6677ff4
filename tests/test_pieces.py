"""Tokenizers whose words begin with a blank: a conversation in pieces has the ids of the whole text."""

import string
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import byte_tokenizer, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_guard import Conversation
from lora_guard.base_model import BaseModel, renderer
from lora_guard.pieces import encoder
from lora_guard.render import PLAIN_TEMPLATE, Renderer

CONTROL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = ["How", "do", "I", "bake", "bread", "Mix", "flour", "water", "user", "assistant", "INST", "["]
BLANK_AND_BARE = [text for word in WORDS for text in (f"▁{word}", word)]
SPELLED = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *sorted(set(string.printable) - {" "})]

PHI = (  # Phi-3
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA = (  # Llama-2
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CLOSE = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
TEMPLATES = {"phi": PHI, "llama": LLAMA, "close": CLOSE, "plain": PLAIN_TEMPLATE}


def byte_pairs() -> models.Model:
    """Words of :data:`WORDS`, with and without a blank before them, are built from their left to their right end."""
    vocabulary = {"<unk>": 0} | {piece: 1 + place for place, piece in enumerate(SPELLED)}
    merges = []
    for word in BLANK_AND_BARE:
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
    merges = list(dict.fromkeys(merges))
    return models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def unigrams() -> models.Model:
    scores = {"<unk>": -20.0} | {piece: -10.0 for piece in SPELLED} | {word: -2.0 for word in BLANK_AND_BARE}
    return models.Unigram(list(scores.items()), unk_id=0, byte_fallback=True)


def prepend(tokenizer: Tokenizer) -> None:
    """As Llama-2's and Phi-3's files have it."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def metaspace(scheme: str) -> Callable[[Tokenizer], None]:
    def add(tokenizer: Tokenizer) -> None:
        part = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=scheme == "always")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([part])

    return add


def made(model: models.Model, add_blanks: Callable[[Tokenizer], None]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    add_blanks(tokenizer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "prepend": made(byte_pairs(), prepend),
    "always": made(unigrams(), metaspace("always")),
    "first": made(byte_pairs(), metaspace("first")),
    "never": made(byte_pairs(), metaspace("never")),
}
MODEL = tiny_model()
RENDERERS = {
    (name, shape): renderer(BaseModel(MODEL, tokenizer, "tiny", None, "", template))
    for name, tokenizer in TOKENIZERS.items()
    for shape, template in TEMPLATES.items()
}
each = pytest.mark.parametrize(("name", "shape"), RENDERERS)


def joint(name: str, shape: str, conversation: Conversation) -> list[int]:
    """The ids of the whole text at once."""
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    return list(
        TOKENIZERS[name].apply_chat_template(messages, chat_template=TEMPLATES[shape], tokenize=True)["input_ids"]
    )


def pieces(made: Renderer, conversation: Conversation) -> list[int]:
    """The ids of a conversation, with the template's end."""
    judged = made.judged(conversation, "response", "")
    end = made.segments(conversation)[-1]
    return judged.prefix + (made.template_ids(end.text) if end.is_control else [])


ordinary = st.lists(st.sampled_from([*WORDS, "Über", "x", "?", "-"]), min_size=1, max_size=5).map(" ".join)


@each
@given(prompt=ordinary, response=ordinary)
def test_the_ids_of_ordinary_text_are_those_of_the_whole(name: str, shape: str, prompt: str, response: str) -> None:
    made = RENDERERS[name, shape]
    once = Conversation.of(prompt, response)
    twice = once.with_message("user", response).with_message("assistant", prompt)
    for conversation in (once, twice):
        assert pieces(made, conversation) == joint(name, shape, conversation)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_answer_as_the_model_says_it_is_judged_as_the_chat_holds_it(name: str) -> None:
    """Llama-2's model says the blank before its answer itself, with the first word."""
    made = RENDERERS[name, "llama"]
    asked, end = made.chat(Conversation.of("How do I bake bread?"))
    conversation = Conversation.of("How do I bake bread?", "Mix flour")
    said = TOKENIZERS[name].convert_tokens_to_ids(["▁Mix", "▁flour"])
    assert made.judged(conversation, "response", "").prefix == asked + said
    assert made.judged(conversation, "prompt", "").prefix == asked[:end]
    again, _ = made.chat(conversation.with_message("user", "How?"), held=2)
    assert asked + said + again == made.chat(conversation.with_message("user", "How?"))[0]


@each
@given(
    text=st.lists(st.one_of(st.sampled_from([*CONTROL, "<|", "|>", " "]), st.text(max_size=4)), max_size=6).map("".join)
)
def test_content_never_yields_a_control_token(name: str, shape: str, text: str) -> None:
    control = set(TOKENIZERS[name].added_tokens_decoder) - {TOKENIZERS[name].unk_token_id}
    assert control.isdisjoint(RENDERERS[name, shape].judged(Conversation.of(text), "prompt", "").target)


@given(st.text(max_size=30))
def test_a_byte_level_tokenizer_encodes_as_ever(text: str) -> None:
    tokenizer = byte_tokenizer()
    encode, blank_begins_word = encoder(tokenizer)
    assert not blank_begins_word
    for before in (None, -1, tokenizer.eos_token_id):
        assert encode(text, before) == tokenizer.encode(text, add_special_tokens=False)
