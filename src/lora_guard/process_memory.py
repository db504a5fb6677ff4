"""What stays in the process's memory: freed blocks, by glibc's settings, and the products that torch compiled.

The torch engine frees large tensors after every operation, and faulting their pages in again costs. The llama.cpp
engine frees its buffers when an adapter is attached, and is there to be small.
"""

import ctypes
import sys
from collections.abc import Mapping, MutableMapping, Sequence

# malloc.h. With an environment variable of the same meaning the user decides instead.
_PARAMETERS = ((-3, "MALLOC_MMAP_THRESHOLD_"), (-1, "MALLOC_TRIM_THRESHOLD_"), (-2, "MALLOC_TOP_PAD_"))
_KEPT = (1 << 30, (1 << 31) - 1, 256 << 20)
_RETURNED = (128 << 10, 128 << 10, 128 << 10)  # glibc's own to begin with; set, they stay

_COMPILED = dict.fromkeys(("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"), "64")
"""Products in bf16 are compiled for each number of rows, up to 0.7 MB apiece. torch and oneDNN keep 1,024, so that a
server of texts of all lengths would grow for hours. Compiling one anew costs nothing beside a judgement."""


def suit_torch(environment: MutableMapping[str, str]) -> bool:
    """Keep freed memory, and few compiled products, for the torch engine on a CPU; False where there is no glibc.

    Args:
        environment: the process's; what it sets already is left alone. torch reads it at its first product.
    """
    for name, most in _COMPILED.items():
        environment.setdefault(name, most)
    return _set(_KEPT, environment)


def suit_llama_cpp(environment: Mapping[str, str]) -> bool:
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
