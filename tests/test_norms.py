"""A chat model is recognised by its norms in any file and precision, and by nothing else."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny import tiny_model
from tiny_gguf import tiny_gguf

from lora_guard import norms
from lora_guard.errors import ModelError
from lora_guard.norms import ARCHITECTURES

# Headers of one entry: an alignment of 0, a list of lists, which llama.cpp refuses too, and an impossible length.
ONE = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
NO_ALIGNMENT = ONE + struct.pack("<Q17sII", 17, b"general.alignment", 4, 0)
NESTED = ONE + struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 1)
ENDLESS = ONE + struct.pack("<Q1sIIQ", 1, b"a", 9, 12, 2**63)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gguf_file_has_the_fingerprint_of_the_model_it_was_made_from(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_()
    found = norms.of_model(model)
    assert norms.of_gguf(tiny_gguf(tmp_path / "model.gguf", model)) == found
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "norm" in name)[0] += 1e-3
    assert norms.of_model(model) != found


def test_other_weights_and_another_alignment_change_nothing(tmp_path: Path) -> None:
    files = []
    for alignment, seed in ((32, 0), (64, 1)):
        writer = gguf.GGUFWriter(tmp_path / f"{alignment}.gguf", "llama")
        writer.add_custom_alignment(alignment)
        writer.add_token_list(["a", "ü"])
        writer.add_array("some.numbers", [1, 2, 3])
        writer.add_tensor("blk.0.attn_q.weight", np.full((3, 5), seed, np.float16))
        writer.add_tensor("output_norm.weight", np.arange(7, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.append(tmp_path / f"{alignment}.gguf")
    expected = norms.fingerprint({"output_norm.weight": np.arange(7, dtype=np.float32)})
    assert [norms.of_gguf(file) for file in files] == [expected] * 2


def test_files_of_one_model_and_size_are_told_apart_by_any_tensor_and_by_the_vocabulary(tmp_path: Path) -> None:
    model = tiny_model()
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 2]
    plain = tiny_gguf(tmp_path / "plain.gguf", model)
    same, recognised = norms.of_file(plain), norms.of_gguf(plain)
    assert norms.of_file(tiny_gguf(tmp_path / "again.gguf", model)) == same
    found = {same}
    for name in names:
        with torch.no_grad():
            model.get_parameter(name).mul_(1.001)
        file = tiny_gguf(tmp_path / "tuned.gguf", model)
        assert file.stat().st_size == plain.stat().st_size
        assert norms.of_gguf(file) == recognised
        found.add(norms.of_file(file))
    swapped = plain.read_bytes().replace(b"[unused 1]", b"[unused_1]")
    (tmp_path / "swapped.gguf").write_bytes(swapped)
    found.add(norms.of_file(tmp_path / "swapped.gguf"))
    assert len(found) == len(names) + 2


def test_a_large_tensor_is_sampled_all_along(tmp_path: Path) -> None:
    found = set()
    for changed in (None, 0, 1 << 20, 2 << 20):
        values = np.zeros(3 << 20, np.int8)
        if changed is not None:
            values[changed] = 1
        writer = gguf.GGUFWriter(tmp_path / "large.gguf", "llama")
        writer.add_tensor("token_embd.weight", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found.add(norms.of_file(tmp_path / "large.gguf"))
    assert len(found) == 4


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"PK" + bytes(64), b"GGUF\x03\0\0\0" + b"\xff" * 40, NO_ALIGNMENT, NESTED, ENDLESS]
)
def test_a_file_of_another_kind_is_one_clear_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    for read in (norms.of_gguf, norms.of_file):
        with pytest.raises(ModelError, match=r"model\.gguf cannot be read as a GGUF file"):
            read(tmp_path / "model.gguf")


def test_a_file_cut_short_is_one_clear_line(tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "model.gguf", tiny_model())
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    with pytest.raises(ModelError, match="cannot be read as a GGUF file"):
        norms.of_gguf(file)


def test_a_type_that_llama_cpp_has_no_place_for_has_no_fingerprint() -> None:
    assert norms.of_model(tiny_model("phi")) is None
