"""The server's tests need the extras ``serve`` and ``test-serve``; without them each file is skipped by name."""

from importlib.util import find_spec
from pathlib import Path

import pytest

NEEDED = ("fastapi", "prometheus_client", "uvicorn", "openai", "playwright", "schemathesis")


class Skipped(pytest.Module):
    """A file whose imports would fail."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(
            "needs the extras 'serve' and 'test-serve'; make test-extras installs them", allow_module_level=True
        )


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if all(map(find_spec, NEEDED)) else Skipped.from_parent(parent, path=module_path)
