"""The command line: documented forms out, one line and a non-zero exit code for what is wrong."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guards import tiny_guard_folder
from typer.testing import CliRunner

from lora_guard import ChatEnd, Check, Conversation, Guard, Verdict
from lora_guard.cli import app
from lora_guard.terminal import printable, verdict_table

COMMANDS = ["train", "eval", "calibrate", "moderate", "bulk", "chat", "serve", "export", "bench", "doctor"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_guard_folder(tmp_path_factory.mktemp("guard"))


def run(*words: str, text: str | bytes | None = None) -> Any:
    result = CliRunner().invoke(app, list(words), input=text)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refusal(*words: str, text: str | bytes | None = None) -> str:
    """The one line that a wrong call prints, behind the progress of what went well."""
    result = run(*words, text=text)
    assert result.exit_code == 1
    *before, line = result.stderr.splitlines()
    assert all(" rows, ETA " in shown for shown in before)
    assert line.startswith("error: ")
    return str(line)


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(f"  {command} " in result.stdout for command in COMMANDS)
    assert sorted(str(command.callback.__name__) for command in app.registered_commands if command.callback) == sorted(
        COMMANDS
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Usage: lora-guard {command} " in result.stdout


def test_help_of_a_command_loads_no_torch() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from lora_guard.cli import app\n"
        "assert CliRunner().invoke(app, ['moderate', '--help']).exit_code == 0\n"
        "assert CliRunner().invoke(app, ['--version']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'sklearn', 'matplotlib'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_one_verdict_is_one_line_of_json(folder: Path) -> None:
    words = ["moderate", "--guard", str(folder), "--prompt", "Hello", "--response", "Hi", "--json"]
    result = run(*words)
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    verdict = json.loads(result.stdout)
    assert list(verdict) == ["flagged", "score", "threshold", "target", "categories"]
    assert list(verdict["categories"]) == ["a", "b"]
    assert all(list(decision) == ["flagged", "score", "threshold"] for decision in verdict["categories"].values())
    assert verdict["target"] == "response"
    assert json.loads(run(*words, "--target", "prompt").stdout)["target"] == "prompt"


@pytest.mark.parametrize("response", [None, "", "Hi 🍞"])
def test_a_text_has_the_same_verdict_in_python_on_the_command_line_and_in_a_file(
    folder: Path, tmp_path: Path, response: str | None
) -> None:
    expected = Guard.load(folder).moderate(Conversation.of("Hello", response)).to_dict()
    words = ["moderate", "--guard", str(folder)]
    alone = run(*words, "--json", "--prompt", "Hello", *(["--response", response] if response is not None else []))
    assert json.loads(alone.stdout) == expected
    row = {"prompt": "Hello", "response": response}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    run(*words, "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    assert json.loads((tmp_path / "out.jsonl").read_text("utf-8")) == {**row, "verdict": expected}


def test_a_verdict_for_people_is_a_table_with_the_text_as_it_is(folder: Path) -> None:
    result = run("moderate", "--guard", str(folder), "--prompt", "[b]x[/b] :smile:", "--response", "")
    assert result.exit_code == 0
    assert "flagged from 0.500 on" in result.stdout
    result = run("moderate", "--guard", str(folder), "--prompt", "[b]x[/b] :smile:")
    assert "[b]x[/b]" in result.stdout
    assert ":smile:" in result.stdout


def test_a_table_names_the_threshold_of_each_target_that_it_shows() -> None:
    prompt, response = Verdict(True, 0.7, 0.6, "prompt", {}), Verdict(True, 0.5, 0.4, "response", {})
    assert verdict_table([("a", prompt), ("b", response)]).caption == "flagged from: prompt 0.600, response 0.400"
    assert verdict_table([("a", prompt), ("b", prompt)]).caption == "flagged from 0.600 on"


def test_rows_go_from_file_to_file_and_from_stdin_to_stdout(folder: Path, tmp_path: Path) -> None:
    rows = '{"prompt": "a"}\n{"prompt": "b", "response": "c"}\n'
    (tmp_path / "in.jsonl").write_text(rows, "utf-8")
    out = tmp_path / "out.jsonl"
    words = ["moderate", "--guard", str(folder), "--input"]
    assert run(*words, str(tmp_path / "in.jsonl"), "--output", str(out)).exit_code == 0
    piped = [
        run(*words, "-", text=rows).stdout,
        run(*words, str(tmp_path / "in.jsonl")).stdout,
        run(*words, "-", "--output", str(tmp_path / "piped.jsonl"), text=rows).stdout
        or (tmp_path / "piped.jsonl").read_text("utf-8"),
    ]
    assert piped == [out.read_text("utf-8")] * 3
    assert [json.loads(line)["prompt"] for line in piped[0].splitlines()] == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["moderate"], "give either --prompt"),
        (["moderate", "--prompt", "a", "--input", "b"], "give either --prompt"),
        (["moderate", "--response", "a"], "give either --prompt"),
        (["moderate", "--input", "b", "--response", "a"], "--response goes with --prompt"),
        (["moderate", "--prompt", "a", "--output", "b"], "--output goes with --input"),
        (["moderate", "--prompt", "a", "--target", "answer"], "target 'answer' is unknown"),
        (["moderate", "--prompt", "a", "--target", "responses"], "did you mean 'response'? allowed: prompt, response"),
        (["moderate", "--prompt", "a", "--target", "response"], "needs a message of role 'assistant'"),
        (["moderate", "--prompt", "a", "--guard", "nobody/nothing"], "guard 'nobody/nothing' not found"),
        (["moderate", "--prompt", "a", "--guard", "."], ". is not a guard: it has no guard.json"),
        (["moderate", "--input", "none.jsonl"], "input 'none.jsonl' not found"),
        (["moderate", "--input", "."], "input '.' not found"),
        (["eval", "--data", "none.jsonl", "--out", "out", "--guard", "nobody/nothing"], "guard 'nobody/nothing' not"),
        (["chat", "--guard", "nobody/nothing"], "guard 'nobody/nothing' not found"),
        (["moderate", "--prompt", "a", "--policy", "strct"], "did you mean 'strict'? allowed: strict, balanced"),
        (["calibrate", "--data", "a", "--out", "out", "--guard", "nobody/nothing"], "guard 'nobody/nothing' not found"),
        (["calibrate", "--data", "a", "--out", "/"], "/ exists and is not a guard; allowed: a new folder"),
        (["calibrate", "--data", "a", "--out", "o", "--best-f1", "--target-fpr", "0"], "several rules for one policy"),
        (["train", "out", "--config", "none.yaml"], "config none.yaml cannot be read"),
        (["train", "out"], "field 'train' is missing"),
        (["train", "out", "--set", "train=[{path: a.jsonl}]", "--set", "epoch=3"], "did you mean 'epochs'"),
        (["train", "out", "--set", "train=[{path: a.jsonl}]", "--set", "adapter=lorra"], "'adapter'"),
        (["train", "out", "--set", "train=[{path: a.jsonl}]", "--set", "epochs"], "not of the form key=value"),
        (["train", "out", "--set", "train=[{path: a.jsonl}]", "--split", "papers"], "field 'split' has value 'papers'"),
        (["train", "out", "--set", "train=[{path: a.jsonl}]", "--set", "base_model=no/such"], "base model 'no/such'"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(*words)


def test_rows_that_cannot_be_read_or_written_are_one_line(folder: Path, tmp_path: Path) -> None:
    words = ["moderate", "--guard", str(folder), "--input"]
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"prompt": "a"}\n', "utf-8")
    bad.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    for output in ([], ["--output", str(tmp_path / "out.jsonl")]):
        assert "bad.jsonl:2: not UTF-8 at byte 12" in refusal(*words, str(bad), *output)
    assert "stdin:2: not UTF-8" in refusal(*words, "-", text=bad.read_bytes())
    assert "input and output are the same file" in refusal(*words, str(good), "--output", str(good))
    assert "cannot be written: Is a directory" in refusal(*words, str(good), "--output", str(tmp_path))
    nowhere = str(tmp_path / "none" / "out.jsonl")
    assert "cannot be written: No such file" in refusal(*words, "-", "--output", nowhere, text='{"prompt": "a"}\n')
    bad.write_text('{"my\\nfield": 1}\n', "utf-8")
    assert "bad.jsonl:1: row has my field; needed: prompt" in refusal(*words, str(bad))
    assert good.read_text("utf-8") == '{"prompt": "a"}\n'


def test_unreadable_or_empty_data_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{', "utf-8")
    out = str(tmp_path / "out")
    for name, message in (
        ("none.jsonl", "cannot be read"),
        ("empty.jsonl", "is empty"),
        ("bad.jsonl", "bad.jsonl:2: not JSON"),
    ):
        path = str(tmp_path / name)
        assert message in refusal("eval", "--guard", str(folder), "--out", out, "--data", path)
        base = f"base_model={folder.parent / 'base'}"
        assert message in refusal("train", f"{out}-{name}", "--set", base, "--set", f"train=[{{path: {path}}}]")


def test_an_evaluation_that_cannot_be_written_is_one_line(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "unsafe": true}\n{"prompt": "b", "unsafe": false}\n', "utf-8")
    words = ["eval", "--guard", str(folder), "--data", str(rows), "--out", str(rows)]
    assert "rows.jsonl cannot be written: File exists" in refusal(*words)


def test_a_run_folder_that_cannot_be_made_or_is_in_use_is_one_line(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n', "utf-8")
    train = ["--set", f"train=[{{path: {rows}}}]"]
    assert "cannot be written: Not a directory" in refusal("train", str(rows / "run"), *train)
    assert "is not empty; allowed: a new folder" in refusal("train", str(tmp_path), *train)


def test_several_files_may_follow_data(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "unsafe": true}\n{"prompt": "b", "unsafe": false}\n')
    files = [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]
    words = ["eval", "--guard", str(folder), "--resamples", "10", "--data", *files, "--out", str(tmp_path / "out")]
    assert run(*words).exit_code == 0
    assert set(json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))["datasets"]) == {"one", "two"}


def test_a_suite_is_a_folder_and_its_text_can_be_left_out_of_the_report(folder: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "one.jsonl").write_text(
        '{"prompt": "quotable", "unsafe": true}\n{"prompt": "quotable", "unsafe": false}\n'
    )
    words = ["eval", "--guard", str(folder), "--resamples", "10", "--suite", str(suite), "--out", str(tmp_path / "out")]
    assert run(*words).exit_code == 0
    assert "quotable" in (tmp_path / "out" / "report.html").read_text("utf-8")
    assert run(*words, "--no-text").exit_code == 0
    assert "quotable" not in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_an_evaluation_can_be_put_into_the_guards_card_and_replaces_the_former_one(tmp_path: Path) -> None:
    guard = tiny_guard_folder(tmp_path / "guard", categories=("a",))
    (guard / "README.md").write_text("# Mine\n\n## Evaluation\n\nOld.\n\n## Limits\n\nMany.\n", "utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "unsafe": true, "categories": {"a": true}}\n{"prompt": "b", "unsafe": false}\n')
    words = ["eval", "--guard", str(guard), "--resamples", "10", "--data", str(rows), "--perturb", "--card"]
    assert run(*words, "--out", str(tmp_path / "out")).exit_code == 0
    card = (guard / "README.md").read_text("utf-8")
    assert "Old." not in card
    assert card.startswith("# Mine\n\n## Evaluation\n\nHarmfulness at the thresholds of policy balanced")
    assert card.endswith("\n\n## Limits\n\nMany.\n")
    assert "| rows | 2 | " in card
    assert "| zero-width | " in card
    assert "- rows: No control was measured on this data." in card


def test_public_sets_that_are_left_out_are_an_exit_code_after_the_results(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(hub: str, *_: object, **__: object) -> list[dict[str, str]]:
        if hub != "Paul/XSTest":
            raise PermissionError("given out on request")
        return [{"prompt": "p", "type": "homonyms", "label": label} for label in ("safe", "unsafe")]

    monkeypatch.setattr("datasets.load_dataset", load)
    found = run("eval", "--guard", str(folder), "--resamples", "10", "--suite", "public", "--out", str(tmp_path / "o"))
    assert found.exit_code == 1
    assert "left out 10 public sets: hub data set" in found.output
    assert "harmbench is left out: hub data set" in (tmp_path / "o" / "results.md").read_text("utf-8")


@pytest.mark.extras
def test_a_server_is_refused_a_policy_that_the_guard_lacks_before_it_loads_a_model(folder: Path) -> None:
    assert "policy 'harsh'" in refusal("serve", "--guard", str(folder), "--policy", "harsh")


def test_an_evaluation_on_nothing_is_one_line(folder: Path, tmp_path: Path) -> None:
    assert "give --data FILE or --suite FOLDER" in refusal("eval", "--guard", str(folder), "--out", str(tmp_path / "o"))


def test_nothing_a_model_says_controls_the_terminal() -> None:
    assert printable("a\x1b[2Jb\r\nc\td\u202e") == "a\ufffd[2Jb\ufffd\nc\td\ufffd"
    assert printable("a\u3000b\xa0c") == "a\u3000b\xa0c"


def test_ctrl_c_is_one_line_and_its_own_exit_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for method, words in (
        ("moderate", ["moderate", "--prompt", "a"]),
        ("load", ["moderate", "--prompt", "a"]),
        ("stream", ["chat"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Guard, method, interrupt)
            result = run(*words, "--guard", str(folder), text="Hello\n")
            assert result.exit_code == 130
            assert result.stderr == "interrupted; what was written stays\n"


def test_a_chat_answers_each_line_and_shows_its_verdicts(folder: Path) -> None:
    result = run("chat", "--guard", str(folder), "--max-tokens", "4", text="Hello\n\nAnd now?\n")
    assert result.exit_code == 0
    assert result.stdout.count("prompt: ") == 2
    assert result.stdout.count("response: ") == 2


def test_a_chat_remembers_what_was_said_and_its_system_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Conversation] = []
    stream = Guard.stream

    def record(guard: Guard, conversation: Conversation, *settings: Any, **sampling: Any) -> Any:
        asked.append(conversation)
        return stream(guard, conversation, *settings, **sampling)

    monkeypatch.setattr(Guard, "stream", record)
    run("chat", "--guard", str(folder), "--max-tokens", "2", "--system", "Be kind.", text="Hello\nAnd now?\n")
    first, second = asked
    assert first == Conversation.of("Hello", system="Be kind.")
    assert [message.role for message in second.messages] == ["system", "user", "assistant", "user"]
    assert second.messages[:2] == first.messages


def test_a_blocking_chat_says_what_it_withheld(tmp_path: Path) -> None:
    folder = tiny_guard_folder(tmp_path, threshold=0.0)
    result = run("chat", "--guard", str(folder), "--block", "--max-tokens", "4", text="Hello\n")
    assert "withheld: the prompt was flagged" in result.stdout
    assert "response: " not in result.stdout


@pytest.mark.parametrize("block", [[], ["--block"]])
def test_a_chat_checks_every_so_many_tokens_and_says_how_often(tmp_path: Path, block: list[str]) -> None:
    words = ["chat", "--guard", str(tiny_guard_folder(tmp_path, threshold=1.0)), "--max-tokens", "12", *block]
    shown = [run(*words, "--check-every", n, text="Hello\n").stdout for n in ("4", "1", "100")]
    counts = [int(re.findall(r"response: ok .*, (\d+) checks?\n", text)[0]) for text in shown]
    assert counts[0] >= 3
    assert counts[1] == 12
    assert counts[2] < counts[0]
    answers = {text.partition("\nprompt: ")[0] for text in shown}
    assert len(answers) == 1
    assert answers.pop().strip()


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_a_chat_refuses_an_interval_that_is_none(value: str) -> None:
    result = run("chat", "--check-every", value)
    assert result.exit_code == 2
    assert "Invalid value for '--check-every'" in result.stderr


def test_a_withheld_rest_is_said_in_a_line_and_what_was_shown_stays_in_the_conversation(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Conversation] = []
    fine, bad = (Verdict(score > 0.5, score, 0.5, "response", {}) for score in (0.1, 0.9))
    prompt = Verdict(False, 0.2, 0.5, "prompt", {})

    def scripted(guard: Guard, conversation: Conversation, *_: object, **__: object) -> Iterator[str | Check | ChatEnd]:
        asked.append(conversation)
        yield Check(0, prompt, False)
        yield Check(4, fine, False)
        yield "Mix flour"
        yield Check(8, bad, True)
        yield ChatEnd("Mix flour", prompt, bad, "content_filter")

    monkeypatch.setattr(Guard, "stream", scripted)
    shown = run("chat", "--guard", str(folder), "--block", text="Hello\nAnd now?\n").stdout
    assert shown == 2 * (
        "Mix flour\nwithheld: the rest of the answer was flagged\n"
        "prompt: ok 0.200 against 0.500\nresponse: flagged 0.900 against 0.500, 2 checks\n"
    )
    assert [message.content for message in asked[1].messages] == ["Hello", "Mix flour", "And now?"]


@pytest.mark.parametrize(
    ("words", "text", "message"),
    [
        ([], b"\xff\n", "the message is not UTF-8"),
        (["--top-p", "0"], "Hello\n", "top_p is 0.0; allowed"),
        ([], "x" * 2000 + "\n", "allowed: 512"),
    ],
)
def test_a_chat_that_cannot_go_on_is_one_line(folder: Path, words: list[str], text: str | bytes, message: str) -> None:
    assert message in refusal("chat", "--guard", str(folder), "--max-tokens", "2", *words, text=text)


def test_the_doctor_checks_everything_and_fails_when_something_is_bad(folder: Path) -> None:
    findings = json.loads(run("doctor", "--guard", str(folder), "--json").stdout)
    names = ["install", "default model", "guard", "memory", "disk", "threads", "device"]
    assert [finding["what"] for finding in findings] == names
    assert all(set(finding) == {"what", "state", "found", "advice"} for finding in findings)
    bad = run("doctor", "--guard", "nobody/nothing")
    assert bad.exit_code == 1
    assert "bad" in bad.stdout
    assert "-> train one, or name another with --guard" in bad.stdout
    assert run("doctor", "--guard", "nobody/nothing", "--json").exit_code == 1


def test_a_reader_that_leaves_early_sees_no_traceback(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' * 600, "utf-8")
    program = f"{sys.executable} -m lora_guard moderate --guard {folder} --input {tmp_path / 'in.jsonl'} | head -n 1"
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.count("\n") == 1
    assert "Traceback" not in result.stderr
