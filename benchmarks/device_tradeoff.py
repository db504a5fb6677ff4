"""What a guard on a device costs and how well it judges, in each quantisation of its chat model.

    python benchmarks/device_tradeoff.py OUT --data DATA [--guard default] [--rows 500]

Makes each file type from the guard's GGUF model by llama.cpp's quantiser, and measures file size, resident memory,
tokens a second, the cost of a check, the difference from the guard's own model, and AUPRC, F1 and FPR on the config's
test files, with the guard's calibration and with one refitted in that file type on the config's validation rows.
``OUT`` gets ``tradeoff.json``, written anew after each file type, and at the end ``tradeoff.md`` and ``tradeoff.svg``.
A run that was stopped goes on where it was.
"""

import argparse
import dataclasses
import hashlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from lora_guard import files
from lora_guard.bench.chat import EVERY, Prompt, prompt_of, session_check, stream
from lora_guard.bench.device_chat import quantised
from lora_guard.bench.peak import told
from lora_guard.bench.timing import interleave
from lora_guard.config import TrainConfig
from lora_guard.engine.device_guard import checked_model, gguf_file
from lora_guard.engine.llama_cpp import threads
from lora_guard.errors import ConfigError, LoraGuardError
from lora_guard.evaluation.calibrate import BALANCED, fit
from lora_guard.evaluation.metrics import auprc_drop, point_metrics
from lora_guard.evaluation.provenance import commit
from lora_guard.evaluation.scores import Scored, score_set
from lora_guard.evaluation.sets import EvalSet, hash_of, read_sets
from lora_guard.export import bundle, parity, run
from lora_guard.guard import Guard, find
from lora_guard.taxonomy import Taxonomy
from lora_guard.training.rows import choose

KINDS = ("F16", "Q8_0", "Q4_K_M", "Q4_1")
CONFIG = "configs/smollm2-135m-alora.yaml"
PROMPT_TOKENS, ANSWER_TOKENS, ROUNDS, CHECKS = 256, 128, 5, 8
MEMORY_ROUNDS = 3


@dataclass(frozen=True)
class Plan:
    """What is measured: the guard's folder, the GGUF model, the sets, and the rows of the new calibrations."""

    guard: Path
    source: Path
    out: Path
    sets: list[EvalSet]
    calibration: EvalSet
    prompt_tokens: int = PROMPT_TOKENS
    answer_tokens: int = ANSWER_TOKENS
    rounds: int = ROUNDS
    base: str | None = None
    """Of the guard's own model; where the guard says when None."""

    @property
    def bundle(self) -> Path:
        return self.out / "bundle"

    @property
    def key(self) -> str:
        """Of all that decides a figure, but for the machine."""
        sets = [[part.name, part.sha256, len(part.examples)] for part in (*self.sets, self.calibration)]
        chat = [self.prompt_tokens, self.answer_tokens, self.rounds]
        deciding = [files.sha256(self.guard / "guard.json"), self.source.stat().st_size, sets, chat]
        return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", required=True, help="folder that the config's paths start from")
    parser.add_argument("--guard", default="default")
    parser.add_argument("--config", default=CONFIG, help="the training config of the guard")
    parser.add_argument("--model", default="default", help="default or the .gguf file to make the others of")
    parser.add_argument("--rows", type=int, help="evenly spaced rows of each set; all of them when absent")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="llama.cpp's file types")
    arguments = parser.parse_args()
    try:
        plan = planned(arguments)
        measure(plan, arguments.kinds)
    except LoraGuardError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on with the file type that was begun")
    print((plan.out / "tradeoff.md").read_text("utf-8"))


def planned(arguments: argparse.Namespace) -> Plan:
    """Read and choose all rows before anything is measured."""
    config = TrainConfig.load(arguments.config, [f"data_root={arguments.data}"])
    taxonomy = Taxonomy.load(config.taxonomy)
    sets, _ = read_sets([str(Path(arguments.data) / source.path) for source in config.keep_out], None, taxonomy)
    validation = choose(config, taxonomy).validation
    held_out = EvalSet("validation", arguments.config, hash_of(validation), validation)
    return Plan(
        guard=find(arguments.guard),
        source=gguf_file(arguments.model),
        out=arguments.out,
        sets=[evenly(part, arguments.rows) for part in sets],
        calibration=evenly(held_out, arguments.rows),
    )


def evenly(part: EvalSet, rows: int | None) -> EvalSet:
    """At most so many rows of a set, evenly spaced.

    Raises:
        ConfigError: none.
    """
    if rows is not None and rows < 1:
        raise ConfigError(f"--rows is {rows}; allowed: 1 or more")
    count = len(part.examples)
    kept = min(count, rows or count)
    return dataclasses.replace(part, examples=[part.examples[index * count // kept] for index in range(kept)])


def measure(plan: Plan, kinds: Sequence[str]) -> None:
    """Measure the guard on its own model and in each file type that has no entry yet, then write table and picture."""
    record = plan.out / "tradeoff.json"
    with files.writing(plan.out):
        plan.out.mkdir(parents=True, exist_ok=True)
    found = json.loads(record.read_text("utf-8")) if record.is_file() else {}
    begun = found.get("key") == plan.key
    if not begun:
        found = {"key": plan.key, "source": plan.source.name, **machine(), "kinds": {}}
    left = [kind for kind in kinds if kind not in found["kinds"]]
    if left:
        own = own_scores(plan)
        if not begun:  # its vectors are what the guard's own model makes of texts
            print(run.export(plan.guard, plan.bundle, base=plan.base, model=str(plan.source))[0], file=sys.stderr)
        found["own"] = {part.data.name: metrics(part) for part in own}
        began = time.monotonic()
        for done, kind in enumerate(left):
            remaining = (
                f", {(time.monotonic() - began) / done * (len(left) - done) / 60:.0f} minutes left" if done else ""
            )
            print(f"{kind}: {done + 1} of {len(left)}{remaining}", file=sys.stderr)
            found["kinds"][kind] = entry(plan, kind, own)
            files.write_json(record, found)
    found["kinds"] = {kind: found["kinds"][kind] for kind in kinds}
    files.write_text(plan.out / "tradeoff.md", to_markdown(found))
    picture(found, plan.out / "tradeoff.svg")


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    versions = {name: version(name) for name in ("lora-guard", "llama-cpp-python", "torch")}
    return {"threads": threads(), "cpu": platform.processor() or platform.machine(), "commit": commit(), **versions}


def own_scores(plan: Plan) -> list[Scored]:
    """The sets by the guard's own model in torch."""
    guard = Guard.load(plan.guard, base=plan.base, bulk=True)
    return [score_set(guard, part, plan.out / "scores" / "own")[0] for part in plan.sets]


def entry(plan: Plan, kind: str, own: Sequence[Scored]) -> dict[str, Any]:
    """All figures of a file type."""
    path = quantised(plan.source, kind)
    guard = Guard.load(plan.guard, engine="llama-cpp", base=str(path))
    read = bundle.read(plan.bundle)
    prompt = prompt_of(guard.engine.renderer, plan.sets[0].examples, plan.prompt_tokens)
    checked = parity.check(read, checked_model(read.spec, plan.bundle, str(path)))
    return {
        "bytes": path.stat().st_size,
        "peak": memory(plan.guard, path),
        **speed(guard, prompt, plan.answer_tokens, plan.rounds),
        "overhead": overhead(kind, guard, prompt, plan.answer_tokens, plan.rounds),
        "parity": dataclasses.asdict(checked) | {"passed": checked.passed},
        "sets": judged(plan, kind, guard, own),
    }


def memory(guard: Path, path: Path) -> dict[str, float]:
    """Resident peaks, in bytes, of a process that chats alone and of one with the guard."""
    return {
        side: statistics.median(
            float(told("lora_guard.bench.device_probe", [side, str(guard), str(path), str(path), "0"])["peak"])
            for _ in range(MEMORY_ROUNDS)
        )
        for side in ("alone", "ours")
    }


def speed(guard: Guard, prompt: Prompt, answer: int, rounds: int) -> dict[str, float]:
    """Tokens a second of reading the prompt and of decoding, and the seconds of a check behind both; medians."""
    times: dict[str, list[float]] = {"prefill": [], "decode": [], "check": []}
    for _ in range(1 + rounds):
        session = guard.session()
        times["prefill"].append(_seconds(lambda session=session: session.append(prompt.ids)))
        times["decode"].append(_seconds(lambda session=session: [session.sample() for _ in range(answer)]))
        session.judge("response")  # reads the last token, which generation would read at the next
        checks = [_seconds(lambda session=session: session.judge("response")) for _ in range(CHECKS)]
        times["check"].append(statistics.median(checks))
    middle = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first is the warm-up
    return {
        "prefill": len(prompt.ids) / middle["prefill"],
        "decode": (answer - 1) / middle["decode"],  # the first token follows from reading the prompt
        "check": middle["check"],
    }


def overhead(kind: str, guard: Guard, prompt: Prompt, answer: int, rounds: int) -> dict[str, float]:
    """A streamed answer with checks as a multiple of the same without: median and extremes of interleaved rounds."""

    def checked() -> None:
        session = guard.session()
        stream(session, prompt, answer, session_check(session, prompt))

    sides: dict[str, Callable[[], object]] = {
        "alone": lambda: stream(guard.session(), prompt, answer),
        "checked": checked,
    }
    ratios = interleave(kind, sides, rounds=rounds, deadline=float("inf")).ratios("checked", "alone")
    return {"value": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def judged(plan: Plan, kind: str, guard: Guard, own: Sequence[Scored]) -> dict[str, Any]:
    """Metrics of each set in a file type, before and after recalibration, and the AUPRC lost to the own model."""
    folder = plan.out / "scores" / kind
    rows, _ = score_set(guard, plan.calibration, folder)
    fitted = fit(
        rows.logits,
        rows.labels,
        [example.target for example in plan.calibration.examples],
        guard.taxonomy.categories,
        guard.spec.calibration.policies[BALANCED],
    )
    spec = guard.spec.model_copy(update={"calibration": fitted})
    recalibrated = Guard(spec, guard.engine, base_fingerprint=guard.base_fingerprint, token_head=guard.token_head)
    entries = {}
    for part, reference in zip(plan.sets, own, strict=True):
        before, after = (score_set(scorer, part, folder)[0] for scorer in (guard, recalibrated))
        known = ~np.isnan(before.labels[:, 0])
        lost = auprc_drop(reference.logits[known, 0], before.logits[known, 0], before.labels[known, 0] == 1)
        entries[part.name] = {"before": metrics(before), "after": metrics(after), "auprc_lost": lost}
    return entries


def metrics(scored: Scored) -> dict[str, float | None]:
    """Labelled rows, AUPRC, F1 and FPR of harmfulness at the guard's default policy."""
    known = ~np.isnan(scored.labels[:, 0])
    found = point_metrics(scored.scores[known, 0], scored.labels[known, 0] == 1, scored.thresholds[known, 0])
    return {"rows": int(known.sum()), **{name: found[name] for name in ("auprc", "f1", "fpr")}}


def to_markdown(found: Mapping[str, Any]) -> str:
    """The tables of what was found."""
    kinds = found["kinds"].items()
    cost = [
        f"| {kind} | {e['bytes'] / 1e6:.0f} | {e['peak']['alone'] / 1e6:.0f}, {e['peak']['ours'] / 1e6:.0f} | "
        f"{e['prefill']:.0f} | {e['decode']:.0f} | {e['check'] * 1e3:.0f} | "
        f"{e['overhead']['value']:.3f} ({e['overhead']['low']:.3f}–{e['overhead']['high']:.3f}) |"
        for kind, e in kinds
    ]
    differences = [
        f"| {kind} | {p['feature_median']:.2g}, {p['feature_max']:.2g} | {p['score_mean']:.2g}, {p['score_max']:.2g} | "
        f"{p['flips']} | {p['flips_recalibrated']} of {p['rows']} |"
        for kind, p in ((kind, e["parity"]) for kind, e in kinds)
    ]
    quality = []
    for name, own in found["own"].items():
        quality += [_own_row(name, own), *(_set_row(kind, name, e["sets"][name]) for kind, e in kinds)]
    return "\n".join(
        [
            f"Made of `{found['source']}`; {found['threads']} threads, llama-cpp-python {found['llama-cpp-python']}.",
            "",
            "| file type | file, MB | resident peak, MB: alone, with guard | prefill, tokens/s | decode, tokens/s "
            f"| one check, ms | answer with checks ÷ without (every {EVERY} tokens) |",
            "|---|---|---|---|---|---|---|",
            *cost,
            "",
            "| file type | features, of the row's largest: median, highest | score: mean, highest | verdicts that flip "
            "| at the threshold that suits them best |",
            "|---|---|---|---|---|",
            *differences,
            "",
            "| set (rows) | file type | AUPRC | AUPRC lost (95 %) | F1: calibration saved, refitted | FPR: likewise |",
            "|---|---|---|---|---|---|",
            *quality,
            "",
        ]
    )


def _own_row(name: str, entry: Mapping[str, Any]) -> str:
    figures = [_figure(entry[metric]) for metric in ("auprc", "f1", "fpr")]
    return f"| {name} ({entry['rows']:,}) | own model | {figures[0]} | | {figures[1]} | {figures[2]} |"


def _set_row(kind: str, name: str, entry: Mapping[str, Any]) -> str:
    before, after, lost = entry["before"], entry["after"], entry["auprc_lost"]
    pairs = [f"{_figure(before[metric])}, {_figure(after[metric])}" for metric in ("f1", "fpr")]
    interval = f"{_figure(lost['value'])} ({_figure(lost['low'])} to {_figure(lost['high'])})"
    return (
        f"| {name} ({before['rows']:,}) | {kind} | {_figure(before['auprc'])} | {interval} | {pairs[0]} | {pairs[1]} |"
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def picture(found: Mapping[str, Any], path: Path) -> None:
    """File size against AUPRC and against tokens a second, as an SVG file."""
    entries = dict(sorted(found["kinds"].items(), key=lambda item: item[1]["bytes"]))
    sizes = [e["bytes"] / 1e6 for e in entries.values()]
    figure = Figure(figsize=(9, 4), layout="constrained")
    quality, rate = figure.subplots(1, 2)
    for name, own in found["own"].items():
        if own["auprc"] is None:  # its rows are all harmful, or all harmless
            continue
        values = [e["sets"][name]["before"]["auprc"] for e in entries.values()]
        (line,) = quality.plot(sizes, values, marker="o", label=name)
        quality.axhline(own["auprc"], color=line.get_color(), linestyle="--", linewidth=0.7)
    quality.set(xlabel="file, MB", ylabel="AUPRC (dashed: own model)", ylim=(0, 1))
    for name in ("prefill", "decode"):
        rate.plot(sizes, [e[name] for e in entries.values()], marker="o", label=name)
    rate.set(xlabel="file, MB", ylabel="tokens a second", yscale="log")
    for axes in (quality, rate):
        axes.legend(frameon=False)
        for kind, size in zip(entries, sizes, strict=True):
            axes.annotate(kind, (size, 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="right", fontsize=8)
    buffer = BytesIO()
    with rc_context({"svg.hashsalt": "tradeoff"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    files.write_bytes(path, buffer.getvalue())


def _seconds(turn: Callable[[], object]) -> float:
    began = time.perf_counter()
    turn()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
