"""The resident peak of a process, and the processes that are started to tell theirs."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_guard.errors import ResourceError


def peak() -> int:
    """Bytes of this process's resident peak. Not ``getrusage``'s: that begins with the peak of the parent."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def told(module: str, words: Sequence[str]) -> dict[str, float | str]:
    """What a process of a module says of itself, in one line of JSON.

    Raises:
        ResourceError: it failed, or the machine does not tell a process its peak.
    """
    command = [sys.executable, "-m", module, *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ResourceError(f"the process that measures memory ({words[0]}) failed: {last}")
    answer: dict[str, float | str] = json.loads(result.stdout.splitlines()[-1])
    return answer
