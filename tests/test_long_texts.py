"""``examples/long_texts.py`` makes long rows of both labels, without passages to keep out, and holds a tenth out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "long_texts.py"
RESPONSES = ("beavertails", "safe_rlhf", "aegis", "do_not_answer", "diasafety", "benign")
PROMPTS = ("harmful_prompts", "beavertails_unsafe_prompts", "benign_lookalikes", "toxic_text")


def prose(place: int, kind: str, words: int) -> str:
    """Sentences that no other place or kind has."""
    return " ".join(f"{kind}{place}w{at}" + "." * (at % 8 == 7) for at in range(words))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Of each length 20 responses a source and label, and 200 short prompts a source and label."""
    for name in RESPONSES:
        rows = [
            {
                "source": name,
                "prompt": "Why?",
                "response": prose(place, f"{name[:3]}{label}", words),
                "unsafe": label,
                "categories": {"a": label},
            }
            for label in (True, False)
            for words in (8, 40, 80, 200)
            for place in range(words, words + 20)
        ]
        write(tmp_path / f"{name}.jsonl", rows)
    for name in (*PROMPTS, "benign"):
        labels = {"harmful_prompts": [True], "beavertails_unsafe_prompts": [None], "toxic_text": [True, False, None]}
        prompts = [
            {"source": name, "prompt": f"{name} {label} {place}?", "response": None, "unsafe": label, "categories": {}}
            for label in labels.get(name, [False])
            for place in range(200)
        ]
        path = tmp_path / f"{name}.jsonl"
        write(path, [*(read(path) if path.is_file() else []), *prompts])
    return tmp_path


def make(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


def test_rows_are_long_texts_of_both_labels_and_a_tenth_is_held_out(train: Path) -> None:
    made = make(train)
    assert made.returncode == 0, made.stderr
    texts, held_out = (read(train / f"{name}.jsonl") for name in ("long_texts", "long_validation"))
    rows = texts + held_out
    assert len(held_out) == len(rows) // 10
    assert not {row["prompt"] for row in texts} & {row["prompt"] for row in held_out}
    for label in (True, False):
        whole = [row for row in rows if row["unsafe"] is label and row["source"] == "response"]
        assert len(whole) == 6 * 3 * 20
        assert all(256 < len(row["prompt"]) <= 1800 and row["categories"] == {"a": label} for row in whole)
        inside = [row for row in rows if row["unsafe"] is label and row["source"] == "embedded"]
        assert len(inside) == 300
        assert all(len(row["prompt"]) > 256 and "?" in row["prompt"] for row in inside)
    assert not any("toxic_text None" in row["prompt"] for row in rows)
    assert not any("beavertails_unsafe_prompts" in row["prompt"] for row in rows if not row["unsafe"])


def test_the_same_seed_makes_the_same_rows_and_another_does_not(train: Path) -> None:
    def made(*options: str) -> str:
        assert make(train, *options).returncode == 0
        return (train / "long_texts.jsonl").read_text("utf-8")

    assert made() == made()
    assert made() != made("--seed", "1")


def test_a_text_with_a_passage_to_keep_out_is_left_out(train: Path) -> None:
    kept = read(train / "aegis.jsonl")[25]["response"]
    write(train / "test.jsonl", [{"prompt": "Go on.", "response": f"So: {' '.join(kept.split()[3:30]).upper()}!"}])
    assert make(train, "--keep-out", train / "test.jsonl").returncode == 0
    rows = read(train / "long_texts.jsonl") + read(train / "long_validation.jsonl")
    assert not any(kept in row["prompt"] for row in rows)
    assert sum(row["source"] == "response" for row in rows) == 2 * 6 * 3 * 20 - 1


def test_what_is_missing_is_one_line(train: Path) -> None:
    whole = (train / "aegis.jsonl").read_text("utf-8")

    def refusal() -> str:
        refused = make(train)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert not (train / "long_texts.jsonl").exists()
        return refused.stderr

    (train / "aegis.jsonl").write_text("{}\n{broken\n", "utf-8")
    assert "aegis.jsonl, line 2: " in refusal()
    (train / "aegis.jsonl").unlink()
    assert "aegis.jsonl" in refusal()
    (train / "aegis.jsonl").write_text(whole, "utf-8")
    for name in ("harmful_prompts", "beavertails_unsafe_prompts", "toxic_text"):
        (train / f"{name}.jsonl").write_text("", "utf-8")
    assert "0 prompts of that label; needed: 300" in refusal()
