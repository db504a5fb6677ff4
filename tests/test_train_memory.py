"""The arithmetic of docs/scale.md holds for what a training step on a tiny model holds, tensor by tensor."""

import sys
from pathlib import Path

import pytest
from tiny import tiny_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from train_memory import step


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_what_a_step_holds_is_what_the_formulas_say(tmp_path: Path, architecture: str) -> None:
    base = str(tiny_folder(tmp_path, architecture))
    activated = step(base, "alora", 3, 50, slim=False)
    assert activated.trained == activated.trained_by_formula
    assert activated.prefixes == activated.prefixes_by_formula > 0
    plain, slim = (step(base, "lora", 3, 50, slim=slim) for slim in (False, True))
    assert plain.trained == slim.trained == activated.trained
    assert slim.backward_by_formula is not None
    assert slim.backward_by_formula <= slim.backward < plain.backward / 2
    assert activated.backward < plain.backward / 5
