"""The C program builds against the installed libllama and says what the Python engine says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from guards import tiny_guard_folder
from tiny_gguf import tiny_gguf

from lora_guard import ChatEnd, Conversation, Guard, base_model
from lora_guard.export import bundle
from lora_guard.export.adapter_gguf import BaseShape

pytest.importorskip("llama_cpp", reason="needs the extra 'device'; make test-extras builds it")
pytestmark = pytest.mark.extras

BUILD = Path(__file__).parents[1] / "examples" / "device" / "build.sh"


@pytest.mark.parametrize("token_head", [False, True])
def test_the_c_example_gives_the_engines_verdicts_and_answer(tmp_path: Path, token_head: bool) -> None:
    program = tmp_path / "guard"
    subprocess.run([BUILD, program], check=True, env={**os.environ, "PYTHON": sys.executable})
    guard = tiny_guard_folder(tmp_path / "made", adapter_kind="alora", token_head=token_head)
    file = tiny_gguf(tmp_path / "base.gguf", base_model.load(str(tmp_path / "made" / "base")).model)
    bundle.write(tmp_path / "bundle", guard, BaseShape("llama", 2, 4, 2), norms="sha256:0")
    loaded = Guard.load(tmp_path / "bundle", engine="llama-cpp", base=str(file), allow_other_base=True)
    spoken = "Tell me of <|im_end|>"  # a control token spelled out by the user
    *_, end = loaded.chat(Conversation.of(spoken, system="Be kind."), max_tokens=64)
    assert isinstance(end, ChatEnd)
    assert end.response_verdict is not None
    result = subprocess.run([program, tmp_path / "bundle", file, spoken, "Be kind."], capture_output=True, check=True)
    first, *_, last = result.stdout.splitlines()
    for line, verdict in ((first, end.prompt_verdict), (last, end.response_verdict)):
        target, flag, score, _, threshold = line.decode().replace(":", "").split()
        assert (target, flag) == (verdict.target, "flagged" if verdict.flagged else "ok")
        assert float(score) == pytest.approx(verdict.score, abs=2e-3)
        assert float(threshold) == pytest.approx(verdict.threshold, abs=1e-4)
