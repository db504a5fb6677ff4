"""Bench dual-path: a checked answer against the same answer unchecked, and against the paper's second passes."""

from collections.abc import Callable

import torch

from lora_guard.base_model import BaseModel
from lora_guard.bench.chat import EVERY, Check, Prompt, prompt_of, session_check, stream
from lora_guard.bench.paper import PaperGuard
from lora_guard.bench.report import Figure, Report
from lora_guard.bench.rows import EVAL_FILE
from lora_guard.bench.setup import Setup, dtype_of
from lora_guard.bench.timing import interleave

PROMPT_TOKENS = 256
ANSWER_TOKENS = 128
ROUNDS = 9
ROWS = 64
GENERATE_TOLERANCE = 0.03


def run(
    setup: Setup, *, prompt_tokens: int = PROMPT_TOKENS, answer_tokens: int = ANSWER_TOKENS, rounds: int = ROUNDS
) -> Report:
    """Time four sides: generation alone, with our checks, with the paper's, and transformers' own ``generate``.

    Raises:
        InputError: the model's context has no room for prompt and answer.
    """
    rows = setup.read_rows(EVAL_FILE, ROWS)
    guard, plain, copy = setup.load_guard(), setup.load_base(), setup.load_base()
    paper = PaperGuard(copy, len(guard.taxonomy.categories), setup.seed)
    prompt = prompt_of(guard.engine.renderer, rows.examples, prompt_tokens)
    answers: dict[str, list[int]] = {}

    def side(name: str) -> Callable[[], None]:
        def turn() -> None:
            session = guard.session(seed=setup.seed)
            checks: dict[str, Check | None] = {
                "alone": None,
                "ours": session_check(session, prompt),
                "paper": lambda answer: paper.judge(paper.wrapped(prompt.content, answer)),
            }
            answers[name] = stream(session, prompt, answer_tokens, checks[name])

        return turn

    sides = {name: side(name) for name in ("alone", "ours", "paper")}
    sides["generate"] = lambda: generate(plain, prompt, answer_tokens)
    timings = interleave("dual-path", sides, rounds=rounds, deadline=setup.deadline)
    figures = {
        "ours": Figure("with our checks ÷ generation alone", timings.ratios("ours", "alone"), 1.07),
        "paper": Figure("with the paper's passes ÷ generation alone", timings.ratios("paper", "alone")),
        "generate": Figure(
            "generation alone ÷ transformers' generate",
            timings.ratios("alone", "generate"),
            1.0,
            tolerance=GENERATE_TOLERANCE,
        ),
        "tokens-per-second": Figure(
            "generation alone, prompt included", [answer_tokens / taken for taken in timings.seconds["alone"]]
        ),
    }
    same = "the same" if answers["alone"] == answers["ours"] == answers["paper"] else "NOT the same"
    notes = [
        f"prompt {prompt_tokens}, answer {answer_tokens}; checks on the prompt, every {EVERY} tokens and at the end",
        f"tokens with and without checks: {same}",
        *timings.notes,
    ]
    return Report("dual-path", figures, dtype_of(plain), rows.source, notes)


@torch.inference_mode()
def generate(base: BaseModel, prompt: Prompt, tokens: int) -> None:
    """transformers' own greedy generation of exactly ``tokens`` tokens."""
    model: torch.nn.Module = base.model
    ids = torch.tensor([prompt.ids], device=next(model.parameters()).device)
    model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=base.pad_id,
    )
