"""The heads: one linear map from the last token's features to a harmfulness logit and one logit a category."""

import torch
from torch import Tensor, nn

from lora_guard.errors import ConfigError


class GuardHeads(nn.Module):
    """Features ``[rows, hidden]`` -> logits ``[rows, 1 + K]``, harmfulness first (arXiv 2407.02987, section 3).

    Args:
        hidden_size: width of the base model's features.
        categories: K, the number of categories.
        bias: whether the map has a bias.
        harmful: whether harmfulness has an output of its own; if not, it is the highest category.

    Raises:
        ConfigError: no output is left.
    """

    def __init__(self, hidden_size: int, categories: int, *, bias: bool = True, harmful: bool = True) -> None:
        super().__init__()
        outputs = categories + harmful
        if not outputs:
            raise ConfigError("the taxonomy has no categories; allowed without a head for harmfulness: at least one")
        self.harmful = harmful
        self.weight = nn.Parameter(torch.empty(outputs, hidden_size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        nn.init.xavier_uniform_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Always in fp32, whatever the base model computes in: a few thousand products decide the verdict."""
        with torch.autocast(features.device.type, enabled=False):
            logits = nn.functional.linear(features.float(), self.weight, self.bias)
        if self.harmful:
            return logits
        return torch.cat([logits.amax(dim=-1, keepdim=True), logits], dim=-1)
