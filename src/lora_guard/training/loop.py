"""The training loop: one frozen chat model, an adapter and heads, over any number of processes."""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, set_seed
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, register_fsdp_forward_method

from lora_guard import adapter, base_model
from lora_guard.artifact import Artifact
from lora_guard.config import TrainConfig
from lora_guard.data.batch import micro_batches, plan_epoch
from lora_guard.errors import ConfigError, out_of_memory
from lora_guard.heads import GuardHeads
from lora_guard.model import GuardModel, autocast, pad, parameter_counts
from lora_guard.progress import progress
from lora_guard.taxonomy import Taxonomy
from lora_guard.training import start
from lora_guard.training.checkpointing import checkpoint_layers
from lora_guard.training.finish import finish_epoch, finish_run
from lora_guard.training.loss import label_counts, loss_terms, pos_weights, softened
from lora_guard.training.prefix_cache import PrefixCache
from lora_guard.training.rows import RowSet, RunRows, prepare
from lora_guard.training.run import Run, RunFolder
from lora_guard.training.state import load_state, save_state


def train(config: TrainConfig, out: Path, *, resume: bool = False, prefixes: Path | None = None) -> Path:
    """Train a guard; with several processes every one of them calls this.

    Args:
        config: what to train on what.
        out: the run folder (see :class:`RunFolder` for what is written).
        resume: continue from the last resume state; ends with the weights of an uninterrupted run.
        prefixes: folder of the prefix caches; in the user's cache, for later runs too, when None.

    Returns:
        The folder of the finished guard.

    Raises:
        ConfigError: the run folder is in use, its config differs, the processes are not those asked for, or a field
            is not that of the guard to start from.
        ArtifactError, DataError, ModelError, ResourceError: as their names say.
    """
    config, began_with = start.read(config)
    _check_trackers(config)
    accelerator = Accelerator(mixed_precision="no", log_with=list(config.log_with) or None, project_dir=str(out))
    _check_sharding(accelerator)
    _check_processes(accelerator, config)
    folder = RunFolder.open(out, config, resume=resume, main=accelerator.is_main_process)
    run = _set_up(config, began_with, folder, accelerator, prefixes)
    ends = list(accumulate(len(_plan(run, run.rows.train, epoch)) for epoch in range(config.epochs)))
    if isinstance(run.model, FSDPModule):
        run.model.reshard()  # what the set-up read gathered the parameters; states hold shards
    parameters, rows_hash = run.model.trainable(), _hash(run.rows)
    step = load_state(out, parameters, run.optimizer, rows_hash) if resume else 0
    if accelerator.is_main_process:  # not before: a refused state leaves the folder as it was
        folder.write_setup(config, run.rows, parameter_counts(run.model))
        folder.forget_after(step)
    accelerator.init_trackers("lora-guard", config=_flat(config))
    accelerator.wait_for_everyone()
    for epoch in range(config.epochs):
        rows = run.rows.in_epoch(epoch)
        plan = _plan(run, rows, epoch)  # of other batches than one of the clean rows, but of as many
        begin = ends[epoch] - len(plan)
        if run.prefixes is not None:
            run.prefixes.refresh()
        done, shown = max(0, step - begin), accelerator.is_main_process
        with progress(f"epoch {epoch + 1}/{config.epochs}", len(plan), done=done, unit="steps", shown=shown) as tick:
            for batch in plan[done:]:
                record = _step(run, batch, step, ends[-1], epoch, rows)
                step += 1
                accelerator.log({k: v for k, v in record.items() if k not in ("step", "epoch")}, step=step)
                if accelerator.is_main_process:
                    folder.log_step(record)
                if step % config.state_every == 0 or step == ends[epoch]:
                    save_state(out, step, parameters, run.optimizer, rows_hash, main=accelerator.is_main_process)
                tick(1, f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s")
        if not folder.has_epoch(epoch + 1):
            finish_epoch(run, epoch + 1)
    guard = finish_run(run)
    accelerator.end_training()
    return guard


def _check_trackers(config: TrainConfig) -> None:
    """Refuse trackers that are not there: accelerate would leave them out without a word."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in config.log_with:
        if name not in available:
            raise ConfigError(f"log_with names {name!r}, unknown or not installed; installed: {available or 'none'}")


def _check_processes(accelerator: Accelerator, config: TrainConfig) -> None:
    """Say how many processes there are, and refuse to run as fewer than were started or asked for."""
    found = accelerator.num_processes
    launched = int(os.environ.get("WORLD_SIZE", 1))
    alive = int(accelerator.reduce(torch.ones(1, device=accelerator.device), "sum"))
    wanted = config.processes or launched
    if not found == alive == wanted:
        raise ConfigError(
            f"{wanted} processes were asked for and {found} are running; on CPUs start them with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    backend = torch.distributed.get_backend() if found > 1 else "no distribution"
    accelerator.print(f"{found} process{'es' if found > 1 else ''} ({backend}) on {accelerator.device.type}")


def _check_sharding(accelerator: Accelerator) -> None:
    """Refuse what hides or renames parameters, or keeps them where no pass runs: a guard would lack its weights."""
    kind = accelerator.distributed_type
    refused = None
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        refused = kind.value
    elif kind == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if not accelerator.is_fsdp2:
            refused = "FSDP version 1"
        elif plugin.activation_checkpointing:
            refused = "FSDP with activation checkpointing"
        elif isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            refused = "FSDP with parameters on the CPU"
    if refused is not None:
        raise ConfigError(
            f"accelerate is configured for {refused}; allowed: one copy a process, or plain FSDP version 2"
        )


def _set_up(
    config: TrainConfig,
    began_with: Artifact | None,
    folder: RunFolder,
    accelerator: Accelerator,
    prefixes: Path | None,
) -> Run:
    set_seed(config.seed)
    if config.licence_file is not None and not Path(config.licence_file).is_file():
        raise ConfigError(f"licence_file {config.licence_file!r} not found; allowed: a text file")
    taxonomy = Taxonomy.load(config.taxonomy)
    base = base_model.load(config.base_model, revision=config.revision)
    renderer = base_model.renderer(base)
    activated = config.adapter == "alora"
    invocation = config.invocation or (renderer.guard_turn if activated else renderer.end_of_turn)
    invocation_ids = renderer.template_ids(invocation)
    rows = prepare(config, taxonomy, renderer, invocation)
    hidden = base.model.config.get_text_config().hidden_size
    heads = GuardHeads(hidden, len(taxonomy.categories), bias=config.head_bias, harmful=config.harmful_head)
    attached: adapter.Adapter | None = None
    if config.adapter != "none":
        attached = adapter.attach(base.model, _shape(config, invocation_ids if activated else None))
    if config.activation_checkpointing:
        checkpoint_layers(base.model)
    model = GuardModel(base.model, heads, kind=config.adapter, invocation=invocation_ids, attached=attached)
    if began_with is not None:
        start.fill(model, began_with, taxonomy, base.fingerprint)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.base.parameters() if p.requires_grad], "peak": config.learning_rate},
            {"params": list(heads.parameters()), "peak": config.head_learning_rate or config.learning_rate},
        ],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    sizes = {"training rows": len(rows.train.ids), "validation rows": len(rows.validation.ids), **rows.summary}
    accelerator.print(", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in sizes.items() if count))
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "read")
    weight = pos_weights(rows.train.labels, config.pos_weight_max).to(accelerator.device)
    cache = _prefix_cache(config, accelerator, base, model, rows, prefixes) if activated else None
    before = None if began_with is None else began_with.spec
    return Run(
        config, before, folder, accelerator, base, taxonomy, invocation, rows, model, wrapped, optimizer, weight, cache
    )


def _shape(config: TrainConfig, invocation: Sequence[int] | None) -> adapter.LoraShape:
    return adapter.LoraShape(
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
        layers=config.layers,
        invocation=invocation,
    )


def _prefix_cache(
    config: TrainConfig,
    accelerator: Accelerator,
    base: base_model.BaseModel,
    model: GuardModel,
    rows: RunRows,
    root: Path | None,
) -> PrefixCache:
    """The frozen part of the training texts; what will be read twice is kept on the disk."""
    texts = [ids[: -len(model.invocation)] for ids in rows.train.ids]
    repeated = [
        text for text, draws in zip(texts, rows.draws, strict=True) if config.epochs * draws * (1 - config.augment) > 1
    ]
    return PrefixCache(
        model,
        base,
        texts,
        precision=config.precision,
        # Where parameters are sharded all processes read together, whatever each of them would find on the disk.
        limit=int(config.prefix_cache * 1e9) if repeated and not isinstance(model, FSDPModule) else 0,
        repeated=repeated,
        opening=max(0, rows.opening - 1) if config.augment else None,  # an empty text has no more
        writers=accelerator.num_processes,
        root=root,
    )


def _step(run: Run, batch: Sequence[int], step: int, steps: int, epoch: int, rows: RowSet) -> dict[str, float]:
    """One optimizer step on one global batch; what :meth:`RunFolder.log_step` writes of it."""
    config, accelerator = run.config, run.accelerator
    began = time.monotonic()
    # Dropout depends on the place in the run alone, so that a resumed run draws what an uninterrupted one does.
    torch.manual_seed(hash((config.seed, step, accelerator.process_index)) % 2**63)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * _schedule(config, step, steps)
    run.wrapped.train()
    counts = label_counts(rows.labels[list(batch)]).to(accelerator.device)
    terms = torch.zeros(2, device=accelerator.device)
    parts = micro_batches(
        batch, _lengths(rows), accelerator.process_index, accelerator.num_processes, config.micro_batch_size
    )
    for number, part in enumerate(parts):
        with out_of_memory(f"a training pass over {len(part)} rows; lower micro_batch_size {config.micro_batch_size}"):
            terms += _backward(run, rows, part, counts, last=number == len(parts) - 1)
    norm = 0.0
    if config.max_grad_norm is not None:
        norm = float(accelerator.clip_grad_norm_(run.wrapped.parameters(), config.max_grad_norm) or 0.0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    harmful, categories = accelerator.reduce(terms, "sum").tolist()
    tokens = sum(len(rows.ids[index]) for index in batch)
    return {
        "step": step + 1,
        "epoch": epoch + 1,
        "loss": 0.5 * harmful + 0.5 * categories,
        "harmful_loss": harmful,
        "category_loss": categories,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "grad_norm": norm,
        "tokens": tokens,
        "tokens_per_second": tokens / (time.monotonic() - began),
    }


def _backward(run: Run, rows: RowSet, part: Sequence[int], counts: Tensor, *, last: bool) -> Tensor:
    """Forward and backward of one micro-batch; its share ``[2]`` of the global batch's loss terms.

    An empty part still takes its turn, on an unlabelled row: processes must run the same number of passes.
    """
    accelerator = run.accelerator
    indices = list(part) or [0]
    labels = rows.labels[indices] if part else torch.full_like(rows.labels[:1], math.nan)
    labels = softened(labels, run.config.label_smoothing)
    device = accelerator.device
    synchronise = torch.enable_grad() if last else accelerator.no_sync(run.wrapped)
    with synchronise:
        logits = _forward(run, [rows.ids[index] for index in indices])
        terms = loss_terms(logits.float(), labels.to(device), run.pos_weight, counts)
        # DDP and FSDP average gradients over processes; the terms are already shares of one global sum.
        accelerator.backward(0.5 * terms.sum() * accelerator.num_processes)
    return terms.detach()


def _forward(run: Run, ids: Sequence[Sequence[int]]) -> Tensor:
    """Logits of rows: in one pass, or of their invocations alone behind what the frozen base reads without gradient."""
    device = run.accelerator.device
    if run.prefixes is None:
        inputs, mask = pad(ids, run.base.pad_id)
        with autocast(device, run.config.precision):
            return cast(Tensor, run.wrapped(inputs.to(device), mask.to(device)))
    end = len(run.model.invocation)
    prefix = run.prefixes.read([row[:-end] for row in ids])
    with autocast(device, run.config.precision):
        return cast(Tensor, run.wrapped(torch.tensor([row[-end:] for row in ids], device=device), prefixes=[prefix]))


def _schedule(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of a step as a fraction of its peak: linear warm-up, then cosine decay or constant."""
    warmup = math.ceil(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _plan(run: Run, rows: RowSet, epoch: int) -> list[list[int]]:
    return plan_epoch(_lengths(rows), run.config.batch_size, run.config.seed, epoch, run.rows.draws)


def _lengths(rows: RowSet) -> list[int]:
    return [len(ids) for ids in rows.ids]


def _hash(rows: RunRows) -> str:
    """Identifies the training rows in their order: a resumed run must see the same ones."""
    digest = hashlib.sha256(json.dumps(rows.train.ids).encode())
    digest.update(rows.train.labels.numpy().tobytes())
    return digest.hexdigest()


def _flat(config: TrainConfig) -> dict[str, str | int | float | bool]:
    """The config as trackers take it: scalars as they are, everything else as text."""
    values: Iterator[tuple[str, object]] = iter(config.model_dump(mode="json").items())
    return {name: value if isinstance(value, str | int | float | bool) else str(value) for name, value in values}
