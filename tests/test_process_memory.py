"""The allocator's settings are the program's default, and the user's variables come first."""

import subprocess
import sys

import pytest

from lora_guard.allocator import keep_freed_memory, return_freed_memory

# Blocks of the sizes of a forward pass, each freed before the next: their pages must not be faulted in anew each time.
PROGRAM = """
import resource, sys
from lora_guard.allocator import keep_freed_memory, return_freed_memory
if sys.argv[1] != "glibc's":
    assert keep_freed_memory({})
if sys.argv[1] == "returned":
    assert return_freed_memory({})
import torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for megabytes in (1, 8, 24, 40, 64):
    for _ in range(6):
        torch.ones(megabytes << 18)
print(faults() - before)
"""


def faults(how: str) -> int:
    return int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout)


def test_freed_memory_is_used_again_without_page_faults() -> None:
    if not keep_freed_memory({}):
        pytest.skip("no glibc")
    assert faults("kept") * 2 < faults("glibc's")


def test_freed_memory_leaves_the_process_even_if_it_was_kept_before() -> None:
    if not return_freed_memory({}):
        pytest.skip("no glibc")
    assert faults("kept") * 2 < faults("returned")


def test_a_variable_of_the_users_is_left_alone() -> None:
    named = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"), "1")
    assert (keep_freed_memory(named) and return_freed_memory(named)) or not sys.platform.startswith("linux")
