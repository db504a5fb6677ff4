"""Lets a chat model make up requests and answer half of them: harmless training rows under the model's own licence.

    python examples/harmless_rows.py rows.jsonl --prompts 3000

A chat model that was trained on people's requests writes such a request itself when it is given no more than the
beginning of a user's turn (Magpie, arXiv 2406.08464). A guard trained on harmful requests alone would take any request
for harm; rows like these are what a commercially usable guard can set against them, since the best-known benign
instructions are under non-commercial licences. Nobody has read the rows: a few may be false.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lora_guard import base_model, files
from lora_guard.base_model import BaseModel
from lora_guard.progress import progress

BATCH = 192
LONGEST_REQUEST = 96
LONGEST_ANSWER = 128
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    parser.add_argument("--prompts", type=int, default=3000, help="how many requests, each another")
    parser.add_argument("--model", default=base_model.DEFAULT)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    base = base_model.load(arguments.model, dtype=torch.bfloat16)
    prompts = requests(base, arguments.prompts)
    answered = dict(answers(base, prompts[::2]))
    rows = [
        {"source": "harmless_rows", "prompt": prompt, "response": answered.get(prompt), "unsafe": False}
        for prompt in prompts
    ]
    files.write_text(arguments.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def requests(base: BaseModel, count: int) -> list[str]:
    """Different requests, of those that came to an end."""
    opening, _, _ = rendered(base, MARK, answer=False).partition(MARK)
    found: dict[str, None] = {}
    with progress("make up requests", count, unit="requests") as advance:
        while len(found) < count:
            before = len(found)
            found.update(dict.fromkeys(text for text in continued(base, [opening] * BATCH, LONGEST_REQUEST) if text))
            advance(min(len(found), count) - before)
    return list(found)[:count]


def answers(base: BaseModel, prompts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Prompts with the model's answers, where one came to an end."""
    ordered = sorted(prompts, key=len)
    with progress("answer", len(ordered), unit="requests") as advance:
        for start in range(0, len(ordered), BATCH):
            batch = ordered[start : start + BATCH]
            texts = continued(base, [rendered(base, prompt, answer=True) for prompt in batch], LONGEST_ANSWER)
            yield from ((prompt, text) for prompt, text in zip(batch, texts, strict=True) if text)
            advance(len(batch))


def rendered(base: BaseModel, prompt: str, *, answer: bool) -> str:
    """The chat template's text around a prompt, up to where an answer begins if one is to come."""
    turns = [{"role": "user", "content": prompt}]
    return str(base.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer))


def continued(base: BaseModel, texts: Sequence[str], longest: int) -> list[str]:
    """What the model samples behind each text; empty where it found no end."""
    inputs = base.tokenizer(
        list(texts), add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    ids = base.model.generate(**inputs, do_sample=True, top_p=0.95, max_new_tokens=longest, pad_token_id=base.pad_id)
    new = ids[:, inputs.input_ids.shape[1] :]
    ended = torch.isin(new, torch.tensor(sorted(base.stop_tokens))).any(1).tolist()
    decoded = base.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() if end else "" for text, end in zip(decoded, ended, strict=True)]


if __name__ == "__main__":
    main()
