"""Draws docs/device-bench.svg: what the checks of a chat cost on a device, of what ``bench device`` found.

lora-guard bench device --json > device.json
python benchmarks/device_picture.py device.json docs/device-bench.svg
"""

import json
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_guard import files
from lora_guard.bench.device import FILE_TYPES

TIME = {
    f"{who}, {kind}": f"device.{name}" + (f"-{kind.lower()}" if place else "")
    for place, kind in enumerate(FILE_TYPES)
    for who, name in (("our guard", "ours"), ("second model", "second-model"))
}
MEMORY = {"our guard": "device.memory", "second model": "device.memory-second-model"}


def picture(found: Mapping[str, Any], path: Path) -> None:
    """Bars of the medians with their extremes, as multiples of the chat alone; dashed is the goal in ``found``."""
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    time, memory = figure.subplots(1, 2, width_ratios=[3, 2])
    _bars(time, "time of an answer ÷ alone", TIME, found["figures"])
    _bars(memory, f"peak memory ÷ alone, {FILE_TYPES[0]}", MEMORY, found["figures"])
    buffer = BytesIO()
    with rc_context({"svg.hashsalt": "device-bench"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    files.write_bytes(path, buffer.getvalue())


def _bars(axes: Axes, title: str, names: Mapping[str, str], figures: Mapping[str, Any]) -> None:
    for place, (label, name) in enumerate(names.items()):
        value, low, high, goal = (figures[name][part] for part in ("value", "low", "high", "goal"))
        colour = "tab:blue" if label.startswith("our") else "tab:gray"
        axes.barh(place, value, color=colour, xerr=[[value - low], [high - value]], error_kw={"linewidth": 0.8})
        axes.annotate(f"{value:.2f}", (0, place), xytext=(4, 0), textcoords="offset points", va="center", color="w")
        if goal is not None:
            axes.vlines(goal, place - 0.5, place + 0.5, color="k", linestyle="--", linewidth=0.8)
    axes.set_yticks(range(len(names)), list(names))
    axes.set(title=title, xlim=(0, None))
    axes.invert_yaxis()


if __name__ == "__main__":
    picture(json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2]))
