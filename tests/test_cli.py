"""The command line: documented forms out, one line and a non-zero exit code for what is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from guards import tiny_guard_folder
from typer.testing import CliRunner

from lora_guard import Conversation, Guard
from lora_guard.cli import app

COMMANDS = ["train", "eval", "moderate", "chat", "doctor"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_guard_folder(tmp_path_factory.mktemp("guard"))


def run(*words: str, text: str | None = None) -> Any:
    result = CliRunner().invoke(app, list(words), input=text)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refusal(*words: str) -> str:
    """The one line that a wrong call prints."""
    result = run(*words)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(f"  {command} " in result.stdout for command in COMMANDS)


def test_one_verdict_is_one_line_of_json(folder: Path) -> None:
    words = ["moderate", "--guard", str(folder), "--prompt", "Hello", "--response", "Hi", "--json"]
    result = run(*words)
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    verdict = json.loads(result.stdout)
    assert list(verdict) == ["flagged", "score", "threshold", "target", "categories"]
    assert verdict["target"] == "response"
    assert json.loads(run(*words, "--target", "prompt").stdout)["target"] == "prompt"
    expected = Guard.load(folder).moderate(Conversation.of("Hello", "Hi"))
    assert verdict["score"] == pytest.approx(expected.score, abs=0.03)


def test_a_verdict_for_people_is_a_table(folder: Path) -> None:
    result = run("moderate", "--guard", str(folder), "--prompt", "Hello [bold]there[/bold]")
    assert "flagged from" in result.stdout
    assert "prompt" in result.stdout


def test_rows_go_from_file_to_file_and_from_stdin_to_stdout(folder: Path, tmp_path: Path) -> None:
    rows = '{"prompt": "a"}\n{"prompt": "b", "response": "c"}\n'
    (tmp_path / "in.jsonl").write_text(rows, "utf-8")
    out = tmp_path / "out.jsonl"
    words = ["moderate", "--guard", str(folder), "--input"]
    assert run(*words, str(tmp_path / "in.jsonl"), "--output", str(out)).exit_code == 0
    piped = run(*words, "-", text=rows)
    assert piped.exit_code == 0
    written = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [json.loads(line) for line in piped.stdout.splitlines()] == written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["moderate"], "give either --prompt"),
        (["moderate", "--prompt", "a", "--input", "b"], "give either --prompt"),
        (["moderate", "--prompt", "a", "--target", "answer"], "target 'answer' is unknown"),
        (["moderate", "--prompt", "a", "--target", "response"], "needs a message of role 'assistant'"),
        (["moderate", "--prompt", "a", "--guard", "nobody/nothing"], "guard 'nobody/nothing' not found"),
        (["moderate", "--input", "none.jsonl"], "input 'none.jsonl' not found"),
        (
            ["eval", "--data", "none.jsonl", "--out", "out", "--guard", "nobody/nothing"],
            "guard 'nobody/nothing' not found",
        ),
        (["train", "out", "--config", "none.yaml"], "config none.yaml cannot be read"),
        (["train", "out", "--set", "train=[{path: a.jsonl}]", "--set", "epoch=3"], "did you mean 'epochs'"),
        (["train", "out", "--set", "train=[{path: a.jsonl}]", "--set", "base_model=no/such"], "base model 'no/such'"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(*words)


def test_unreadable_or_empty_data_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    out = str(tmp_path / "out")
    for name, message in (("none.jsonl", "cannot be read"), ("empty.jsonl", "is empty")):
        words = ["eval", "--guard", str(folder), "--out", out, "--data", str(tmp_path / name)]
        assert message in refusal(*words)


def test_several_files_may_follow_data(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "unsafe": true}\n{"prompt": "b", "unsafe": false}\n')
    files = [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]
    words = ["eval", "--guard", str(folder), "--resamples", "10", "--data", *files, "--out", str(tmp_path / "out")]
    assert run(*words).exit_code == 0
    assert set(json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))["datasets"]) == {"one", "two"}


def test_ctrl_c_is_one_line_and_its_own_exit_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Guard, "moderate", interrupt)
    result = run("moderate", "--guard", str(folder), "--prompt", "a")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; what was written stays\n"


def test_a_chat_answers_each_line_and_shows_its_verdicts(folder: Path) -> None:
    result = run("chat", "--guard", str(folder), "--max-tokens", "4", text="Hello\n\nAnd now?\n")
    assert result.exit_code == 0
    assert result.stdout.count("prompt: ") == 2
    assert result.stdout.count("response: ") == 2


def test_a_blocking_chat_says_what_it_withheld(tmp_path: Path) -> None:
    folder = tiny_guard_folder(tmp_path, threshold=0.0)
    result = run("chat", "--guard", str(folder), "--block", "--max-tokens", "4", text="Hello\n")
    assert "withheld: the prompt was flagged" in result.stdout
    assert "response: " not in result.stdout


def test_the_doctor_checks_everything_and_fails_when_something_is_bad(folder: Path) -> None:
    findings = json.loads(run("doctor", "--guard", str(folder), "--json").stdout)
    names = ["install", "default model", "guard", "memory", "disk", "threads", "device"]
    assert [finding["what"] for finding in findings] == names
    assert all(set(finding) == {"what", "state", "found", "advice"} for finding in findings)
    bad = run("doctor", "--guard", "nobody/nothing")
    assert bad.exit_code == 1
    assert "bad" in bad.stdout
    assert "-> train one, or name another with --guard" in bad.stdout


def test_a_reader_that_leaves_early_sees_no_traceback(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' * 600, "utf-8")
    program = f"{sys.executable} -m lora_guard moderate --guard {folder} --input {tmp_path / 'in.jsonl'} | head -n 1"
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.count("\n") == 1
    assert "Traceback" not in result.stderr
