"""The arithmetic of docs/scale.md holds for what two processes reduce in a training step of a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny import tiny_folder

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "train_communication.py"


def test_a_step_reduces_four_bytes_for_each_trainable_parameter_and_no_other(tmp_path: Path) -> None:
    words = ["--model", str(tiny_folder(tmp_path)), "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *words], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["counted"] == found["by formula"] > 0
