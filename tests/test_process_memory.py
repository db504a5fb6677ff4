"""What stays in memory is what suits the engine, and the user's variables come first."""

import os
import subprocess
import sys

import pytest

from lora_guard.process_memory import suit_llama_cpp, suit_torch

# Blocks of the sizes of a forward pass, each freed before the next: their pages must not be faulted in anew each time.
PROGRAM = """
import resource, sys
from lora_guard.process_memory import suit_llama_cpp, suit_torch
if sys.argv[1] != "glibc's":
    assert suit_torch({})
if sys.argv[1] == "returned":
    assert suit_llama_cpp({})
import torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for megabytes in (1, 8, 24, 40, 64):
    for _ in range(6):
        torch.ones(megabytes << 18)
print(faults() - before)
"""


# Products over ever other numbers of rows, as the texts of requests bring them about.
PRODUCTS = """
import os, sys
from lora_guard.process_memory import suit_torch
if sys.argv[1] == "few":
    suit_torch(os.environ)
import psutil, torch
torch.set_num_threads(1)
weights = [torch.ones(width, 64, dtype=torch.bfloat16) for width in (64, 96, 128)]
resident = lambda: psutil.Process().memory_info().rss
def multiply(start, end):
    for rows in range(start, end):
        for weight in weights:
            torch.nn.functional.linear(torch.ones(rows, 64, dtype=torch.bfloat16), weight)
multiply(4, 64)
before = resident()
multiply(64, 320)
print(resident() - before)
"""


def faults(how: str) -> int:
    return int(_printed(PROGRAM, how))


def _printed(program: str, how: str) -> str:
    own = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"}
    clean = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True, env=clean)
    return done.stdout


def test_freed_memory_is_used_again_without_page_faults() -> None:
    if not suit_torch({}):
        pytest.skip("no glibc")
    assert faults("kept") * 2 < faults("glibc's")


def test_freed_memory_leaves_the_process_even_if_it_was_kept_before() -> None:
    if not suit_llama_cpp({}):
        pytest.skip("no glibc")
    assert faults("kept") * 2 < faults("returned")


def test_a_variable_of_the_users_is_left_alone() -> None:
    named = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"), "1")
    assert (suit_torch(named) and suit_llama_cpp(named)) or not sys.platform.startswith("linux")


def test_products_of_ever_other_sizes_do_not_fill_the_memory() -> None:
    grown = {how: int(_printed(PRODUCTS, how)) for how in ("all", "few")}
    if grown["all"] < 32 << 20:
        pytest.skip("products in bf16 are not compiled on this processor")
    assert grown["few"] < grown["all"] / 4


def test_how_many_products_are_kept_is_the_users_to_say() -> None:
    named = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512"}
    suit_torch(named)
    assert named == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512", "LRU_CACHE_CAPACITY": "64"}
