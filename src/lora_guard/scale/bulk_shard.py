"""What an actor of bulk moderation does: hold one guard, and for each shard read, judge and write its rows."""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

from pyarrow import ArrowException
from pyarrow.parquet import read_metadata, write_table

from lora_guard import files
from lora_guard.artifact import SPEC_FILE
from lora_guard.conversation import Conversation, Target
from lora_guard.errors import ArtifactError, DataError, GuardError, InputError, LoraGuardError
from lora_guard.guard import EngineName, Guard, find
from lora_guard.process_memory import suit_torch
from lora_guard.scale import bulk_rows, bulk_store, bulk_table
from lora_guard.scale.bulk_plan import InputFile, Part
from lora_guard.scale.bulk_rows import Row
from lora_guard.scale.bulk_table import Columns
from lora_guard.verdict import Verdict

DEAD_FOLDER = "_dead"
"""Below the output folder; readers of Parquet folders pass over names with an underscore."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Which guard judges, and how; the same in every process and every resumption of a run."""

    guard: str
    base: str | None
    allow_other_base: bool
    engine: EngineName
    precision: Literal["fp32", "bf16"]
    policy: str
    target: Target | None
    spec_sha256: str
    """Of ``guard.json``, which holds the hashes of all that decides a score."""

    def load(self) -> Guard:
        """The guard, in this process.

        Raises:
            ArtifactError: it is another one here; or as :meth:`Guard.load`.
        """
        found = files.sha256(find(self.guard) / SPEC_FILE)
        if found != self.spec_sha256:
            raise ArtifactError(
                f"guard {self.guard!r} is another one on this machine: its {SPEC_FILE} has sha256 {found[:12]}…, "
                f"the run's has {self.spec_sha256[:12]}…"
            )
        other = self.allow_other_base
        if self.engine == "llama-cpp":
            return Guard.load(
                self.guard, base=self.base, allow_other_base=other, engine=self.engine, policy=self.policy
            )
        suit_torch(os.environ)
        return Guard.load(
            self.guard,
            base=self.base,
            allow_other_base=other,
            precision=self.precision,
            bulk=True,
            policy=self.policy,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """All that the actors of a run share."""

    judge: Judge
    files: list[InputFile]
    columns: Columns
    output: str


class Done(NamedTuple):
    """A shard that is finished, or the error that ends the run: Ray's own form of it would be pages long."""

    judged: int = 0
    dead: int = 0
    error: str = ""


class ShardModerator:
    """Judges shards, one after the other; a finished one stands in the output folder when the call returns.

    Killed at any moment it leaves a shard whole or not there, and judging it again writes the same bytes.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._guard: Guard | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Moderate the part in the form of :meth:`Part.to_row`; a :class:`Done` as a dictionary."""
        try:
            part = Part.from_row(row)
            if bulk_store.exists(f"{self._job.output}/{part.name}.parquet"):
                # Ray gives an actor's whole block to another when it dies, and a block may hold several shards.
                return finished(self._job, part)._asdict()
            if self._guard is None:
                self._guard = self._job.judge.load()
            return moderate_part(self._guard, self._job, part)._asdict()
        except LoraGuardError as error:
            return Done(error=str(error))._asdict()


def moderate_part(guard: Guard, job: Job, part: Part) -> Done:
    """Read, judge and write one shard.

    The dead letters are written first: the Parquet file is what says that the shard is done.

    Raises:
        DataError: the input is not what it was when the run was planned.
        ResourceError: no memory for a batch, or the output cannot be written.
    """
    source = job.files[part.file]
    if bulk_store.size(source.path) != source.size:
        raise DataError(f"{source.path} has changed since the run began; allowed: input that stays as it is")
    with bulk_store.opened(source.path) as file:
        rows = list(islice(bulk_rows.rows(file, source.path, part.shard.position), part.shard.rows))
    if len(rows) != part.shard.rows:
        raise DataError(f"{source.path} has changed since the run began; allowed: input that stays as it is")
    judged, dead = _judge(guard, rows, bulk_rows.form_of(source.path), job.judge.target)
    ids = [source.row_id(part.shard.first + index) for index in range(len(rows))]
    # Letters that a killed actor left may be of rows that are judged this time.
    dead_place = f"{job.output}/{DEAD_FOLDER}/{part.name}.jsonl"
    if dead:
        letters = [
            {"row_id": ids[index], "where": rows[index].where, "reason": reason, "row": bulk_rows.as_text(rows[index])}
            for index, reason in sorted(dead.items())
        ]
        text = "".join(json.dumps(letter) + "\n" for letter in letters)
        bulk_store.write(dead_place, text.encode())
    else:
        bulk_store.remove(dead_place)
    kept = sorted(judged)
    table = bulk_table.table(
        [ids[index] for index in kept],
        [rows[index].values for index in kept],
        [judged[index] for index in kept],
        job.columns,
        guard.spec.calibration.categories,
    )
    bulk_store.write(f"{job.output}/{part.name}.parquet", _parquet(table))
    return Done(len(judged), len(dead))


def finished(job: Job, part: Part) -> Done:
    """The rows of a finished part, as its file says.

    Raises:
        DataError: the file is damaged, or another part's.
    """
    place = f"{job.output}/{part.name}.parquet"
    with bulk_store.opened(place) as file:
        try:
            rows = read_metadata(file).num_rows
        except (ArrowException, OSError) as error:
            raise DataError(f"{place} is damaged: {error}; allowed: remove it and --resume") from error
    if rows > part.shard.rows:
        raise DataError(f"{place} has {rows} rows, its input {part.shard.rows}; allowed: remove it and --resume")
    return Done(rows, part.shard.rows - rows)


def _judge(
    guard: Guard, rows: Sequence[Row], form: str, target: Target | None
) -> tuple[dict[int, Verdict], dict[int, str]]:
    """Verdicts, and reasons why there is none, by the row's index."""
    dead = {index: row.bad for index, row in enumerate(rows) if row.bad}
    found: dict[int, Conversation] = {}
    for index, row in enumerate(rows):
        if index not in dead:
            try:
                found[index] = bulk_rows.conversation(row, form, target)
            except DataError as error:
                dead[index] = str(error).removeprefix(f"{row.where}: ")
    try:
        # The engine sorts what it gets by length: the whole shard at once makes batches of like rows.
        verdicts = guard.moderate(list(found.values()), target=target)
        return dict(zip(found, verdicts, strict=True)), dead
    except (GuardError, InputError):  # a NaN, or a conversation that the chat template refuses
        judged = {}
        for index, conversation in found.items():  # one by one, to find whose fault it is
            try:
                judged[index] = guard.moderate(conversation, target=target)
            except (GuardError, InputError) as error:
                dead[index] = str(error)
        return judged, dead


def _parquet(table: Any) -> bytes:
    buffer = io.BytesIO()
    write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
