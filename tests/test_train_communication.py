"""The arithmetic of docs/scale.md holds for what two training processes of a tiny model exchange in a step."""

import sys
from pathlib import Path

import pytest
from tiny import tiny_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from train_communication import measure


def test_what_processes_exchange_in_a_step_is_what_the_formulas_say(tmp_path: Path) -> None:
    found = {case["case"]: case for case in measure(str(tiny_folder(tmp_path)), 2)}
    assert sorted(found) == ["DDP, alora", "DDP, lora", "FSDP2, alora", "FSDP2, lora"]
    for name, case in found.items():
        if name.startswith("DDP"):
            assert (case["summed"], case["gathered"]) == (case["summed_by_formula"], 0)
        else:  # shards are padded to one size
            assert case["summed"] == pytest.approx(case["summed_by_formula"], rel=0.02)
            assert case["gathered"] == pytest.approx(case["gathered_by_formula"], rel=0.02)
    assert found["FSDP2, alora"]["gathered"] > found["FSDP2, lora"]["gathered"] > 0
