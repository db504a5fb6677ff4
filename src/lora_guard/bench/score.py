"""Bench score: many rows judged at once, against the paper's evaluation loop and a loop that sorts by length."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from lora_guard.base_model import BaseModel
from lora_guard.bench.paper import EVALUATION_BATCH, PaperGuard
from lora_guard.bench.report import Figure, Report
from lora_guard.bench.rows import EVAL_FILE
from lora_guard.bench.setup import Setup, dtype_of
from lora_guard.bench.timing import interleave
from lora_guard.data.example import Example
from lora_guard.guard import Guard
from lora_guard.model import takes_bf16

ROWS = 256
ROUNDS = 7
BUCKET_TOKENS = 4096
GEMM_ROWS = 2048


def run(setup: Setup, *, rounds: int = ROUNDS) -> Report:
    """Time the guard's bulk scoring, both loops over the paper's model, and bare matrix products, in turns."""
    rows = setup.read_rows(EVAL_FILE, ROWS)
    guard, copy = setup.load_guard(bulk=True), setup.load_base()
    shapes = linear_shapes(copy)
    paper = PaperGuard(copy, len(guard.taxonomy.categories), setup.seed)
    conversations = [example.conversation() for example in rows.examples]
    targets = [example.target for example in rows.examples]
    texts = [paper.ids(example) for example in rows.examples]
    rendered = [rendered_ids(guard, setup.spec.invocation, example) for example in rows.examples]
    paper.hold_in_bf16()
    longest = max(len(paper.ids(example)) for example in rows.everything)
    batch = texts[:EVALUATION_BATCH]
    sides: dict[str, Callable[[], object]] = {
        "ours": partial(guard.engine.score, conversations, targets),
        "bucketed": partial(paper.bucketed, rendered, BUCKET_TOKENS),
        "paper": partial(paper.score, batch, longest),
        "gemm": Gemm(copy, shapes).turn,
    }
    timings = interleave("score", sides, rounds=rounds, deadline=setup.deadline)
    share = len(batch) / len(texts)
    work = sum(2 * a * b * count for (a, b), count in shapes.items())
    tokens = sum(map(len, rendered))
    figures = {
        "paper": Figure(
            "our rows a second ÷ the paper's loop",
            [ratio / share for ratio in timings.ratios("paper", "ours")],
            10.0,
            "at least",
        ),
        "bucketed": Figure(
            "our rows a second ÷ a loop sorted by length", timings.ratios("bucketed", "ours"), 1.3, "at least"
        ),
        "gemm-share": Figure(
            "useful products a second ÷ bare products",
            [ratio * tokens / GEMM_ROWS for ratio in timings.ratios("gemm", "ours")],
            0.6,
            "at least",
        ),
        "rows-per-second": Figure("ours", [len(texts) / taken for taken in timings.seconds["ours"]]),
        "gemm-gflops": Figure("bare products", [work * GEMM_ROWS / taken / 1e9 for taken in timings.seconds["gemm"]]),
    }
    notes = [
        f"{len(texts)} rows, {tokens:,} useful tokens; the paper's loop, padded to {longest} tokens, is extrapolated "
        f"from one batch of {len(batch)} rows a round: all its batches are of one size",
        *timings.notes,
    ]
    return Report("score", figures, dtype_of(copy), rows.source, notes)


class Gemm:
    """The matrix products of one pass over ``GEMM_ROWS`` tokens and nothing else, in the guard path's arithmetic."""

    def __init__(self, base: BaseModel, shapes: Counter[tuple[int, int]]) -> None:
        device = next(base.model.parameters()).device
        dtype = torch.bfloat16 if takes_bf16(device, "auto") else torch.float32
        self._shapes = shapes
        self._inputs = {a: torch.randn(GEMM_ROWS, a, dtype=dtype, device=device) for a, _ in shapes}
        self._weights = {(a, b): torch.randn(b, a, dtype=dtype, device=device) for a, b in shapes}

    @torch.inference_mode()
    def turn(self) -> None:
        for (inputs, outputs), count in self._shapes.items():
            for _ in range(count):
                nn.functional.linear(self._inputs[inputs], self._weights[inputs, outputs])


def linear_shapes(base: BaseModel) -> Counter[tuple[int, int]]:
    """How many linear maps of each shape (in, out) a token goes through in the decoder; the LM head is not run."""
    decoder: nn.Module = base.model.get_decoder()  # type: ignore[no-untyped-call]
    linear = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    return Counter((module.in_features, module.out_features) for module in linear)


def rendered_ids(guard: Guard, invocation: str, example: Example) -> list[int]:
    """A row's tokens as the guard reads them, in one window."""
    return guard.engine.renderer.judged(example.conversation(), example.target, invocation).ids
