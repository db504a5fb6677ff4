"""The adapter file says what llama.cpp asks for, by llama.cpp's names and in its order of rows."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from lora_guard.errors import ArtifactError
from lora_guard.export.adapter_gguf import BaseShape, architecture_of, read_floats, write_adapter
from lora_guard.norms import ARCHITECTURES

BASE = BaseShape("llama", layers=2, heads=4, kv_heads=2)
LAYER = "base_model.model.model.layers.1.self_attn"


def written(path: Path, name: str, shape: tuple[int, int], base: BaseShape = BASE) -> gguf.GGUFReader:
    tensors = {
        f"{name}.lora_A.weight": np.ones((3, shape[1]), np.float32),
        f"{name}.lora_B.weight": np.arange(shape[0] * 3, dtype=np.float32).reshape(shape[0], 3),
    }
    write_adapter(path, tensors, alpha=6.0, invocation=[2, 198, 1], base=base, name="tiny")
    return gguf.GGUFReader(path)


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    fields = written(tmp_path / "adapter.gguf", f"{LAYER}.v_proj", (16, 32)).fields
    assert {
        name: fields[name].contents()
        for name in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    } == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }
    invocation = fields["adapter.alora.invocation_tokens"]
    assert invocation.contents() == [2, 198, 1]
    assert invocation.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]


def test_tensors_have_llama_cpps_names_and_peft_s_shapes(tmp_path: Path) -> None:
    tensors = written(tmp_path / "adapter.gguf", f"{LAYER}.v_proj", (16, 32)).tensors
    assert {tensor.name: tensor.data.shape for tensor in tensors} == {
        "blk.1.attn_v.weight.lora_a": (3, 32),
        "blk.1.attn_v.weight.lora_b": (16, 3),
    }


@pytest.mark.parametrize(("module", "heads"), [("q_proj", 4), ("k_proj", 2)])
def test_rows_of_queries_and_keys_pair_neighbours(module: str, heads: int, tmp_path: Path) -> None:
    rows = 8 * heads
    tensors = {t.name: t.data for t in written(tmp_path / "adapter.gguf", f"{LAYER}.{module}", (rows, 32)).tensors}
    plain = np.arange(rows * 3).reshape(rows, 3)
    found = tensors[f"blk.1.attn_{module[0]}.weight.lora_b"]
    for head in range(heads):
        for place in range(4):  # halves of a head of 8 become neighbours
            assert found[8 * head + 2 * place].tolist() == plain[8 * head + place].tolist()
            assert found[8 * head + 2 * place + 1].tolist() == plain[8 * head + place + 4].tolist()


@pytest.mark.parametrize("name", [f"{LAYER}.w_proj", f"{LAYER}.q_proj.lora_magnitude"])
def test_a_tensor_without_a_place_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no place for the adapter"):
        written(tmp_path / "adapter.gguf", name, (16, 32))


def test_a_model_type_without_a_mapping_is_refused_and_the_allowed_are_named() -> None:
    assert architecture_of("mistral") == "llama"
    with pytest.raises(ArtifactError, match=r"of type 'phi' cannot be exported to llama.cpp; did you mean 'phi3'\?"):
        architecture_of("phi")
    assert set(ARCHITECTURES.values()) <= set(gguf.MODEL_ARCH_NAMES.values())


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8))
def test_weights_are_read_without_torch_as_torch_reads_them(values: list[float]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.tensor([values]).to(dtype)
        found = read_floats(Path("x"), save({"a": tensor.clone(), "b": tensor}, metadata={"format": "pt"}))
        assert found.keys() == {"a", "b"}
        assert np.array_equal(found["b"], tensor.float().numpy())


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ArtifactError, match="'a' is of dtype I32"):
        read_floats(Path("x"), save({"a": torch.ones(2, dtype=torch.int32)}))


@pytest.mark.parametrize(
    "change", [lambda data: data[:-3], lambda data: data[:20], lambda data: data[8:], lambda _: b""]
)
def test_what_is_no_safetensors_file_is_one_clear_line(change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ArtifactError, match="heads is not a safetensors file"):
        read_floats(Path("heads"), change(save({"a": torch.ones(2)})))
