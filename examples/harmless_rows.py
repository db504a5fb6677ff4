"""Lets a chat model make up requests and answer half of them: harmless training rows under the model's own licence.

    python examples/harmless_rows.py rows.jsonl --prompts 3000

A chat model that was trained on people's requests writes such a request itself when it is given no more than the
beginning of a user's turn (Magpie, arXiv 2406.08464); the system's turn before it decides of what kind. A guard trained
on harmful requests alone would take any request for harm; rows like these are what a commercially usable guard can set
against them, since the best-known benign instructions are under non-commercial licences, and they bring the long
requests and the role play that those lack. The first rows are requests from ``harmless_requests.txt``, written by
hand, many of them worded like harmful ones. Nobody has read the others: a few may be false. The file is written anew
after each batch, so that a stopped run leaves what it has made.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from lora_guard import base_model, files
from lora_guard.base_model import BaseModel
from lora_guard.progress import progress

BATCH = 128
CHUNK = 32
LONGEST_REQUEST = 256
LONGEST_ANSWER = 64
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
WRITTEN = Path(__file__).with_name("harmless_requests.txt")
# None is the template's own; it stands between the others since it gives the most natural mixture.
SYSTEMS = (
    "You answer short questions: what, why, how, who, where and when.",
    None,
    "You help with questions about cooking, the household, health, sports, games and hobbies.",
    "You answer questions about science, nature, school and technology.",
    "You play any character that the user describes, and tell stories together with the user.",
    "You rewrite the user's text: shorter, friendlier or more formal.",
    None,
    "You sum up the text that the user pastes.",
    "You write code, explain it and find the errors in it.",
    None,
    "You answer questions about history, law, medicine, crime, war and society with facts.",
    "You talk with the user about everyday life, feelings and opinions.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    parser.add_argument("--prompts", type=int, default=3000, help="how many requests, each another")
    parser.add_argument("--model", default=base_model.DEFAULT)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    base = base_model.load(arguments.model, dtype=torch.bfloat16)
    rows: dict[str, str | None] = {}
    with progress("make up requests", arguments.prompts, unit="requests") as advance:
        for source in itertools.chain([WRITTEN], itertools.cycle(SYSTEMS)):
            before = len(rows)
            found = source.read_text("utf-8").splitlines() if isinstance(source, Path) else requests(base, source)
            made = [prompt for prompt in found if prompt not in rows]
            made = made[: arguments.prompts - before]
            rows |= dict.fromkeys(made)
            rows |= zip(made[::2], answers(base, made[::2]), strict=True)
            advance(len(rows) - before)
            files.write_text(arguments.out, "".join(line(*row) for row in rows.items()))
            if len(rows) >= arguments.prompts:
                break


def line(prompt: str, response: str | None) -> str:
    row = {"source": "harmless_rows", "prompt": prompt, "response": response, "unsafe": False}
    return json.dumps(row, ensure_ascii=False) + "\n"


def requests(base: BaseModel, system: str | None) -> list[str]:
    """Different requests that a system's turn brings about, of those that came to an end."""
    opening, _, _ = rendered(base, MARK, system=system).partition(MARK)
    made = continued(base, [opening] * BATCH, LONGEST_REQUEST)
    return list(dict.fromkeys(text for text, ended in made if text and ended))


def answers(base: BaseModel, prompts: Sequence[str]) -> list[str | None]:
    """How the model begins to answer; None where nothing came."""
    texts = [rendered(base, prompt, answer=True) for prompt in prompts]
    return [text or None for text, _ in continued(base, texts, LONGEST_ANSWER)] if texts else []


def rendered(base: BaseModel, prompt: str, *, system: str | None = None, answer: bool = False) -> str:
    """The chat template's text around a prompt, up to where an answer begins if one is to come."""
    turns = [{"role": "user", "content": prompt}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    return str(base.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer))


def continued(base: BaseModel, texts: Sequence[str], longest: int) -> list[tuple[str, bool]]:
    """What the model samples behind each text, and whether it came to an end; what has ended leaves the batch."""
    rows: list[list[int]] = base.tokenizer(list(texts), add_special_tokens=False).input_ids
    starts = [len(row) for row in rows]
    unfinished = list(range(len(rows)))
    for _ in range(0, longest, CHUNK):
        if not unfinished:
            break
        inputs = base.tokenizer.pad(
            {"input_ids": [rows[place] for place in unfinished]}, padding_side="left", return_tensors="pt"
        )
        ids = base.model.generate(
            **inputs, do_sample=True, top_k=0, min_p=0.05, max_new_tokens=CHUNK, pad_token_id=base.pad_id
        )
        for place, new in zip(unfinished, ids[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
            end = next((at for at, token in enumerate(new) if token in base.stop_tokens), len(new) - 1)
            rows[place] += new[: end + 1]
        unfinished = [place for place in unfinished if rows[place][-1] not in base.stop_tokens]
    decoded = base.tokenizer.batch_decode(
        [row[start:] for row, start in zip(rows, starts, strict=True)], skip_special_tokens=True
    )
    return [(text.strip(), row[-1] in base.stop_tokens) for text, row in zip(decoded, rows, strict=True)]


if __name__ == "__main__":
    main()
