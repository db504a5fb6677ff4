"""Whether freed memory stays in the process: glibc decides by what was freed before, which suits neither engine.

The torch engine frees large tensors after every operation, and faulting their pages in again costs. The llama.cpp
engine frees its buffers when an adapter is attached, and is there to be small.
"""

import ctypes
import sys
from collections.abc import Mapping, Sequence

# malloc.h. With an environment variable of the same meaning the user decides instead.
_PARAMETERS = ((-3, "MALLOC_MMAP_THRESHOLD_"), (-1, "MALLOC_TRIM_THRESHOLD_"), (-2, "MALLOC_TOP_PAD_"))
_KEPT = (1 << 30, (1 << 31) - 1, 256 << 20)
_RETURNED = (128 << 10, 128 << 10, 128 << 10)  # glibc's own to begin with; set, they stay


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Set glibc's allocator for large tensors on a CPU; False where there is no glibc.

    Args:
        environment: the process's; a parameter it sets is left alone.
    """
    return _set(_KEPT, environment)


def return_freed_memory(environment: Mapping[str, str]) -> bool:
    """Have glibc give large blocks back as they are freed; False where there is no glibc.

    Args:
        environment: the process's; a parameter it sets is left alone.
    """
    return _set(_RETURNED, environment)


def _set(values: Sequence[int], environment: Mapping[str, str]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(
        name in environment or mallopt(number, value) == 1
        for (number, name), value in zip(_PARAMETERS, values, strict=True)
    )
