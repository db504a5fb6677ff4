"""The commands and programs in README and quickstart run as they stand there; the generated page is up to date."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLE_FOLDER = "/tmp/lora-guard-quickstart"


def run_blocks(page: str, folder: Path) -> int:
    """Run a page's blocks in order, with its example folder replaced; how many there were."""
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}  # the real model is faster with all of them
    environment = {**os.environ, **threads, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    blocks = BLOCK.findall((ROOT / page).read_text("utf-8"))
    for language, text in blocks:
        program = text.replace(EXAMPLE_FOLDER, str(folder))
        command = ["bash", "-euo", "pipefail", "-c", program] if language == "bash" else [sys.executable, "-c", program]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
        assert "Traceback" not in result.stderr, f"{text}\n{result.stderr}"
    return len(blocks)


def test_the_readmes_commands_work(tmp_path: Path) -> None:
    assert run_blocks("README.md", tmp_path) == 2


def test_the_quickstarts_commands_work(tmp_path: Path) -> None:
    assert run_blocks("docs/quickstart.md", tmp_path) >= 6
    assert len((tmp_path / "verdicts.jsonl").read_text("utf-8").splitlines()) == len(
        (ROOT / "tests/data/tame.jsonl").read_text("utf-8").splitlines()
    )
    for name in ("run/guard/guard.json", "run/loss.png", "run/pr.png", "eval/results.json", "eval/results.md"):
        assert (tmp_path / name).is_file()


def test_the_command_line_page_is_up_to_date() -> None:
    subprocess.run([sys.executable, "docs/generate_cli.py", "--check"], cwd=ROOT, check=True)
