"""``lora-guard bulk`` without Ray, or with a word it does not know: one line, and no file."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_guard import bulk_command
from lora_guard.cli import app


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["bulk", *words])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    return line


def test_without_ray_one_line_names_the_extra_and_the_command_for_small_input(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bulk_command, "find_spec", lambda name: None)
    line = run("--input", "a.jsonl", "--output", str(tmp_path / "out"))
    assert "pip install 'lora-guard[scale]'" in line
    assert "lora-guard moderate --input" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--target", "answer"], "target 'answer' is unknown"), (["--engine", "tensor"], "engine 'tensor' is unknown")],
)
def test_a_word_that_is_unknown_is_one_line(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_command, "find_spec", lambda name: object())
    assert message in run("--input", "a.jsonl", "--output", "out", *words)
