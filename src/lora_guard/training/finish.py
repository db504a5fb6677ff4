"""What follows an epoch and the run: evaluation, checkpoint, plots, and the finished guard with its card."""

import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from safetensors.torch import save
from torch.distributed.fsdp import FSDPModule

from lora_guard import files
from lora_guard.artifact import BaseReference, DataReference, GuardSpec, HeadsShape
from lora_guard.engine import torch_guard
from lora_guard.evaluation.calibrate import fit
from lora_guard.evaluation.metrics import point_metrics
from lora_guard.evaluation.plots import loss_curves, pr_curves
from lora_guard.model import batched_logits
from lora_guard.progress import progress
from lora_guard.training.card import model_card
from lora_guard.training.rows import RowSet
from lora_guard.training.run import Run, read_records
from lora_guard.verdict import Calibration, Policy

Array = NDArray[np.float64]


def finish_epoch(run: Run, epoch: int) -> None:
    """Evaluate every set and write logits, metrics, plots and the epoch's guard; every process calls this.

    Done again from the start if the run was killed within: the epoch counts once its last metrics line is written.
    """
    # The validation rows are taken whole: the calibration stands on them.
    sets = [run.rows.train.sample(run.config.eval_rows), run.rows.validation, *run.rows.tests]
    logits = {}
    for row_set in sets:
        logits[row_set.name] = _logits(run, row_set)
        if run.accelerator.is_main_process:
            _save_logits(run, epoch, row_set, logits[row_set.name])
    _write_epoch(run, epoch, sets, logits)
    run.accelerator.wait_for_everyone()


def finish_run(run: Run) -> Path:
    """Make the epoch with the best validation AUPRC the run's guard; the last one when that is undefined."""
    if run.accelerator.is_main_process:
        best = max(range(1, run.config.epochs + 1), key=lambda epoch: (run.folder.validation_auprc(epoch), epoch))
        with files.new_folder(run.folder.guard) as temporary:
            shutil.copytree(run.folder.checkpoint(best), temporary, dirs_exist_ok=True)
        run.accelerator.print(f"guard of epoch {best}: {run.folder.guard}")
    run.accelerator.wait_for_everyone()
    return run.folder.guard


def _logits(run: Run, row_set: RowSet) -> Array:
    """Logits ``[rows, 1 + K]``, the highest of each row's windows; each process scores its share.

    Where parameters are sharded each scores all rows: a forward pass is then one of all processes together, and a share
    of its own would leave the others waiting.
    """
    accelerator = run.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    if isinstance(run.model, FSDPModule):
        rank, world = 0, 1
    run.model.eval()
    share = row_set.windows[rank::world]
    flat = [window for windows in share for window in windows]
    with progress(f"evaluate {row_set.name}", len(flat), unit="windows", shown=accelerator.is_main_process) as tick:
        logits = batched_logits(
            run.model, flat, pad_id=run.base.pad_id, precision=run.config.precision, tokens_per_batch=4096, done=tick
        )
    parts = torch.split(logits, [len(windows) for windows in share])
    # The shape holds for a process without a row, too: a set may have fewer rows than there are processes.
    highest = np.array([part.amax(0).numpy() for part in parts]).reshape(-1, run.model.outputs)
    gathered = np.empty((len(row_set.windows), run.model.outputs))
    for other, part in enumerate(gather_object([highest])[:world]):
        gathered[other::world] = part
    return gathered


def _save_logits(run: Run, epoch: int, row_set: RowSet, logits: Array) -> None:
    folder = run.folder.path / "logits"
    folder.mkdir(exist_ok=True)
    tensors = {"logits": torch.from_numpy(logits), "targets": row_set.labels}
    files.write_bytes(folder / f"epoch-{epoch}.{row_set.name.replace('/', '_')}.safetensors", save(tensors))


def _write_epoch(run: Run, epoch: int, sets: list[RowSet], logits: dict[str, Array]) -> None:
    """Checkpoint, plots and metrics of an epoch, by the main process; the line that completes it comes last."""
    main = run.accelerator.is_main_process
    if main:
        run.folder.forget_epoch(epoch)
    labels = {row_set.name: row_set.labels.double().numpy() for row_set in sets}
    scores = {name: _sigmoid(values) for name, values in logits.items()}
    records = [_record(run, epoch, name, scores[name], labels[name]) for name in scores]
    calibration = _calibration(run, next(part for part in sets if part.name == "validation"), logits["validation"])
    spec = _spec(run, calibration, {"epoch": epoch, "sets": {r["set"]: r["harmfulness"] for r in records}})
    card, licence = model_card(spec), _licence(run)
    torch_guard.save(run.model, spec, run.folder.checkpoint(epoch), card=card, licence=licence, main=main)
    if not main:
        return
    loss_curves(read_records(run.folder.steps), run.folder.path / "loss.png")
    known = {name: ~np.isnan(labels[name][:, 0]) for name in scores}
    curves = {name: (scores[name][known[name], 0], labels[name][known[name], 0] == 1) for name in scores}
    pr_curves(curves, run.folder.path / "pr.png", f"Harmfulness after epoch {epoch}")
    for record in records:
        run.folder.log_metrics(record)
        run.accelerator.print(f"epoch {epoch} {record['set']}: {_headline(record)}")
    run.folder.log_metrics({"epoch": epoch, "complete": True})


def _record(run: Run, epoch: int, name: str, scores: Array, labels: Array) -> dict[str, Any]:
    """A line of ``metrics.jsonl``: metrics at threshold 0.5, as the paper has them."""
    columns = ["harmfulness", *run.taxonomy.categories]
    metrics = {}
    for index, column in enumerate(columns):
        known = ~np.isnan(labels[:, index])
        if known.any():
            metrics[column] = point_metrics(scores[known, index], labels[known, index] == 1, 0.5)
    harmfulness = metrics.pop("harmfulness", {})
    return {"epoch": epoch, "set": name, "n": len(labels), "harmfulness": harmfulness, "categories": metrics}


def _calibration(run: Run, validation: RowSet, logits: Array) -> Calibration:
    """The default policy has the best F1 on the validation rows; ``lora-guard calibrate`` can choose another rule."""
    labels = validation.labels.double().numpy()
    return fit(logits, labels, validation.targets, run.taxonomy.categories, Policy(rule="best_f1"))


def _spec(run: Run, calibration: Calibration, metrics: dict[str, Any]) -> GuardSpec:
    config, base = run.config, run.base
    licences = {source.name: source.licence for source in config.train}
    return GuardSpec(
        name=config.name or run.folder.path.resolve().name,
        adapter=config.adapter,
        base=BaseReference(
            name=base.name,
            revision=base.revision,
            fingerprint=base.fingerprint,
            hidden_size=run.model.heads.weight.shape[1],
            norms=base.norms,
            note=base.note,
        ),
        taxonomy=run.taxonomy.to_dict(),
        invocation=run.invocation,
        max_length=config.max_length,
        heads=HeadsShape(bias=config.head_bias, harmful=config.harmful_head),
        calibration=calibration,
        data=[DataReference(name=name, rows=rows, licence=licences[name]) for name, rows in run.rows.used.items()]
        + ([] if run.before is None else _seen_before(run.before)),
        licence=config.licence,
        metrics=metrics,
        provenance={
            # Without the folder of the machine it was made on.
            "config": {name: value for name, value in config.resolved().items() if name != "data_root"},
            **({} if run.before is None else {"start_from": {"name": run.before.name, "files": run.before.files}}),
            "processes": run.accelerator.num_processes,
            "python": platform.python_version(),
            **{name: version(name) for name in ("lora-guard", "torch", "transformers", "peft")},
        },
    )


def _seen_before(spec: GuardSpec) -> list[DataReference]:
    """What the guard that a run began with had been trained on."""
    return [part.model_copy(update={"name": f"{part.name} ({spec.name}, the start)"}) for part in spec.data]


def _licence(run: Run) -> str | None:
    path = run.config.licence_file
    return None if path is None else Path(path).read_text("utf-8")


def _headline(record: dict[str, Any]) -> str:
    shown = {name: record["harmfulness"].get(name) for name in ("auprc", "f1", "fpr", "accuracy")}
    return ", ".join(f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in shown.items())


def _sigmoid(logits: Array) -> Array:
    return torch.from_numpy(logits).sigmoid().numpy()
