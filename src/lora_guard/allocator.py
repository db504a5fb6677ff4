"""Keeps freed memory in the process: glibc gives large tensors back after every operation, and the page faults cost."""

import ctypes
import sys
from collections.abc import Mapping

# malloc.h. With an environment variable of the same meaning the user decides instead.
_PARAMETERS = (
    (-3, "MALLOC_MMAP_THRESHOLD_", 1 << 30),
    (-1, "MALLOC_TRIM_THRESHOLD_", (1 << 31) - 1),
    (-2, "MALLOC_TOP_PAD_", 256 << 20),
)


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Set glibc's allocator for large tensors on a CPU; False where there is no glibc.

    Args:
        environment: the process's; a parameter it sets is left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(name in environment or mallopt(number, value) == 1 for number, name, value in _PARAMETERS)
