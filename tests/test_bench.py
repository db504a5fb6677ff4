"""Each bench on a tiny model: its figures are there, both of its sides really run, and stdout holds one line."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guards import tiny_guard_folder
from typer.testing import CliRunner

from lora_guard.bench import chat, check, dual_path, grow, memory, score, train
from lora_guard.bench.chat import prompt_of, stream
from lora_guard.bench.paper import PaperGuard, padded
from lora_guard.bench.report import Report
from lora_guard.bench.rows import EVAL_FILE, TRAIN_FILE
from lora_guard.bench.setup import Setup
from lora_guard.cli import app
from lora_guard.data.example import Example
from lora_guard.engine.torch_engine import TorchEngine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_guard_folder(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def setup(folder: Path) -> Setup:
    return Setup(guard=str(folder), rows=12, deadline=math.inf)


def measured(report: Report, *names: str) -> None:
    """These figures, and perhaps more, have finite values that are not zero."""
    for name in names:
        value = report.figures[name].value
        assert value is not None, name
        assert math.isfinite(value), name
        assert value > 0, name


def count(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str) -> list[Any]:
    """Record the arguments of each call to a method."""
    calls: list[Any] = []
    original: Callable[..., Any] = getattr(owner, method)

    def record(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments[1:])
        return original(*arguments, **named)

    monkeypatch.setattr(owner, method, record)
    return calls


def test_a_prompt_has_the_asked_length_and_begins_the_answer(setup: Setup) -> None:
    guard = setup.load_guard()
    renderer = guard.engine.renderer
    prompt = prompt_of(renderer, [Example("How do I bake bread?", "Mix.", None, {}, "x")], 100)
    assert len(prompt.ids) == 100
    text = guard.engine.base.tokenizer.decode(prompt.ids)  # type: ignore[attr-defined]
    assert text.startswith("<|im_start|>user\nHow do I bake bread? Mix.")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.ids[: prompt.end][-len(prompt.content) :] == prompt.content


def test_a_stream_is_checked_on_the_prompt_every_16_tokens_and_at_the_end(setup: Setup) -> None:
    guard = setup.load_guard()
    prompt = prompt_of(guard.engine.renderer, [Example("Hello", None, None, {}, "x")], 40)
    seen: list[int] = []
    answer = stream(guard.session(), prompt, 40, lambda tokens: seen.append(len(tokens)))
    assert seen == [0, 16, 32, 40]
    assert stream(guard.session(), prompt, 40) == answer
    assert chat.EVERY == 16


def test_the_papers_guard_pads_to_the_data_sets_longest_and_learns(setup: Setup) -> None:
    ids, mask = padded([[1, 2], [3]], 4, 9)
    assert ids.tolist() == [[1, 2, 9, 9], [3, 9, 9, 9]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    paper = PaperGuard(setup.load_base(), 2, seed=0)
    rows = [paper.ids(Example("good", "yes", None, {}, "x")), paper.ids(Example("bad", "no", None, {}, "x"))]
    assert paper.judge(rows[0]).shape == (1, 3)
    torch.testing.assert_close(paper.score(rows, 60), paper.bucketed(rows, 4096), rtol=0.02, atol=0.02)  # bf16
    before = {name: parameter.clone() for name, parameter in paper.model.named_parameters()}
    steps = paper.train(rows, torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]), 60, seed=0)
    assert [next(steps) for _ in range(3)] == [2, 2, 2]
    moved = {name for name, value in paper.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == paper.model.trainable().keys()


def test_dual_path_runs_four_sides(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = count(monkeypatch, TorchEngine, "session")
    papers = count(monkeypatch, PaperGuard, "judge")
    report = dual_path.run(setup, prompt_tokens=40, answer_tokens=20, rounds=2)
    measured(report, "ours", "paper", "generate", "tokens-per-second")
    assert len(judged) == 3 * 3
    assert len(papers) == 3 * 3  # warm-up and two rounds; prompt, 16 tokens, end
    assert "tokens with and without checks: the same" in report.notes


def test_check_times_both_sides_at_each_length(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    papers = count(monkeypatch, PaperGuard, "judge")
    report = check.run(setup, speedups={32: ("speedup", 15.0), 64: ("speedup-64", None)}, rounds=2)
    measured(report, "speedup", "speedup-64", "flatness", "paper-flatness", "milliseconds-32", "milliseconds-64")
    assert {len(ids) for (ids,) in papers} == {32, 64}
    assert report.figures["speedup"].goal == 15
    assert {name for name, _ in check.SPEEDUPS.values()} >= {"speedup", "speedup-4096"}


def test_score_times_the_guard_both_loops_and_bare_products(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    papers = count(monkeypatch, PaperGuard, "score")
    scored = count(monkeypatch, TorchEngine, "score")
    report = score.run(setup, rounds=2)
    measured(report, "paper", "bucketed", "gemm-share", "rows-per-second", "gemm-gflops")
    assert {len(conversations) for conversations, _ in scored} == {12}
    for rows, width in papers:
        assert width >= max(map(len, rows))
    tight = [width == max(map(len, rows)) for rows, width in papers]
    assert sum(tight) >= 3  # the loop sorted by length, in the warm-up and in two rounds
    assert tight.count(False) >= 3  # the paper's, padded to the longest row of all


def test_grow_races_a_checked_answer_against_an_unchecked_one(setup: Setup) -> None:
    report = grow.run(setup, prompt_tokens=32, lengths=(16, 48), rounds=2)
    measured(report, "ratio-16", "ratio-48")
    assert report.figures["exponent"].goal == 1.15


def test_grow_says_when_the_time_ended_before_the_last_length(folder: Path) -> None:
    report = grow.run(Setup(guard=str(folder), deadline=0.0), prompt_tokens=32, lengths=(16, 48), rounds=2)
    assert report.figures["exponent"].value is None
    assert report.notes == [
        "grow: 1 of 2 rounds fitted into the time",
        "grow: a round was stopped before 48 tokens; longer ratios are of fewer rounds",
    ]


def test_the_exponent_is_the_slope_of_the_checks_cost() -> None:
    lengths = (64, 128, 256, 512)
    quadratic = grow.Race({n: float(n) for n in lengths}, {n: n + n**2 / 100 for n in lengths})
    assert quadratic.exponent() == pytest.approx(2.0)
    assert grow.Race({64: 2.0, 128: 3.0}, {64: 1.0, 128: 4.0}).exponent() is None


def test_memory_compares_processes_and_sizes(setup: Setup) -> None:
    report = memory.run(setup, rounds=1)
    measured(report, "peak", "files", "files-megabytes", "alone-megabytes")
    assert report.figures["alone-megabytes"].values[0] > 50


def test_train_races_the_guards_recipe_against_the_papers(setup: Setup) -> None:
    report = train.run(setup, stretch=0.2)
    measured(report, "total", "auprc", "paper-auprc", "paper-rows-per-second")
    if report.figures["cached"].value is None:
        assert any(note.startswith("train.cached is not measured: ") for note in report.notes)


def run(*words: str) -> Any:
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_json_is_the_only_line_on_stdout_and_says_where_it_comes_from(folder: Path) -> None:
    result = run("score", "--json", "--rows", "8", "--guard", str(folder))
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert list(found) == ["bench", "figures", "provenance"]
    assert {"score.paper", "score.bucketed", "score.gemm-share"} <= found["figures"].keys()
    assert all(set(figure) == {"value", "low", "high", "goal", "met"} for figure in found["figures"].values())
    origin = found["provenance"]
    assert origin["guard"]["name"] == "tiny"
    assert origin["rows"].startswith("generated rows")
    assert {"versions", "cpu", "threads", "dtype", "base", "seed", "commit", "command"} <= origin.keys()
    assert "score, warm-up: " in result.stderr


def test_people_get_a_table(folder: Path, tmp_path: Path) -> None:
    for name in (EVAL_FILE, TRAIN_FILE):
        (tmp_path / name).parent.mkdir()
        rows = "".join(
            f'{{"prompt": "p {i}", "response": "r", "unsafe": {str(i % 2 == 0).lower()}}}\n' for i in range(9)
        )
        (tmp_path / name).write_text(rows, "utf-8")
    result = run("score", "--data", str(tmp_path), "--rows", "8", "--guard", str(folder))
    assert result.exit_code == 0
    assert "score.bucketed" in result.stdout
    assert f"rows: {EVAL_FILE}: 8 of 9" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chek"], "bench 'chek' is unknown; did you mean 'check'? allowed: dual-path, check, score, train"),
        (["score", "--data", "/nowhere"], "data folder '/nowhere' not found; needed: a folder with train/"),
        (["train", "--data", "."], "cannot be read: No such file"),
        (["memory", "--data", "."], "cannot be read: No such file"),
        (["score", "--guard", "nobody/nothing"], "guard 'nobody/nothing' not found"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
