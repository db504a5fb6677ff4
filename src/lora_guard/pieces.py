"""Encodes a text piece by piece so that the pieces' ids join to those of the whole.

SentencePiece's tokenizers put a blank before what they encode, because their words begin with one. A piece that stands
in the middle of a text must not get it: the model has never seen it there.
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lora_guard.render import Encode


def encoder(tokenizer: PreTrainedTokenizerBase) -> tuple[Encode, bool]:
    """How :class:`Renderer` encodes with this tokenizer, and whether its words begin with their blank."""
    backend = tokenizer.backend_tokenizer
    schemes = {scheme for part in (backend.normalizer, backend.pre_tokenizer) for scheme in _schemes(_state(part))}

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    if not schemes:
        return lambda text, before: encode(text), False
    added = tokenizer.added_tokens_decoder
    first_control = re.compile("|".join(re.escape(token.content) for token in added.values()) or "(?!)")
    bare = _without_prefix(backend)

    def encode_piece(text: str, before: int | None) -> list[int]:
        if before is None or (before in added and "always" in schemes):
            return encode(text)
        control = first_control.search(text)
        cut = control.start() if control else len(text)
        # Behind a control token the tokenizer begins anew, as it does in the whole text.
        return bare.encode(text[:cut], add_special_tokens=False).ids + encode(text[cut:])

    return encode_piece, True


def _state(part: Any) -> dict[str, Any]:
    """The JSON form of a tokenizer's normalizer or pre-tokenizer."""
    return {} if part is None else json.loads(part.__getstate__())


def _schemes(part: dict[str, Any]) -> set[str]:
    """Where a part of a tokenizer adds a blank: ``first`` of all, ``always`` (behind control tokens too), ``never``."""
    if part.get("type") == "Prepend":
        return {"always"}
    if part.get("type") == "Metaspace":
        return {part["prepend_scheme"]}
    return {scheme for inner in _inner(part) for scheme in _schemes(inner)}


def _inner(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [*part.get("normalizers", []), *part.get("pretokenizers", [])]


def _without_prefix(backend: Tokenizer) -> Tokenizer:
    """A copy that never puts a blank before a text."""
    state = json.loads(backend.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        state[name] = _stripped(state[name])
    return Tokenizer.from_str(json.dumps(state))


def _stripped(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    return {
        name: [kept for inner in value if (kept := _stripped(inner))]
        if name in ("normalizers", "pretokenizers")
        else value
        for name, value in part.items()
    }
