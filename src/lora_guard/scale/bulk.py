"""Bulk moderation with Ray Data: shards of the input go through a pool of actors, each of which holds one guard."""

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError, RayTaskError

from lora_guard import files
from lora_guard.artifact import SPEC_FILE, read_spec
from lora_guard.conversation import Target
from lora_guard.errors import ConfigError, GuardError, LoraGuardError, ResourceError
from lora_guard.guard import EngineName, find
from lora_guard.progress import progress
from lora_guard.scale import bulk_manifest, bulk_rows, bulk_store, bulk_table
from lora_guard.scale.bulk_plan import InputFile, Part, check_distinct, planning, reading
from lora_guard.scale.bulk_shard import DEAD_FOLDER, Done, Job, Judge, ShardModerator, finished

_MOST_BLOCKS = 10_000
"""Ray keeps a task for each block; beyond this a block holds several shards, of which a killed actor's finished ones
are not judged again."""


@dataclass(frozen=True, slots=True)
class BulkSettings:
    """A bulk moderation as it is asked for.

    Args:
        input: a path or glob of .jsonl, .csv and .parquet files, on any file system of fsspec.
        output: a folder, likewise.
        address: of a Ray cluster; one on this machine is started when absent.
        actors: guards in memory; one a GPU, or else one a machine, when absent.
        guard, base, allow_other_base, engine, policy: as in :meth:`lora_guard.guard.Guard.load`.
        target: ``prompt`` or ``response``; by default each row's last message decides.
        shard_rows: the most rows of an output file, and the most that a kill loses of an actor's work.
        resume: go on with a run in ``output``.
    """

    input: str
    output: str
    address: str | None = None
    actors: int | None = None
    guard: str = "default"
    base: str | None = None
    allow_other_base: bool = False
    engine: EngineName = "torch"
    policy: str | None = None
    target: Target | None = None
    shard_rows: int = 1024
    resume: bool = False


@dataclass(frozen=True, slots=True)
class BulkSummary:
    """What a run came to. ``rows = judged + dead``; ``resumed`` of them were done before this call."""

    rows: int
    judged: int
    dead: int
    resumed: int
    shards: int
    actors: int
    start_seconds: float
    """Until the input was planned: Ray's start and one reading of the input."""
    seconds: float
    """From then on; the loading of the guards included."""
    output: str


def moderate_bulk(settings: BulkSettings, *, shown: bool = True) -> BulkSummary:
    """Judge every input row exactly once and write each to Parquet with its verdict.

    Args:
        settings: what to judge, by what, and where to.
        shown: progress on stderr.

    Raises:
        DataError: no input, or a file that cannot be read as a whole; bad rows are written apart instead.
        InputError: an output folder in use, or of another run.
        ConfigError: more actors than the cluster has processors for.
        ArtifactError, ModelError: the guard or its base cannot be loaded.
        ResourceError: no memory, no disk space, or a cluster that is lost.
    """
    began = time.monotonic()
    output = bulk_store.absolute(settings.output)
    begun = bulk_manifest.read(output, resume=settings.resume)
    paths = bulk_store.matching(settings.input, outside=output)  # what a run to resume has written is no input
    for path in paths:
        bulk_rows.form_of(path)
    spec = read_spec(find(settings.guard))
    policy = spec.calibration.policy(settings.policy)
    with _cluster(settings.address):
        pool = _pool(settings.actors)
        inputs = _plan(paths, settings.shard_rows, settings.target, shown=shown)
        columns = bulk_table.merged([file.columns for file in inputs])
        bulk_table.check_names(columns, spec.calibration.categories)
        judge = Judge(
            settings.guard,
            settings.base,
            settings.allow_other_base,
            settings.engine,
            begun["precision"] if begun else _precision(settings.engine, pool),
            policy,
            settings.target,
            files.sha256(find(settings.guard) / SPEC_FILE),
        )
        manifest = bulk_manifest.describe(judge, settings.shard_rows, inputs)
        if begun is None:
            bulk_manifest.write(output, manifest)
        else:
            bulk_manifest.check_same(begun, manifest, output)
            bulk_store.remove_temporaries(output)
        planned = time.monotonic()
        job = Job(judge, inputs, columns, output)
        before, after = _moderate(job, pool, shown=shown)
    total = sum(file.rows for file in inputs)
    if before.judged + before.dead + after.judged + after.dead != total:
        raise GuardError(f"{output} holds another number of rows than the input's {total}; this is a fault of ours")
    return BulkSummary(
        rows=total,
        judged=before.judged + after.judged,
        dead=before.dead + after.dead,
        resumed=before.judged + before.dead,
        shards=sum(len(file.shards) for file in inputs),
        actors=pool.actors,
        start_seconds=round(planned - began, 3),
        seconds=round(time.monotonic() - planned, 3),
        output=output,
    )


@dataclass(frozen=True, slots=True)
class _Pool:
    """How many actors, and the processors and GPUs of each."""

    actors: int
    cpus: int
    gpus: float

    @property
    def resources(self) -> dict[str, float]:
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """A Ray cluster, this process's own unless there is one already; quiet, and with no word of it to its makers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its absence is warned of
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors come as exceptions, and become one line
    if ray.is_initialized():
        yield
        return
    own: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.CRITICAL, **own)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ResourceError(f"Ray {address or 'on this machine'!r} cannot be started or reached: {reason}") from error
    try:
        yield
    finally:
        ray.shutdown()


_OBJECT_STORE = 100 << 20
"""Bytes; what passes through Ray is shards' places and counts, never rows."""


def _pool(wanted: int | None) -> _Pool:
    """Share the cluster's processors among the actors; no machine gets more of them than it has processors for."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(machine.get("GPU", 0.0) for machine in machines)
    actors = wanted or int(gpus) or len(machines)
    cpus = [int(machine.get("CPU", 0)) for machine in machines]
    for each in range(max(cpus), 0, -1):
        if sum(cpu // each for cpu in cpus) >= actors:
            return _Pool(actors, each, min(1.0, gpus / actors))
    raise ConfigError(f"--actors {actors} is more than the cluster has processors; allowed: 1 to {sum(cpus)}")


def _plan(paths: Sequence[str], shard_rows: int, target: Target | None, *, shown: bool) -> list[InputFile]:
    """Plan all files, each in a task that tells how far it is."""
    task = ray.remote(planning)
    waiting = {task.remote(path, shard_rows, target): path for path in paths}
    planned: dict[str, InputFile] = {}
    with progress("plan", sum(map(reading, paths)), unit="bytes", shown=shown) as tick:
        while waiting:
            (told,), _ = ray.wait(list(waiting), num_returns=1)
            found = _result(next(told))
            if isinstance(found, InputFile):
                planned[waiting.pop(told)] = found
            else:
                tick(found)
    inputs = [planned[path] for path in paths]
    check_distinct(inputs)
    return inputs


def _precision(engine: EngineName, pool: _Pool) -> Any:
    """What the torch engine would choose where the actors run. Chosen anew by each, it could differ between them."""
    if engine != "torch":
        return "fp32"
    return _result(ray.remote(_measured_precision).options(**pool.resources).remote())


def _measured_precision() -> str:
    from lora_guard.base_model import device
    from lora_guard.model import takes_bf16

    return "bf16" if takes_bf16(device(), "auto") else "fp32"


def _moderate(job: Job, pool: _Pool, *, shown: bool) -> tuple[Done, Done]:
    """Judge the parts that are not there yet; the counts of those that were, and of the others."""
    parts = [Part(index, shard) for index, file in enumerate(job.files) for shard in file.shards]
    present = bulk_store.names(job.output)
    counts = [finished(job, part) for part in parts if f"{part.name}.parquet" in present]
    before = Done(sum(done.judged for done in counts), sum(done.dead for done in counts))
    waiting = [part for part in parts if f"{part.name}.parquet" not in present]
    judged = dead = 0
    total = sum(part.shard.rows for part in parts)
    began = time.monotonic()
    with progress("bulk", total, done=before.judged + before.dead, shown=shown) as tick:
        for done in _results(job, waiting, pool):
            judged, dead = judged + done.judged, dead + done.dead
            rate = (judged + dead) / (time.monotonic() - began)
            tick(done.judged + done.dead, f"{rate:.1f} rows/s, {before.dead + dead} dead")
    return before, Done(judged, dead)


def _results(job: Job, parts: Sequence[Part], pool: _Pool) -> Iterator[Done]:
    if not parts:
        return
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    # Actors that die are started again, and their shards given to another: Ray Data's own way, without a limit.
    data_set = ray.data.from_items(
        [part.to_row() for part in parts], override_num_blocks=min(len(parts), _MOST_BLOCKS)
    ).map(
        ShardModerator,
        fn_constructor_args=(job,),
        compute=ActorPoolStrategy(size=pool.actors),
        **pool.resources,
    )
    try:
        for row in data_set.iter_rows():
            done = Done(**row)
            if done.error:
                raise GuardError(done.error)
            yield done
    except RayError as error:
        raise _lost(error) from error


def _result(answer: Any) -> Any:
    """What tasks return; their own errors as they were raised."""
    try:
        return ray.get(answer)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, LoraGuardError) else _lost(error)) from None
    except RayError as error:
        raise _lost(error) from error


def _lost(error: RayError) -> ResourceError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return ResourceError(f"Ray gave up: {lines[-1][:300]}; what was finished stays, go on with --resume")


def as_text(summary: BulkSummary) -> str:
    """The summary for a person."""
    new = summary.rows - summary.resumed
    parts = [f"{summary.rows:,} rows in, {summary.judged:,} judged, {summary.dead:,} dead"]
    if summary.dead:
        parts.append(f"see {summary.output}/{DEAD_FOLDER}")
    if summary.resumed:
        parts.append(f"{summary.resumed:,} were done before")
    parts.append(
        f"{new / max(summary.seconds, 1e-9):.1f} rows/s with {summary.actors} actor{'s' * (summary.actors != 1)}"
    )
    return f"{'; '.join(parts)}; {summary.shards} files in {summary.output}"


def as_json(summary: BulkSummary) -> str:
    """The summary as one line of JSON."""
    return json.dumps(asdict(summary))
