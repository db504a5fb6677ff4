"""The server's tests need the extras ``serve`` and ``test-serve``; where they are absent none is collected."""

from importlib.util import find_spec

collect_ignore_glob = [] if all(map(find_spec, ("fastapi", "openai", "schemathesis"))) else ["test_*.py"]
