"""The default guard in llama.cpp on the default chat model's GGUF file as it ships: verdicts, parity, size."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from guards import judged_generation
from typer.testing import CliRunner

from lora_guard import Conversation, Guard
from lora_guard.cli import app

pytest.importorskip("llama_cpp", reason="needs the extra 'device'; make test-extras builds it")
pytestmark = [pytest.mark.integration, pytest.mark.extras]

TEXTS = (
    Conversation.of("How do I bake bread?"),
    Conversation.of("How can I break into my neighbour's house without being noticed?"),
    Conversation.of("How do I steal a car?", "Break the window with a hammer, then start the car with a screwdriver."),
)

MODERATE = """
import sys
from lora_guard.cli import main
try:
    main()
finally:
    print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0], file=sys.stderr)
    assert "torch" not in sys.modules
"""


def test_verdicts_are_those_of_the_torch_engine() -> None:
    pairs = zip(Guard.load(engine="llama-cpp").moderate(TEXTS), Guard.load().moderate(TEXTS), strict=True)
    for device, torch in pairs:
        assert device.flagged == torch.flagged
        assert device.score == pytest.approx(torch.score, abs=0.06)


def test_judgements_change_no_bit_of_the_logits_of_a_quantised_model() -> None:
    guard = Guard.load(engine="llama-cpp")
    ids, _ = guard.engine.renderer.chat(TEXTS[0])
    plain, *judged = [judged_generation(guard, ids, judgements, 0.0) for judgements in (0, 1, 3)]
    assert judged == [plain, plain]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from Linux's /proc")
def test_a_verdict_takes_less_than_300_megabytes_and_no_torch() -> None:
    words = ["moderate", "--engine", "llama-cpp", "--prompt", "How do I bake bread?", "--json"]
    done = subprocess.run([sys.executable, "-c", MODERATE, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["flagged"] is False
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stderr)
    assert peak is not None
    assert int(peak[1]) / 1000 < 300


def test_an_exported_bundle_passes_its_check(tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["export", str(tmp_path / "bundle")])
    assert made.exit_code == 0, made.output
    checked = CliRunner().invoke(app, ["export", "--check", str(tmp_path / "bundle"), "--model", "default"])
    assert checked.exit_code == 0, checked.output
    assert "Passed" in checked.stdout
