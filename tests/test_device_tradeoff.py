"""The script of docs/on-device.md's tables: it measures each file type once, and shows what it measured."""

import importlib.util
import json
import random
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from guards import tiny_guard_folder
from tiny_gguf import tiny_gguf

from lora_guard import base_model
from lora_guard.bench.rows import generated
from lora_guard.errors import ConfigError
from lora_guard.evaluation.sets import EvalSet
from lora_guard.taxonomy import Taxonomy

pytest.importorskip("llama_cpp", reason="needs the extra 'device'; make test-extras builds it")
pytestmark = pytest.mark.extras


@pytest.fixture
def script() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "device_tradeoff.py"
    spec = importlib.util.spec_from_file_location("device_tradeoff", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "device_tradeoff", module)  # its dataclass asks for it
        spec.loader.exec_module(module)
        patch.setattr(module, "MEMORY_ROUNDS", 1)
        yield module


def rows(name: str, count: int) -> EvalSet:
    taxonomy = Taxonomy("tiny", ("a", "b"))
    return EvalSet(name, name, name, [generated(random.Random(f"{name}{n}"), taxonomy) for n in range(count)])


def test_each_file_type_is_measured_once_and_shown(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_GUARD_CACHE", str(tmp_path / "cache"))
    guard = tiny_guard_folder(tmp_path, adapter_kind="alora", max_length=400)
    file = tiny_gguf(tmp_path / "base.gguf", base_model.load(str(tmp_path / "base")).model)
    small = {"prompt_tokens": 60, "answer_tokens": 20, "rounds": 1}
    sets, held_out = [rows("one", 12), rows("two", 10)], rows("validation", 30)
    plan = script.Plan(guard, file, tmp_path / "out", sets, held_out, **small)
    script.measure(plan, ["F16"])
    measured: list[str] = []
    whole = script.entry
    monkeypatch.setattr(script, "entry", lambda plan, kind, own: measured.append(kind) or whole(plan, kind, own))
    script.measure(plan, ["F16", "Q8_0"])
    script.measure(plan, ["F16", "Q8_0"])
    assert measured == ["Q8_0"]
    found = json.loads((tmp_path / "out" / "tradeoff.json").read_text("utf-8"))
    f16, q8 = (found["kinds"][kind] for kind in ("F16", "Q8_0"))
    assert f16["bytes"] > q8["bytes"]
    assert f16["parity"]["feature_median"] < q8["parity"]["feature_median"]
    for entry in (f16, q8):
        assert min(entry[name] for name in ("prefill", "decode", "check")) > 0
        assert entry["overhead"]["value"] > 0
        for name, count in (("one", 12), ("two", 10)):
            before, after = (entry["sets"][name][when] for when in ("before", "after"))
            assert before["rows"] == count
            assert before["auprc"] == pytest.approx(after["auprc"])  # a fit keeps the order of responses
            assert abs(found["own"][name]["auprc"] - before["auprc"]) == pytest.approx(
                abs(entry["sets"][name]["auprc_lost"]["value"]), abs=1e-9
            )
    table = (tmp_path / "out" / "tradeoff.md").read_text("utf-8")
    assert table.count("| F16 |") == table.count("| Q8_0 |") == 4
    assert ElementTree.parse(tmp_path / "out" / "tradeoff.svg").getroot().tag.endswith("svg")
    found["own"]["one"]["auprc"] = None  # as of rows that are all harmless
    script.picture(found, tmp_path / "without.svg")
    assert ElementTree.parse(tmp_path / "without.svg").getroot().tag.endswith("svg")
    script.measure(script.Plan(guard, file, tmp_path / "out", sets, rows("validation", 29), **small), ["Q8_0"])
    assert measured == ["Q8_0", "Q8_0"]
    assert "Q8_0: 1 of 1" in capsys.readouterr().err


def test_rows_are_taken_evenly(script: Any) -> None:
    part = rows("one", 10)
    assert script.evenly(part, 3).examples == [part.examples[place] for place in (0, 3, 6)]
    assert script.evenly(part, None).examples == script.evenly(part, 99).examples == part.examples
    with pytest.raises(ConfigError, match="allowed: 1 or more"):
        script.evenly(part, 0)
