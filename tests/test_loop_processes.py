"""Runs of several processes: they train the weights of one, and a kill of any costs nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from processes import started, wait
from runs import assert_same, records, weights, write_rows
from torch.multiprocessing import ProcessExitedException
from typer.testing import CliRunner

from lora_guard import TrainConfig
from lora_guard.cli import app
from lora_guard.errors import ConfigError
from lora_guard.training.loop import train

ACCELERATE = Path(__file__).parents[1] / "configs" / "accelerate"


def test_a_killed_process_resumes_to_the_same_weights(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = make_config(epochs=8)
    train(config, tmp_path / "whole")
    (tmp_path / "config.yaml").write_text(config.to_yaml(), "utf-8")
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "lora_guard", "train", str(out), "--config", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps = out / "steps.jsonl"
    while process.poll() is None and not (steps.is_file() and len(steps.read_text("utf-8").splitlines()) > 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with steps.open("a", encoding="utf-8") as file:
        file.write('{"step": 99')  # a line that a kill cut short
    CliRunner().invoke(app, ["train", str(out), "--config", command[-1], "--resume"], catch_exceptions=False)
    assert_same(tmp_path / "whole", out)


def test_a_worker_killed_among_several_ends_the_run_which_resumes_to_the_same_weights(
    make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = make_config(adapter="alora", epochs=8)
    killed, steps = started(2, tmp_path / "killed", config), tmp_path / "killed" / "steps.jsonl"
    while not (steps.is_file() and len(steps.read_text("utf-8").splitlines()) > 6):
        assert not killed.join(0.01)
    os.kill(killed.pids()[1], signal.SIGKILL)
    with pytest.raises(ProcessExitedException):
        wait(killed)
    done = len(steps.read_text("utf-8").splitlines())
    wait(started(2, tmp_path / "killed", config, resume=True))
    wait(started(2, tmp_path / "whole", config))
    assert 6 < done < len(records(tmp_path / "whole" / "steps.jsonl"))
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_processes_that_accelerate_starts_train_the_weights_of_one(
    make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Those save memory by activation checkpointing; the one does without."""
    config = make_one(make_config, tmp_path, "lora")
    (tmp_path / "config.yaml").write_text(config.to_yaml(), "utf-8")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    command += ["--config_file", str(ACCELERATE / "ddp.yaml"), "--main_process_port", "0", "-m", "lora_guard"]
    command += ["train", str(tmp_path / "several"), "--config", str(tmp_path / "config.yaml"), "--set", "processes=2"]
    result = subprocess.run(
        [*command, "--set", "activation_checkpointing=true"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "2 processes (gloo)" in result.stdout
    assert_alike(tmp_path / "one", tmp_path / "several")


@pytest.mark.parametrize(("adapter", "processes"), [("alora", 2), ("lora", 4)])
def test_several_processes_train_the_weights_of_one(
    make_config: Callable[..., TrainConfig], tmp_path: Path, adapter: str, processes: int
) -> None:
    wait(started(processes, tmp_path / "several", make_one(make_config, tmp_path, adapter)))
    assert_alike(tmp_path / "one", tmp_path / "several")


def make_one(make_config: Callable[..., TrainConfig], folder: Path, adapter: str) -> TrainConfig:
    """The config of the run ``one``, in this process; its last batch of 4 has fewer rows than there are processes."""
    write_rows(folder / "rows.jsonl", 25)  # 17 to train on
    config = make_config(adapter=adapter, lora_dropout=0.0, epochs=1)
    train(config, folder / "one", prefixes=folder / "prefixes")
    assert len(json.loads((folder / "one" / "splits.json").read_text("utf-8"))["train"]) % config.batch_size == 1
    return config


def assert_alike(one: Path, several: Path) -> None:
    first, second = weights(one), weights(several)
    for name in first:
        assert torch.allclose(first[name], second[name], atol=2e-5), name
    norms = [[record["grad_norm"] for record in records(run / "steps.jsonl")] for run in (one, several)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    for mine, theirs in zip(records(one / "metrics.jsonl"), records(several / "metrics.jsonl"), strict=True):
        assert mine.keys() == theirs.keys()


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_launch_configs(path: Path) -> None:
    load_config_from_file(str(path))


def test_fewer_processes_than_asked_for_are_refused(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 processes were asked for and 1 are running"):
        train(make_config(processes=2), tmp_path / "run")
