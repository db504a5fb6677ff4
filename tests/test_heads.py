"""The heads: harmfulness first, with or without an output and a bias of its own, always in fp32."""

import pytest
import torch

from lora_guard.errors import ConfigError
from lora_guard.heads import GuardHeads

FEATURES = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("harmful", [True, False])
def test_logits_are_harmfulness_and_one_for_each_category(bias: bool, harmful: bool) -> None:
    heads = GuardHeads(8, 3, bias=bias, harmful=harmful)
    logits = heads(FEATURES)
    assert logits.shape == (5, 4)
    assert set(heads.state_dict()) == ({"weight", "bias"} if bias else {"weight"})
    products = FEATURES @ heads.weight.T
    assert torch.allclose(logits if harmful else logits[:, 1:], products, atol=1e-6)


def test_without_an_output_of_its_own_harmfulness_is_the_highest_category() -> None:
    heads = GuardHeads(8, 3, harmful=False)
    logits = heads(FEATURES)
    assert heads.weight.shape == (3, 8)
    assert torch.equal(logits[:, 0], logits[:, 1:].amax(dim=1))


def test_heads_without_any_output_are_refused() -> None:
    assert GuardHeads(8, 0)(FEATURES).shape == (5, 1)
    with pytest.raises(ConfigError, match="no categories; allowed without a head for harmfulness: at least one"):
        GuardHeads(8, 0, harmful=False)


def test_the_bias_begins_at_zero_and_is_added() -> None:
    heads = GuardHeads(8, 3)
    assert heads.bias is not None
    assert not heads.bias.any()
    before = heads(FEATURES)
    torch.nn.init.constant_(heads.bias, 2.0)
    assert torch.allclose(heads(FEATURES), before + 2)


def test_the_heads_compute_in_fp32_whatever_is_around_them() -> None:
    heads = GuardHeads(8, 3)
    expected = heads(FEATURES.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        logits = heads(FEATURES.bfloat16())
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)
