"""Makes long training rows of both labels: responses as texts of their own, and prompts inside a harmless passage.

    python examples/long_texts.py DATA/train --keep-out DATA/train/validation.jsonl DATA/eval/*.jsonl

Of the prompts of public sets most of the long ones are harmful, since the harmless are short questions: a guard that is
trained on them may take length for harm (docs/lab-log.md). In ``long_texts.jsonl`` both labels have their share of each
length. A harmful response is harmful as a text of its own; a harmful prompt stays so in whatever surrounds it. A tenth
goes to ``long_validation.jsonl``, which no training sees: what a guard makes of long texts is chosen by it. A text that
has thirteen words in a row with one to keep out is left out.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from package_rows import runs

from lora_guard import files
from lora_guard.errors import LoraGuardError

RESPONSES = ("beavertails", "safe_rlhf", "aegis", "do_not_answer", "diasafety", "benign")
PROMPTS = {
    True: ("harmful_prompts", "beavertails_unsafe_prompts", "toxic_text"),
    False: ("benign", "benign_lookalikes", "toxic_text"),
}
LENGTHS = {(256, 512): 250, (512, 1024): 250, (1024, 10**9): 350}
"""How many responses of each label, by their length in characters; of the longest harmful ones there are fewer."""
LONGEST = 1800
EMBEDDED = 300
"""How many prompts of each label stand in a passage."""

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="the folder with the sources' rows; the two files are written to it")
    parser.add_argument("--keep-out", type=Path, nargs="*", default=[], help="JSONL files of rows to keep out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        make(arguments.train, arguments.keep_out, random.Random(arguments.seed))
    except (OSError, ValueError, KeyError, LoraGuardError) as error:
        raise SystemExit(f"error: {error}") from error


def make(train: Path, keep_out: Sequence[Path], chance: random.Random) -> None:
    """Write the two files of rows and print how many each has."""
    kept_out = {run for path in keep_out for row in read(path) for text in texts(row) for run in runs(text)}
    rows = [row for name in RESPONSES for row in read(train / f"{name}.jsonl") if row.get("response")]
    answers = [row for row in rows if kept_out.isdisjoint(runs(row["response"]))]
    asked = {
        label: [row for name in names for row in read(train / f"{name}.jsonl") if harmful(row) is label]
        for label, names in PROMPTS.items()
    }
    made: list[Row] = []
    for label in (True, False):
        made += responses([row for row in answers if row["unsafe"] is label], chance)
        free = [row for row in asked[label] if kept_out.isdisjoint(runs(row["prompt"]))]
        if len(free) < EMBEDDED:
            raise ValueError(f"{', '.join(PROMPTS[label])}: {len(free)} prompts of that label; needed: {EMBEDDED}")
        passages = [row["response"] for row in answers if not row["unsafe"] and len(row["response"]) > 256]
        made += [embedded(row, label, chance.choice(passages), chance) for row in chance.sample(free, EMBEDDED)]
    chance.shuffle(made)
    held_out = len(made) // 10
    for name, chosen in (("long_validation", made[:held_out]), ("long_texts", made[held_out:])):
        files.write_text(train / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in chosen))
        print(f"{name}: {len(chosen)} rows, {sum(row['unsafe'] for row in chosen)} of them harmful")


def responses(rows: Sequence[Row], chance: random.Random) -> Iterator[Row]:
    """Of each length its number of responses, as texts of their own."""
    for (above, most), wanted in LENGTHS.items():
        fitting = [row for row in rows if above < len(row["response"]) <= most]
        chance.shuffle(fitting)
        for row in in_turn(fitting)[:wanted]:
            text = row["response"][:LONGEST].strip()
            yield {"source": "response", "prompt": text, "unsafe": row["unsafe"], "categories": row["categories"]}


def in_turn(rows: Sequence[Row]) -> list[Row]:
    """The rows, one of each source in turn as long as it has any."""
    seen: Counter[str] = Counter()
    turns = []
    for row in rows:
        seen[row["source"]] += 1
        turns.append(seen[row["source"]])
    return [row for _, row in sorted(zip(turns, rows, strict=True), key=lambda pair: pair[0])]


def embedded(row: Row, label: bool, passage: str, chance: random.Random) -> Row:
    """The row's prompt before, between or after sentences of a passage."""
    sentences = re.split(r"(?<=[.!?\n])\s+", passage[: chance.randint(256, LONGEST)])
    place = chance.choice((0, len(sentences), chance.randint(0, len(sentences))))
    text = chance.choice((" ", "\n\n")).join((*sentences[:place], row["prompt"], *sentences[place:]))
    return {"source": "embedded", "prompt": text, "unsafe": label}


def harmful(row: Row) -> bool | None:
    """What a source says of its prompts; those of answers that were harmful count as harmful, as in the configs."""
    if row["source"] == "beavertails_unsafe_prompts":
        return True
    return None if row.get("response") and row["unsafe"] else row["unsafe"]


def texts(row: Row) -> list[str]:
    return [text for text in (row["prompt"], row.get("response")) if text]


def read(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error.msg}; allowed: a JSON object a line") from error
    return rows


if __name__ == "__main__":
    main()
