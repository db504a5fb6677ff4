"""Training in several processes that speak gloo, forked from one that has imported the libraries already."""

import multiprocessing
import os
import socket
from pathlib import Path

from torch.multiprocessing import ProcessContext, start_processes

from lora_guard import TrainConfig


def started(processes: int, out: Path, config: TrainConfig, *, resume: bool = False) -> ProcessContext:
    """Start a run; its processes have the environment that ``accelerate launch`` would give them."""
    multiprocessing.set_forkserver_preload(["lora_guard.training.loop"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = config.model_copy(update={"processes": processes})
    context = start_processes(
        _train, (processes, port, out, config, resume), processes, join=False, start_method="forkserver"
    )
    assert context is not None
    return context


def wait(run: ProcessContext) -> None:
    """Wait for a run's end.

    Raises:
        ProcessExitedException: one of its processes was killed.
    """
    while not run.join():
        pass


def _train(rank: int, processes: int, port: int, out: Path, config: TrainConfig, resume: bool) -> None:
    os.environ.update(
        ACCELERATE_USE_CPU="true",
        WORLD_SIZE=str(processes),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from lora_guard.training.loop import train

    train(config, out, resume=resume, prefixes=out.parent / "prefixes")
