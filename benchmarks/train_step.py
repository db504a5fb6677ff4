"""Training throughput: this package's step against the paper's procedure, on the same model, rows and machine.

Both sides train LoRA r 8 on q and v of the default chat model, in one process, in turns. The paper's procedure
(arXiv 2407.02987, as described in its text): batch 2, every row padded to the longest of the data set, bf16. Ours: the
package's own batches, padded to the longest of each pass. The paper's text form is shorter than a chat template, which
favours its side: rows are ``user: …\\n\\nagent: …`` there and the rendered conversation here.

    python benchmarks/train_step.py [--data FILE] [--seconds 120] [--json]

Without ``--data``, rows are random words with the length distribution of BeaverTails 30k.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lora_guard import adapter, base_model
from lora_guard.bench.paper import SHAPE, padded, text
from lora_guard.bench.rows import generated
from lora_guard.config import Source
from lora_guard.data.batch import plan_epoch
from lora_guard.data.example import Example
from lora_guard.data.sources import read
from lora_guard.heads import GuardHeads
from lora_guard.model import GuardModel, autocast, pad
from lora_guard.taxonomy import Taxonomy
from lora_guard.training.loss import label_counts, loss_terms

MICRO_BATCH = 8
Step = Callable[[], int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="labelled rows (.jsonl); generated ones when absent")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long both sides take together")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    taxonomy = Taxonomy.load("beavertails")
    if arguments.data:
        examples = read(Source(path=str(arguments.data), rows=arguments.rows), taxonomy)
    else:
        examples = [generated(random.Random(index), taxonomy) for index in range(arguments.rows)]
    base = base_model.load()
    attached = adapter.attach(base.model, SHAPE)
    model = GuardModel(
        base.model, GuardHeads(base.model.config.hidden_size, len(taxonomy.categories)), attached=attached
    ).train()
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=3e-4)
    sides = {
        "paper": paper_steps(base, model, optimizer, examples, taxonomy),
        "ours": our_steps(base, model, optimizer, examples, taxonomy),
    }
    rates = interleaved(sides, arguments.seconds)
    report(rates, arguments)


def paper_steps(base, model, optimizer, examples: list[Example], taxonomy: Taxonomy) -> Iterator[int]:
    """Batches of 2 in random order, each padded to the longest row of the data set."""
    ids = [base.tokenizer.encode(text(example), add_special_tokens=False) for example in examples]
    longest = max(map(len, ids))
    order = random.Random(0).sample(range(len(ids)), len(ids))
    while True:
        for start in range(0, len(order) - 1, 2):
            rows = order[start : start + 2]
            labels = torch.tensor([examples[row].labels(taxonomy) for row in rows])
            train_step(model, optimizer, [(*padded([ids[row] for row in rows], longest, base.pad_id), labels)])
            yield len(rows)


def our_steps(base, model, optimizer, examples: list[Example], taxonomy: Taxonomy) -> Iterator[int]:
    """The package's batches: 16 rows of similar length, in passes of 8."""
    renderer = base_model.renderer(base)
    ids = [renderer.judged(e.conversation(), e.target, renderer.end_of_turn).windows(1024)[0] for e in examples]
    epoch = 0
    while True:
        for rows in plan_epoch([len(row) for row in ids], 2 * MICRO_BATCH, seed=0, epoch=epoch):
            parts = []
            for start in range(0, len(rows), MICRO_BATCH):
                part = rows[start : start + MICRO_BATCH]
                labels = torch.tensor([examples[row].labels(taxonomy) for row in part])
                parts.append((*pad([ids[row] for row in part], base.pad_id), labels))
            train_step(model, optimizer, parts)
            yield len(rows)
        epoch += 1


def train_step(model: GuardModel, optimizer, parts) -> None:
    counts = sum(label_counts(labels) for *_, labels in parts)
    weight = torch.ones(model.outputs)
    for ids, mask, labels in parts:
        with autocast(ids.device, "auto"):
            logits = model(ids, mask)
        (0.5 * loss_terms(logits.float(), labels, weight, counts).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def interleaved(sides: dict[str, Iterator[int]], seconds: float) -> dict[str, list[float]]:
    """Examples a second of each side in alternating turns of five seconds or more, after one uncounted step each."""
    for steps in sides.values():
        next(steps)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    began = time.monotonic()
    while time.monotonic() - began < seconds or len(rates["ours"]) < 3:
        for name, steps in sides.items():
            start, rows = time.monotonic(), 0
            while time.monotonic() - start < 5:
                rows += next(steps)
            rates[name].append(rows / (time.monotonic() - start))
        print(f"{name}: {rates[name][-1]:.2f} examples/s", file=sys.stderr)
    return rates


def report(rates: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    ratios = [ours / paper for ours, paper in zip(rates["ours"], rates["paper"], strict=True)]
    ratio = statistics.median(ratios)
    source = arguments.data.name if arguments.data else "generated rows, lengths of BeaverTails 30k"
    if arguments.json:
        figure = {"value": ratio, "low": min(ratios), "high": max(ratios), "goal": 3.0, "met": ratio >= 3.0}
        print(json.dumps({"bench": "train_step", "figures": {"train_step": figure}, "provenance": {"rows": source}}))
        return
    print(f"rows: {source}, {arguments.rows}; {len(ratios)} interleaved turns; examples a second, median [min, max]")
    for name in ("paper", "ours"):
        print(f"{name:>6}  {statistics.median(rates[name]):6.2f} [{min(rates[name]):.2f}, {max(rates[name]):.2f}]")
    print(f" ratio  {ratio:6.2f} [{min(ratios):.2f}, {max(ratios):.2f}]  (goal: 3)")


if __name__ == "__main__":
    main()
