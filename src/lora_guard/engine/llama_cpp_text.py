"""Text of a chat model in llama.cpp: its renderer and streaming detokenizer, from the GGUF file's vocabulary alone."""

import codecs
import re
from collections.abc import Callable

from lora_guard.engine.llama_cpp import Model
from lora_guard.render import PLAIN_TEMPLATE, Encode, Renderer


def renderer(model: Model) -> Renderer:
    """The renderer of the model's conversations: for its own vocabulary, the ids of transformers' tokenizer."""
    control = model.control_tokens()
    texts = [model.text(token) for token in control]
    return Renderer(
        model.meta("tokenizer.chat_template") or PLAIN_TEMPLATE,
        _pieces(model, frozenset(control), texts)
        if words_begin_with_blank(model)
        else lambda text, _: model.tokenize(text),
        control_tokens=texts,
        variables={name: model.text(token) for name, token in model.named_tokens().items()},
        blank_begins_word=words_begin_with_blank(model),
    )


def words_begin_with_blank(model: Model) -> bool:
    """Whether the tokenizer puts a blank before a text, as SentencePiece's do because their words begin with one."""
    return model.is_sentencepiece and model.meta("tokenizer.ggml.add_space_prefix") != "false"


def decoder(model: Model) -> Callable[[int], str]:
    """A streaming detokenizer; control tokens yield no text, an unfinished UTF-8 sequence yields none yet."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    begins = words_begin_with_blank(model)

    def step(token: int) -> str:
        nonlocal begins
        text = utf8.decode(model.piece(token))
        if begins and text:
            begins = False
            return text.removeprefix(" ")
        return text

    return step


def _pieces(model: Model, control: frozenset[int], texts: list[str]) -> Encode:
    """Encode with the blank that the vocabulary's words need: at the beginning of a text and behind a control token.

    llama.cpp would put it before every piece, also before one that stands in the middle of a text.
    """
    between = re.compile(f"({'|'.join(map(re.escape, sorted(texts, key=len, reverse=True)))})")

    def encode(text: str, before: int | None) -> list[int]:
        begins = before is None or before in control
        ids: list[int] = []
        for number, section in enumerate(between.split(text)):
            is_control = number % 2 == 1
            if section:
                ids += model.tokenize(section if is_control or not begins else f" {section}")
            begins = is_control or (begins and not section)
        return ids

    return encode
