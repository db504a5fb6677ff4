"""A Ray cluster of this machine's own for tests, whose workers import what the tests import."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def local_cluster() -> Iterator[None]:
    """A cluster of two processors while the block runs."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    paths = os.pathsep.join(path for path in sys.path if path)
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    try:
        yield
    finally:
        ray.shutdown()
