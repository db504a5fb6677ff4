"""The benches by name, and what runs one for the command line."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout

from lora_guard.bench import check, device, dual_path, grow, memory, score, train
from lora_guard.bench.report import Report, provenance, show
from lora_guard.bench.setup import Setup
from lora_guard.errors import ConfigError, allowed

BENCHES: dict[str, Callable[[Setup], Report]] = {
    "dual-path": dual_path.run,
    "check": check.run,
    "score": score.run,
    "train": train.run,
    "memory": memory.run,
    "grow": grow.run,
    "device": device.run,
}


def run(name: str, setup: Setup, *, as_json: bool) -> None:
    """Run a bench and print what it found; stdout has nothing else.

    Raises:
        ConfigError: no such bench.
        LoraGuardError: as its kind says: the guard, the rows, the base model.
    """
    if name not in BENCHES:
        raise ConfigError(f"bench {name!r} is unknown; {allowed(name, BENCHES)}")
    spec, folder = setup.spec, setup.folder
    with redirect_stdout(sys.stderr):  # training tells on stdout how it goes
        report = BENCHES[name](setup)
    origin = provenance(report, spec, folder, setup.seed)
    print(report.to_json(origin)) if as_json else show(report, origin)
