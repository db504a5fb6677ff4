"""Settings of every test: one thread, no hub, reproducible properties; the folder of real data, and configs of runs."""

import os
from collections.abc import Callable
from pathlib import Path

# Before torch and the hub library are imported, here and in the processes that tests start.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # tiny models take up to a hundred times longer with two threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings
from runs import config_maker
from tiny import tiny_folder

from lora_guard import TrainConfig

torch.set_num_threads(1)

# No deadline and no check of speed: machines are shared, and no test may depend on seconds.
settings.register_profile(
    "lora-guard",
    deadline=None,
    max_examples=50,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lora-guard")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data sets; tests that need it are skipped where it is absent."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LORA_GUARD_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; LORA_GUARD_SHARED_DATA names the one with the data sets")
    return folder


@pytest.fixture(scope="session")
def run_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model of :func:`make_config`."""
    return tiny_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def make_config(run_base: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes configs of short runs (:func:`runs.config_maker`) in the test's folder."""
    return config_maker(run_base, tmp_path)
