"""The labelled sets of an evaluation: files, the files of a folder, and public sets on the hub."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_guard.data.example import Example
from lora_guard.data.public import PUBLIC_SETS, read_public
from lora_guard.data.sources import read_foreign
from lora_guard.errors import ConfigError, DataError
from lora_guard.taxonomy import Taxonomy

PUBLIC = "public"
"""As a suite: every public set on the hub."""

_HUB = "hub:"
_ENDINGS = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class EvalSet:
    """Labelled rows under one name, and the sha256 of what they were read from.

    ``note`` says what of the labels was left out, if anything.
    """

    name: str
    place: str
    sha256: str
    examples: list[Example]
    note: str = ""


def read_sets(data: Sequence[str], suite: str | None, taxonomy: Taxonomy) -> tuple[list[EvalSet], dict[str, str]]:
    """Every set of an evaluation, checked before the first is scored.

    A file whose categories are all another taxonomy's is judged on harmfulness alone. Some public sets are given out
    on request only: those of the suite that cannot be loaded are left out, unless none can.

    Args:
        data: files, or ``hub:NAME`` with a name of :data:`PUBLIC_SETS`.
        suite: a folder, whose data files are all taken, or :data:`PUBLIC`.
        taxonomy: names the categories that may occur.

    Returns:
        The sets, and of each public set of the suite that was left out the reason.

    Raises:
        ConfigError: no set at all, or two of one name.
        DataError: a missing, empty, unlabelled or bad file, a folder without one, or no public set that can be loaded.
    """
    places = [*data, *(_suite(suite) if suite is not None else [])]
    if not places:
        raise ConfigError("nothing to evaluate on; give --data FILE or --suite FOLDER")
    names = [place.removeprefix(_HUB) if place.startswith(_HUB) else Path(place).stem for place in places]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ConfigError(f"two sets are called {sorted(repeated)[0]!r}; allowed: different names")
    sets: list[EvalSet] = []
    left_out: dict[str, str] = {}
    for name, place in zip(names, places, strict=True):
        try:
            sets.append(_read(name, place, taxonomy))
        except DataError as error:
            if suite != PUBLIC or place in data:
                raise
            left_out[name] = str(error)
    if not sets:
        raise DataError(f"no public set can be loaded: {next(iter(left_out.values()))}")
    return sets, left_out


def _suite(suite: str) -> list[str]:
    if suite == PUBLIC:
        return [f"{_HUB}{name}" for name in PUBLIC_SETS]
    folder = Path(suite)
    if not folder.is_dir():
        raise DataError(f"suite {suite!r} is not a folder; allowed: a folder with data files, or {PUBLIC!r}")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
    if not found:
        raise DataError(f"suite {suite!r} holds no data file; allowed endings: {', '.join(_ENDINGS)}")
    return [str(path) for path in found]


def _read(name: str, place: str, taxonomy: Taxonomy) -> EvalSet:
    if place.startswith(_HUB):
        examples = read_public(name, taxonomy)
        return EvalSet(name, place, hash_of(examples), examples)
    path = Path(place)
    examples, foreign = read_foreign(path, taxonomy)
    if all(example.harmful is None and not example.categories for example in examples):
        raise DataError(f"data file {place!r} has no label; needed: 'unsafe', or categories of {taxonomy.name!r}")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    note = f"its categories are not those of {taxonomy.name!r}: harmfulness alone" if foreign else ""
    return EvalSet(name, path.name, sha256, examples, note)


def hash_of(examples: Sequence[Example]) -> str:
    """A hash of rows that came from no file: of their text and labels, in order."""
    digest = hashlib.sha256()
    for example in examples:
        row = [example.prompt, example.response, example.harmful, sorted(example.categories.items()), example.source]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
