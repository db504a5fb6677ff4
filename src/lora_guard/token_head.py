"""The token head: a weight for each token of the vocabulary, for what a prompt's words say and the adapter missed.

It stands beside the heads on features as the wide part of arXiv 1606.07792 beside the deep one: a prompt's harmfulness
logit grows by the sum of its different tokens' weights over the root of their number. That sees no order and knows no
meaning, but costs next to nothing to learn, so that it learns from all rows there are. Responses go without: their
words are those of the subject, whatever they say of it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_guard.artifact import TOKEN_HEAD_FILE, GuardSpec, read_checked
from lora_guard.errors import ArtifactError
from lora_guard.export.adapter_gguf import read_floats
from lora_guard.normalise import normalised
from lora_guard.render import Renderer

Array = NDArray[np.float32]


class TokenHead:
    """Token ids of a text -> what its harmfulness logit grows by.

    Args:
        weight: ``[vocabulary]``; ids behind its end weigh nothing.
    """

    def __init__(self, weight: Array) -> None:
        self.weight = weight

    def logit(self, ids: Sequence[int]) -> float:
        """The sum of the different tokens' weights over the root of their number; 0 of no token."""
        different = np.unique(np.asarray(ids, dtype=np.int64))
        known = different[different < len(self.weight)]
        return float(self.weight[known].sum(dtype=np.float64) / np.sqrt(max(1, len(different))))

    def part(self, renderer: Renderer, prompt: str) -> float:
        """What a prompt's harmfulness logit grows by."""
        return self.logit(word_ids(renderer, prompt))

    def to_bytes(self) -> bytes:
        """The contents of ``token_head.safetensors``."""
        from safetensors.numpy import save

        return save({"weight": self.weight})


def word_ids(renderer: Renderer, text: str) -> list[int]:
    """The tokens that count: of the normalised text, for the tokens of a disguised word are not that word's."""
    return renderer.content_ids(normalised(text))


def read(folder: Path, spec: GuardSpec) -> TokenHead | None:
    """The token head of a guard folder or a bundle; None where it has none.

    Raises:
        ArtifactError: the file is missing or corrupted, or holds something else.
    """
    if not spec.token_head:
        return None
    path = folder / TOKEN_HEAD_FILE
    tensors = read_floats(path, read_checked(path, spec.files.get(TOKEN_HEAD_FILE, "")))
    weight = tensors.get("weight")
    if weight is None or len(tensors) > 1 or weight.ndim != 1 or not np.isfinite(weight).all():
        raise ArtifactError(f"{path}: allowed: one tensor, 'weight' [vocabulary], of finite values")
    return TokenHead(weight)
