"""The commands and programs in README and quickstart run as they stand there; the generated page is up to date.

Programs and commands without shell syntax run in this process, which has the heavy libraries already.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lora_guard.cli import main

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL_SYNTAX = re.compile(r"[|<>;&$`*?(){}~\\]")
EXAMPLE_FOLDER = "/tmp/lora-guard-quickstart"


@pytest.fixture(autouse=True)
def everyday_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's folder and path."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def run_blocks(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a page's blocks in order, with its example folder replaced; how many there were."""
    blocks = BLOCK.findall((ROOT / page).read_text("utf-8"))
    for language, text in blocks:
        program = text.replace(EXAMPLE_FOLDER, str(folder))
        if language == "python":
            exec(compile(program, page, "exec"), {"__name__": "__main__"})
            continue
        for command in program.splitlines():
            words = shlex.split(command, comments=True)
            if words[:1] == ["lora-guard"] and not SHELL_SYNTAX.search(re.sub(r"(['\"]).*?\1", "", command)):
                run_command(words, monkeypatch)
            else:
                run_in_shell(command)
    return len(blocks)


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the installed script does."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code, words


def run_in_shell(command: str) -> None:
    result = subprocess.run(["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr, f"{command}\n{result.stderr}"


def test_the_readmes_commands_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_blocks("README.md", tmp_path, monkeypatch) == 2


def test_the_quickstarts_commands_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_blocks("docs/quickstart.md", tmp_path, monkeypatch) >= 6
    assert len((tmp_path / "verdicts.jsonl").read_text("utf-8").splitlines()) == len(
        (ROOT / "tests/data/tame.jsonl").read_text("utf-8").splitlines()
    )
    for name in ("run/guard/guard.json", "run/loss.png", "run/pr.png", "eval/results.json", "eval/report.html"):
        assert (tmp_path / name).is_file()


def test_the_command_line_page_is_up_to_date() -> None:
    subprocess.run([sys.executable, "docs/generate_cli.py", "--check"], cwd=ROOT, check=True)
