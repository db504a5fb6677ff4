"""Adapters: how they begin, that off is the base model bit for bit, and that only the right tensors are read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from lora_guard import adapter
from lora_guard.errors import ArtifactError, ConfigError

SHAPE = adapter.LoraShape(r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj"])
IDS = torch.tensor([[1, 2, 3, 4]])


def attached(shape: adapter.LoraShape = SHAPE) -> tuple[PreTrainedModel, adapter.Adapter]:
    """A frozen tiny model and the adapter on it."""
    model = tiny_model().requires_grad_(False)
    torch.manual_seed(0)
    return model, adapter.attach(model, shape)


def trainable(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_effect(found: adapter.Adapter) -> adapter.Adapter:
    with torch.no_grad():
        for name, parameter in found.parameters().items():
            if ".lora_B." in name:
                parameter.normal_()
    return found


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    output: Any = model(IDS)
    return output.logits


def test_a_fresh_adapter_has_random_a_zero_b_and_no_bias_and_changes_nothing() -> None:
    model, _ = attached()
    names = trainable(model)
    assert len(names) == 2 * 2 * 2  # layers, target modules, A and B
    assert all(name.endswith("weight") and (".lora_A." in name or ".lora_B." in name) for name in names)
    bound = 1 / 32**0.5  # of Kaiming's uniform distribution with PEFT's slope, over 32 inputs
    for name, parameter in names.items():
        assert parameter.dtype == torch.float32
        if ".lora_A." in name:
            assert 0.8 * bound < parameter.abs().max() <= bound
        else:
            assert not parameter.any()
    assert torch.equal(logits(model), logits(tiny_model()))


def test_an_adapter_is_in_fp32_on_a_model_in_bf16() -> None:
    model = tiny_model().requires_grad_(False).to(torch.bfloat16)  # type: ignore[arg-type]
    adapter.attach(model, SHAPE)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}


def test_adapters_go_into_the_layers_that_were_named() -> None:
    names = trainable(attached(adapter.LoraShape(4, 8, 0.0, ["o_proj"], layers=[1]))[0])
    assert len(names) == 2
    assert all(".layers.1.self_attn.o_proj." in name for name in names)


def test_switched_off_is_the_base_model_bit_for_bit_and_then_on_again() -> None:
    model, found = attached()
    with_effect(found)
    on, base = logits(model), logits(tiny_model())
    assert not torch.equal(on, base)
    with adapter.switched(model, None):
        assert torch.equal(logits(model), base)
        with adapter.switched(model, found):
            assert torch.equal(logits(model), on)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), on)


def test_of_several_adapters_exactly_the_one_that_is_switched_to_is_on() -> None:
    first_model, first = attached()
    with_effect(first)
    alone = logits(first_model)
    model, same = attached()
    with torch.no_grad():
        for name, parameter in same.parameters().items():
            parameter.copy_(first.parameters()[name])
    second = with_effect(adapter.attach(model, adapter.LoraShape(2, 8, 0.0, ["q_proj", "o_proj"])))
    second_on = logits(model)
    with adapter.switched(model, same):
        assert torch.equal(logits(model), alone)
    with adapter.switched(model, None):
        assert torch.equal(logits(model), logits(tiny_model()))
    assert torch.equal(logits(model), second_on)
    assert not torch.equal(second_on, alone)
    assert first.parameters().keys() == same.parameters().keys() != second.parameters().keys()


def test_a_detached_adapter_leaves_the_others_and_no_parameter() -> None:
    model, first = attached()
    with_effect(first)
    on, names = logits(model), set(trainable(model))
    second = with_effect(adapter.attach(model, SHAPE))
    assert len(trainable(model)) == 2 * len(names)
    adapter.detach(model, second)
    assert set(trainable(model)) == names
    assert torch.equal(logits(model), logits(tiny_model()))  # what was on is gone
    with adapter.switched(model, first):
        assert torch.equal(logits(model), on)
    third = adapter.attach(model, SHAPE)  # takes the place that is free again
    assert third.number == second.number


def test_an_error_in_the_block_restores_the_switch() -> None:
    model, found = attached()
    with_effect(found)
    on = logits(model)
    with pytest.raises(KeyError), adapter.switched(model, None):
        raise KeyError
    assert torch.equal(logits(model), on)


def test_a_model_without_adapter_has_no_tensors_and_can_be_switched() -> None:
    model = tiny_model()
    assert adapter.weights(None, torch.bfloat16) == {}
    with adapter.switched(model, None):
        assert torch.equal(logits(model), logits(tiny_model()))


def test_the_tensors_have_pefts_names_and_the_dtype_asked_for() -> None:
    tensors = adapter.weights(attached()[1], torch.bfloat16)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    first = "base_model.model.model.layers.0.self_attn.q_proj"
    assert tensors[f"{first}.lora_A.weight"].shape == (4, 32)
    assert tensors[f"{first}.lora_B.weight"].shape == (32, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_pro"]}, "target_modules: the base model has no 'q_pro'; did you mean 'q_proj'"),
        ({"layers": [0, 2]}, "layers: the base model has no layer 2; allowed: 0 to 1"),
        ({"layers": [-1]}, "no layer -1"),
    ],
)
def test_a_module_or_layer_that_is_not_there_is_refused(fields: dict[str, Any], message: str) -> None:
    values = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj"]} | fields
    with pytest.raises(ConfigError, match=message):
        attached(adapter.LoraShape(**values))


def test_the_tensors_a_guard_must_have_pass() -> None:
    adapter.check_tensors({"a": torch.zeros(2, 3)}, {"a": torch.Size([2, 3])}, Path("file"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "file lacks 1 tensors, the first 'a'"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, "file has 1 unknown tensors, the first 'b'"),
        ({"a": torch.zeros(3, 2)}, r"file: 'a' has shape \[3, 2\]; allowed: \[2, 3\]"),
        ({"a": torch.full((2, 3), torch.nan)}, "file: 'a' holds NaN or infinite values"),
        ({"a": torch.full((2, 3), torch.inf)}, "file: 'a' holds NaN or infinite values"),
    ],
)
def test_other_tensors_are_refused_with_what_is_wrong(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        adapter.check_tensors(tensors, {"a": torch.Size([2, 3])}, Path("file"))
