"""Cuts input files into shards, the units that a bulk moderation judges, writes and resumes by."""

import hashlib
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any, Self

from lora_guard.conversation import Target
from lora_guard.errors import DataError
from lora_guard.scale import bulk_rows, bulk_store, bulk_table
from lora_guard.scale.bulk_rows import Position, Row
from lora_guard.scale.bulk_table import Columns

_SHARD_BYTES = 32 << 20
"""A shard ends at this many bytes of input too, since an actor holds a shard in memory."""


_PIECE = 8 << 20
"""Bytes that are hashed at a time, and between two words of progress."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows that stand together in one file and share one output file."""

    number: int
    """Within the file."""
    first: int
    """The index of its first row in the file; blank lines have none."""
    rows: int
    start: int
    before: int
    """``start`` and ``before`` are the :class:`Position` of the first row."""

    @property
    def position(self) -> Position:
        """Where reading begins."""
        return Position(self.start, self.before)


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to moderate, as it was when it was planned."""

    path: str
    sha256: str
    size: int
    shards: list[Shard]
    columns: Columns

    @property
    def rows(self) -> int:
        """Rows of the file, the bad ones included."""
        return sum(shard.rows for shard in self.shards)

    def row_id(self, index: int) -> str:
        """What tells a row from all others, in every run: the file's hash and the row's index in it."""
        return f"{self.sha256[:16]}-{index}"


@dataclass(frozen=True, slots=True)
class Part:
    """A shard of one of several files."""

    file: int
    shard: Shard

    @property
    def name(self) -> str:
        """Of its output files, without ending."""
        return f"part-{self.file:05d}-{self.shard.number:06d}"

    def to_row(self) -> dict[str, int]:
        """Flat, as a row of a data set."""
        return {"file": self.file, **asdict(self.shard)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """From :meth:`to_row`."""
        values = {name: int(value) for name, value in row.items()}
        return cls(values.pop("file"), Shard(**values))


def plan_file(path: str, shard_rows: int, target: Target | None = None, shard_bytes: int = _SHARD_BYTES) -> InputFile:
    """:func:`planning` to its end."""
    *_, planned = planning(path, shard_rows, target, shard_bytes)
    assert isinstance(planned, InputFile)
    return planned


def planning(
    path: str, shard_rows: int, target: Target | None = None, shard_bytes: int = _SHARD_BYTES
) -> Iterator[int | InputFile]:
    """Read a file in pieces: its hash, its columns, and where each shard begins.

    Args:
        path: a path or URL.
        shard_rows: the most rows of a shard.
        target: what of each row is judged; by default its last message decides.
        shard_bytes: a shard ends when it has so many bytes, too.

    Yields:
        Bytes that were read since the last time, :func:`reading` of them in all, and the plan at the end.

    Raises:
        DataError: it cannot be read, or is not of the form that its ending says.
    """
    with bulk_store.opened(path) as file:
        digest, length = hashlib.sha256(), 0
        try:
            while piece := file.read(_PIECE):
                digest.update(piece)
                length += len(piece)
                yield len(piece)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        if bulk_rows.form_of(path) == ".parquet":
            shards, columns = _cut_parquet(file, path, shard_rows, shard_bytes)
        else:
            shards, columns = ([], {})
            if length:
                shards, columns = yield from _cut_text(file, path, shard_rows, target, shard_bytes)
    yield InputFile(path, digest.hexdigest(), length, shards, columns)


def reading(path: str) -> int:
    """How many bytes :func:`planning` reads: text once for its hash and once for its rows.

    Raises:
        DataError: there is no such file.
    """
    return bulk_store.size(path) * (1 if bulk_rows.form_of(path) == ".parquet" else 2)


def check_distinct(files: list[InputFile]) -> None:
    """See that row ids are unique.

    Raises:
        DataError: two files have the same rows, or there is no row at all.
    """
    seen: dict[str, str] = {}
    for file in files:
        if file.rows and file.sha256 in seen:
            raise DataError(f"{file.path} and {seen[file.sha256]} have the same content; allowed: each file once")
        seen[file.sha256] = file.path
    if not any(file.rows for file in files):
        raise DataError(f"{files[0].path} and all other input is empty; needed: at least one row")


def _cut_text(
    file: IO[bytes], path: str, shard_rows: int, target: Target | None, shard_bytes: int
) -> Generator[int, None, tuple[list[Shard], Columns]]:
    length = file.tell()
    form = bulk_rows.form_of(path)
    columns: Columns = {}
    if form == ".csv":
        bulk_table.add_row(columns, dict.fromkeys(bulk_rows.header(file, path), ""))
    shards: list[Shard] = []
    begin = end = Position()
    first = count = told = 0
    for row in bulk_rows.rows(file, path, begin):
        if count == shard_rows or (count and row.after.start - begin.start > shard_bytes):
            shards.append(Shard(len(shards), first, count, *begin))
            begin, first, count = end, first + count, 0
        if form == ".jsonl" and _can_be_judged(row, target):
            bulk_table.add_row(columns, row.values)
        count, end = count + 1, row.after
        if end.start - told >= _PIECE:
            yield end.start - told
            told = end.start
    if count:
        shards.append(Shard(len(shards), first, count, *begin))
    yield length - told
    return shards, columns


def _can_be_judged(row: Row, target: Target | None) -> bool:
    """Whether its values get into the output: a dead row's must not decide what type a column has."""
    if row.bad:
        return False
    try:
        bulk_rows.conversation(row, ".jsonl", target)
    except DataError:
        return False
    return True


def _cut_parquet(file: IO[bytes], path: str, shard_rows: int, shard_bytes: int) -> tuple[list[Shard], Columns]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        opened = ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not Parquet: {error}") from error
    if len(set(opened.schema_arrow.names)) != len(opened.schema_arrow.names):
        raise DataError(f"{path} has two columns of one name; allowed: each once")
    columns: Columns = {}
    bulk_table.add_schema(columns, opened.schema_arrow)
    shards: list[Shard] = []
    first = 0
    for group in range(opened.num_row_groups):
        meta = opened.metadata.row_group(group)
        fitting = max(1, shard_bytes * meta.num_rows // max(1, meta.total_byte_size))
        for before in range(0, meta.num_rows, min(shard_rows, fitting)):
            count = min(shard_rows, fitting, meta.num_rows - before)
            shards.append(Shard(len(shards), first, count, group, before))
            first += count
    return shards, columns
