"""Bench device on a tiny model: its figures are there, and each side runs as it says."""

import json
import math
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from guards import tiny_guard_folder
from tiny_gguf import tiny_gguf

from lora_guard import base_model
from lora_guard.bench import device
from lora_guard.bench.setup import Setup

pytest.importorskip("llama_cpp", reason="needs the extra 'device'; make test-extras builds it")
pytestmark = pytest.mark.extras


def test_each_side_is_timed_and_weighed_and_says_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_GUARD_CACHE", str(tmp_path / "cache"))
    folder = tiny_guard_folder(tmp_path, adapter_kind="alora")
    file = tiny_gguf(tmp_path / "base.gguf", base_model.load(str(tmp_path / "base")).model)
    setup = Setup(guard=str(folder), rows=8, deadline=math.inf)
    report = device.run(setup, base=str(file), prompt_tokens=60, answer_tokens=20, rounds=1, memory_rounds=1)
    goals = {"ours": 1.08, "memory": 1.03}
    for name in ("ours", "ours-q4_1", "second-model", "second-model-q4_1", "memory", "memory-second-model"):
        assert report.figures[name].value is not None
        assert report.figures[name].value > 0
        assert report.figures[name].goal == goals.get(name)
    assert "tokens with and without checks: the same" in report.notes
    assert len(list((tmp_path / "cache" / "quantised").glob("*.gguf"))) == 2
    found = json.loads(report.to_json({}))
    assert found["bench"] == "device"
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "device_picture.py"))
    for name in ("a.svg", "b.svg"):
        script["picture"](found, tmp_path / name)
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("side", device.SIDES)
def test_the_allocator_is_set_alike_on_every_side_before_anything_is_loaded(
    side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_guard.bench import device_probe

    monkeypatch.setenv("LORA_GUARD_CACHE", str(tmp_path / "cache"))
    folder = tiny_guard_folder(tmp_path, adapter_kind="alora")
    file = str(tiny_gguf(tmp_path / "base.gguf", base_model.load(str(tmp_path / "base")).model))
    order: list[str] = []
    read_rows = device_probe.read_rows
    monkeypatch.setattr(device_probe, "suit_llama_cpp", lambda environment: order.append("allocator"))
    monkeypatch.setattr(device_probe, "read_rows", lambda *words: order.append("rows") or read_rows(*words))
    device_probe.main(side, str(folder), file, file, "0")
    assert order == ["allocator", "rows"]
    assert json.loads(capsys.readouterr().out)["peak"] > 0


def test_a_check_is_timed_whole_and_with_each_part_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_GUARD_CACHE", str(tmp_path / "cache"))
    folder = tiny_guard_folder(tmp_path, adapter_kind="alora")
    file = tiny_gguf(tmp_path / "base.gguf", base_model.load(str(tmp_path / "base")).model)
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "device_check.py"))
    shares = script["measure"](file, str(folder), 3)
    assert len(shares) == 7
    assert all(share > 0 for share in shares.values())
