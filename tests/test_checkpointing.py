"""Activation checkpointing: the same gradients, each layer computed twice, and passes without gradient once."""

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_model

from lora_guard import TrainConfig, adapter
from lora_guard.heads import GuardHeads
from lora_guard.model import GuardModel
from lora_guard.training.checkpointing import checkpoint_layers

IDS = torch.arange(24).reshape(2, 12) + 5


def model() -> tuple[GuardModel, list[int]]:
    """A guard model with dropout in its adapter, and how often its first layer was computed."""
    torch.manual_seed(0)
    base = tiny_model()
    attached = adapter.attach(base, adapter.LoraShape(r=4, alpha=8, dropout=0.3, target_modules=["q_proj", "v_proj"]))
    guard = GuardModel(base, GuardHeads(base.config.hidden_size, 2), attached=attached)
    passes = [0]

    def count(*_: object) -> None:
        passes[0] += 1

    base.get_decoder().layers[0].self_attn.register_forward_hook(count)
    return guard, passes


def gradients(guard: GuardModel) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    guard.train()
    guard(IDS).sum().backward()
    return {name: p.grad for name, p in guard.named_parameters() if p.grad is not None}


def test_gradients_are_those_without_it_and_each_layer_is_computed_twice() -> None:
    plain, plain_passes = model()
    saving, saving_passes = model()
    checkpoint_layers(saving.base)
    expected, found = gradients(plain), gradients(saving)
    assert expected.keys() == found.keys()
    assert any("lora" in name for name in found)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    assert (plain_passes[0], saving_passes[0]) == (1, 2)


def test_a_pass_without_gradients_is_computed_once_and_is_the_same() -> None:
    guard, passes = model()
    with torch.no_grad():
        before = guard(IDS)
        checkpoint_layers(guard.base)
        assert torch.equal(guard(IDS), before)
    assert passes[0] == 2


def test_an_activated_adapter_refuses_it_in_one_line() -> None:
    settings = {"train": [{"path": "x.jsonl"}], "activation_checkpointing": True}
    assert TrainConfig.model_validate(settings | {"adapter": "lora"}).activation_checkpointing
    with pytest.raises(ValidationError, match="kept keys and values of adapter 'alora' again; allowed with adapter"):
        TrainConfig.model_validate(settings | {"adapter": "alora"})
    with pytest.raises(ValidationError, match="activation_checkpointing has no effect with adapter 'none'"):
        TrainConfig.model_validate(settings | {"adapter": "none"})
