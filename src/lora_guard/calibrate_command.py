"""``lora-guard calibrate``: score labelled rows with a guard, fit its calibration anew, write the guard to a folder."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from lora_guard import artifact, files
from lora_guard.config import TrainConfig
from lora_guard.conversation import TARGETS, Target
from lora_guard.data.example import Example
from lora_guard.data.sources import read_file
from lora_guard.data.split import fold
from lora_guard.errors import ConfigError, DataError
from lora_guard.evaluation.calibrate import fit, held_out_scores, scores
from lora_guard.evaluation.metrics import Bools, Floats, point_metrics
from lora_guard.export.bundle import VECTORS_FILE
from lora_guard.guard import Guard, engine_name, find
from lora_guard.normalise import NORMALISE_VERSION
from lora_guard.progress import progress
from lora_guard.token_head import TokenHead
from lora_guard.training.card import with_calibration
from lora_guard.verdict import Calibration, GuardLogits, Policy


def default_rule(target_fpr: float | None, target_recall: float | None, best_f1: bool) -> Policy:
    """The rule of the default policy; best F1 when nothing is asked for.

    Raises:
        ConfigError: two rules at once.
    """
    if (target_fpr is not None) + (target_recall is not None) + best_f1 > 1:
        raise ConfigError("several rules for one policy; allowed: one of --target-fpr, --target-recall, --best-f1")
    if target_fpr is not None:
        return Policy(rule="target_fpr", value=target_fpr)
    if target_recall is not None:
        return Policy(rule="target_recall", value=target_recall)
    return Policy(rule="best_f1")


def shares(words: Sequence[str], rule: Policy) -> dict[Target, float]:
    """The share of harmful texts of each target that is named, as in ``prompt=0.2``.

    Raises:
        ConfigError: another target, no share between 0 and 1, or a rule that no share changes.
    """
    if words and rule.rule != "best_f1":
        raise ConfigError("--harmful-share changes the best F1; allowed: without --target-fpr and --target-recall")
    found: dict[Target, float] = {}
    for word in words:
        name, _, share = word.partition("=")
        target = next((target for target in TARGETS if target == name.strip()), None)
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if target is None or not 0 < value < 1:
            raise ConfigError(f"--harmful-share {word!r}; allowed: prompt or response, =, and a share between 0 and 1")
        found[target] = value
    return found


def token_rows(configs: Sequence[Path], overrides: Sequence[str]) -> list[TrainConfig]:
    """The training configs whose texts a token head learns from; none where none is to be learned.

    Raises:
        ConfigError: overrides without a config, or a config that is missing or wrong.
    """
    if overrides and not configs:
        raise ConfigError("--set changes the configs of --learn-tokens; allowed: both")
    return [TrainConfig.load(config, overrides) for config in configs]


def form_of(engine: str) -> artifact.Form:
    """The form of the guards that an engine calibrates.

    Raises:
        InputError: an unknown engine.
    """
    return "peft" if engine_name(engine) == "torch" else "llama-cpp"


def folder_for(guard: str, engine: str, base: str | None, *, allow_other_base: bool = False) -> Path:
    """The folder whose files a calibrated guard takes over: for ``llama-cpp`` the bundle, made of a guard if need be.

    Raises:
        ArtifactError: there is no such guard, or it is made for other weights than the .gguf file's.
        ModelError: the .gguf file cannot be read, or the engine is not installed.
    """
    folder = find(guard)
    if engine != "llama-cpp":
        return folder
    from lora_guard.engine.device_guard import as_bundle

    return as_bundle(folder, base=base, allow_other_base=allow_other_base)


def calibrate(
    guard: Guard,
    folder: Path,
    paths: Sequence[Path],
    out: Path,
    balanced: Policy,
    harmful_shares: Mapping[Target, float] | None = None,
    learn_from: Sequence[TrainConfig] = (),
) -> dict[str, Any]:
    """Fit a guard's calibration on labelled rows and write the guard with it; adapter and heads stay as they are.

    Args:
        guard: scores the rows.
        folder: where it was read from; for a guard in llama.cpp a bundle.
        paths: files of labelled rows that the guard was not trained on; rows without any label are left out.
        out: the folder of the new guard, may be ``folder``.
        balanced: how the default policy chooses its thresholds.
        harmful_shares: of a target's texts where the guard will run; best F1 is then that of such texts.
        learn_from: name the rows of a new token head; without any the guard keeps the one it has, or none.

    Returns:
        ``heads``: for each target and head the calibrator's fields, ``target``, ``head``, and ``ece``; and ``ece`` of
        harmfulness on the rows of both targets. Each is ``{"before", "held_out"}``: the error of the guard's old
        calibration, and of a fit on the half of the prompts that a row is not among; None without labelled rows.
        ``note``: what a bundle lacks that was made of a guard folder; else None.

    Raises:
        ConfigError: ``out`` is something else than a guard of this engine, or a bundle with test vectors is to learn.
        DataError: a missing or bad file, or one without a labelled row.
        ResourceError: no memory for a batch, or no disk space.
    """
    artifact.check_out(out, guard.spec.form)
    if learn_from and VECTORS_FILE in guard.spec.files:
        raise ConfigError(
            f"{folder} has test vectors, which are those of its own token head or of none; allowed with "
            "--learn-tokens: the guard folder; export it then"
        )
    examples = [row for path in paths for row in _labelled(path, guard)]  # every file is checked before scoring
    targets = [row.target for row in examples]
    learning = _learning(learn_from, guard, examples) if learn_from else None  # bad sources are found now
    own_head, guard.token_head = guard.token_head, None  # it needs no pass: its part is added to what was scored
    with progress("score", len(examples)) as tick:
        rows = guard.logits([row.conversation() for row in examples], done=tick)
    guard.token_head = own_head
    before = scores(guard.spec.calibration, _with_tokens(guard, rows, examples), targets)
    head: bytes | None = None
    learned: dict[str, Any] = {}
    if learning is not None:
        learn, learned = learning
        guard.token_head = learn(np.array([row.harmful for row in rows]))
        head = guard.token_head.to_bytes()
    logits = _with_tokens(guard, rows, examples)
    labels = np.array([row.labels(guard.taxonomy) for row in examples])
    fitted = fit(logits, labels, targets, guard.taxonomy.categories, balanced, harmful_shares)
    held_out = held_out_scores(logits, labels, targets, [fold(row.prompt) for row in examples], fitted)
    found = {"before": before, "held_out": held_out}
    error = _ece(found, labels, 0, np.ones(len(examples), dtype=bool))
    record = {
        "data": [{"file": path.name, "sha256": files.sha256(path)} for path in paths],
        "rows": len(examples),
        "base": guard.base_fingerprint,
        "lora-guard": version("lora-guard"),
        "normaliser": NORMALISE_VERSION,
        "ece": error,
    }
    provenance = guard.spec.provenance | {"calibration": record} | learned
    spec = guard.spec.model_copy(update={"calibration": fitted, "provenance": provenance})
    card = folder / artifact.CARD_FILE
    before_card = card.read_text("utf-8") if card.is_file() else f"# {spec.name}\n"
    artifact.rewrite(folder, out, spec, card=with_calibration(before_card, spec), token_head=head)
    note = None
    if spec.form == "llama-cpp" and VECTORS_FILE not in spec.files:
        note = (
            f"{out} has no test vectors, which 'export' writes: to have it checked, export first, then calibrate that"
        )
    return {"ece": error, "heads": _heads(fitted, targets, labels, found), "note": note}


def show(summary: dict[str, Any], *, as_json: bool) -> None:
    """Print what :func:`calibrate` returned: a table a target, which fits 80 columns, or one line of JSON."""
    if as_json:
        print(json.dumps(summary))
        return
    console = Console(emoji=False, markup=False, highlight=False)
    for target in TARGETS:
        console.print(_table(target, [row for row in summary["heads"] if row["target"] == target]), "")
    console.print(f"Harmfulness, rows of both targets: ECE {_change(summary['ece'])}.\n")
    console.print(
        "n, pos: rows and positives of the fit (* both targets' for want of ten rows of a\n"
        "class, - no fit for want of one). score = sigmoid(logit / T + bias). ECE:\n"
        "calibration error on the target's rows, before→after, the latter on prompts that\n"
        "the fit did not see. Last columns: each policy's threshold."
    )
    if summary["note"]:
        console.print("", f"Note: {summary['note']}.", sep="\n", soft_wrap=True)


def _table(target: Target, rows: Sequence[dict[str, Any]]) -> Table:
    names = list(rows[0]["thresholds"])
    figures = (Column(name, justify="right", no_wrap=True) for name in ("n", "pos", "T", "bias", "ECE", *names))
    table = Table(Column("head", overflow="fold", max_width=20), *figures, title=target, box=None, padding=(0, 1, 0, 0))
    for row in rows:
        mark = {"both": "*", "nothing": "-"}.get(row["fitted_on"], "")
        table.add_row(
            row["head"].partition(",")[0],
            f"{row['rows']}{mark}",
            str(row["positives"]),
            f"{row['temperature']:.2f}",
            f"{row['bias']:.2f}",
            _change(row["ece"]),
            *(f"{row['thresholds'][name]:.3f}" for name in names),
        )
    return table


def _learning(
    configs: Sequence[TrainConfig], guard: Guard, examples: Sequence[Example]
) -> tuple[Callable[[Floats], TokenHead], dict[str, Any]]:
    """What makes a token head of the examples' harmfulness logits ``[rows]``, and what the guard's provenance says."""
    from lora_guard.training.tokens import learn, read_texts

    texts = read_texts(configs, guard, examples)
    sources = list(dict.fromkeys(source.name for config in configs for source in config.train))
    record = {"token_head": {"texts": len(texts.ids), "sources": sources}}
    return functools.partial(learn, texts, guard, examples), record


def _with_tokens(guard: Guard, rows: Sequence[GuardLogits], examples: Sequence[Example]) -> Floats:
    """The logits ``[rows, 1 + K]`` that decide, of those without the token head's part."""
    pairs = zip(rows, examples, strict=True)
    found = [guard.with_tokens(row, example.conversation(), example.target) for row, example in pairs]
    return np.array([[row.harmful, *row.categories] for row in found])


def _labelled(path: Path, guard: Guard) -> list[Example]:
    rows = [row for row in read_file(path, guard.taxonomy) if row.harmful is not None or row.categories]
    if not rows:
        raise DataError(f"data file {str(path)!r} has no labelled row; needed: 'unsafe' or 'categories' in some")
    return rows


def _heads(
    fitted: Calibration, targets: Sequence[Target], labels: Floats, found: dict[str, Floats]
) -> list[dict[str, Any]]:
    heads = []
    for target in TARGETS:
        rows = np.array([row == target for row in targets])
        names = ["harmfulness", *fitted.categories]
        for index, (name, head) in enumerate(zip(names, fitted.of(target).heads, strict=True)):
            error = _ece(found, labels, index, rows)
            heads.append({"target": target, "head": name, **head.model_dump(mode="json"), "ece": error})
    return heads


def _ece(found: dict[str, Floats], labels: Floats, index: int, rows: Bools) -> dict[str, float | None]:
    """The calibration error of one head's scores of each kind, on those of the rows that have its label."""
    known = rows & ~np.isnan(labels[:, index])
    if not known.any():
        return dict.fromkeys(found)
    positive = labels[known, index] == 1
    return {kind: point_metrics(part[known, index], positive, 0.5)["ece"] for kind, part in found.items()}


def _change(error: dict[str, float | None]) -> str:
    return "→".join("–" if value is None else f"{value:.3f}" for value in error.values())
