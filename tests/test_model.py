"""The guard path: features of the last attended token, logits in the order of the rows, and what is trained."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import END_ID, tiny_model

from lora_guard import adapter
from lora_guard.errors import ResourceError
from lora_guard.heads import GuardHeads
from lora_guard.model import GuardModel, autocast, batched_logits, pad, parameter_counts, takes_bf16

rows = st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=12), min_size=1, max_size=8)


def guard_model(categories: int = 2, *, harmful: bool = True) -> GuardModel:
    base = tiny_model().requires_grad_(False)
    torch.manual_seed(0)
    attached = adapter.attach(base, adapter.LoraShape(4, 8, 0.0, ["q_proj", "v_proj"]))
    return GuardModel(base, GuardHeads(32, categories, harmful=harmful), attached=attached).eval()


MODEL = guard_model()


@given(rows)
def test_padding_is_on_the_right_and_masked(rows: list[list[int]]) -> None:
    ids, mask = pad(rows, END_ID)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, padded, attended in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        assert padded == row + [END_ID] * (len(padded) - len(row))
        assert attended == [1] * len(row) + [0] * (len(padded) - len(row))


@torch.no_grad()
def test_the_last_token_is_found_by_the_mask_though_padding_and_end_of_text_share_an_id() -> None:
    text = [5, END_ID, 7, END_ID]
    ids, mask = pad([text, [9] * 7], END_ID)
    features = MODEL.features(ids, mask)
    alone = MODEL.features(torch.tensor([text]), torch.ones(1, 4, dtype=torch.long))
    assert torch.allclose(features[0], alone[0], atol=1e-5)
    shorter = MODEL.features(torch.tensor([text[:3]]), torch.ones(1, 3, dtype=torch.long))
    assert not torch.allclose(features[0], shorter[0], atol=1e-2)


@torch.no_grad()
def test_features_are_the_last_hidden_state_of_the_chat_model() -> None:
    ids = torch.tensor([[1, 2, 3]])
    hidden = MODEL.base(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(MODEL.features(ids, torch.ones_like(ids)), hidden[:, -1], atol=1e-6)


@given(rows, st.integers(1, 40))
def test_rows_keep_their_order_and_their_logits_in_batches_of_any_size(rows: list[list[int]], tokens: int) -> None:
    counts: list[int] = []
    logits = batched_logits(MODEL, rows, pad_id=END_ID, precision="fp32", tokens_per_batch=tokens, done=counts.append)
    assert logits.shape == (len(rows), 3)
    assert sum(counts) == len(rows)
    for row, found in zip(rows, logits, strict=True):
        alone = batched_logits(MODEL, [row], pad_id=0, precision="fp32", tokens_per_batch=99)[0]
        assert torch.allclose(found, alone, atol=1e-4)


def test_no_rows_have_no_logits() -> None:
    assert batched_logits(MODEL, [], pad_id=0, precision="fp32", tokens_per_batch=9).shape == (0, 3)


def test_no_memory_for_a_batch_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(GuardModel, "features", fail)
    with pytest.raises(ResourceError, match="no memory for a batch of 1 rows of 2 tokens"):
        batched_logits(MODEL, [[1, 2]], pad_id=0, precision="fp32", tokens_per_batch=9)


@pytest.mark.parametrize("harmful", [True, False])
def test_there_is_an_output_for_harmfulness_whether_or_not_it_has_a_head(harmful: bool) -> None:
    model = guard_model(3, harmful=harmful)
    ids = torch.tensor([[1, 2]])
    assert model(ids, torch.ones_like(ids)).shape == (1, model.outputs)
    assert model.outputs == 4


def test_adapter_and_heads_are_trained_and_every_parameter_is_counted_once() -> None:
    model = guard_model()
    names = model.trainable()
    assert {name.partition(".")[0] for name in names} == {"base", "heads"}
    assert all("lora_" in name for name in names if name.startswith("base."))
    counts = parameter_counts(model)
    assert counts["base"] == sum(parameter.numel() for parameter in tiny_model().parameters())
    assert counts["heads"] == 3 * 32 + 3
    assert counts["adapter"] == 2 * (4 * (32 + 32) + 4 * (32 + 16))  # q and v of two layers
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_the_precision_asked_for_decides_and_auto_asks_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert takes_bf16(cpu, "bf16")
    assert not takes_bf16(cpu, "fp32")
    flags = Path("/proc/cpuinfo").read_text("utf-8").split() if Path("/proc/cpuinfo").is_file() else []
    native = bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
    assert native or not takes_bf16(cpu, "auto")  # without such instructions it is many times slower
    assert takes_bf16(cpu, "auto") == takes_bf16(cpu, "auto")
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with autocast(cpu, precision):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
