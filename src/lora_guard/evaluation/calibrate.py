"""Calibration: logits that read as probabilities, and the thresholds of named policies, from held-out rows."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from lora_guard.conversation import TARGETS, Target
from lora_guard.evaluation.metrics import Bools, Floats
from lora_guard.verdict import Calibration, Calibrator, Policy, TargetCalibration

STRICT, BALANCED, PERMISSIVE = "strict", "balanced", "permissive"

# 0.02 and not less: of a few hundred unharmful rows, 0.01 would leave the threshold to the two or three highest.
_STRICT = Policy(rule="target_recall", value=0.95)
_PERMISSIVE = Policy(rule="target_fpr", value=0.02)

_FEWEST = 10
"""Rows of each class that a target needs for a fit of its own."""

# Standard deviations of the prior on log temperature and bias. Training weighs positives by at most 20 by default,
# which shifts a logit by up to log 20 = 3.
_SPREAD = np.array([1.0, 3.0])


def fit(
    logits: Floats,
    labels: Floats,
    targets: Sequence[Target],
    categories: Sequence[str],
    balanced: Policy,
    harmful_shares: Mapping[Target, float] | None = None,
) -> Calibration:
    """Fit every head on every target.

    Temperature and bias minimise the negative log-likelihood (Platt scaling, with temperature scaling of Guo et al.,
    arXiv 1706.04599, as its slope), held near 1 and 0 by a prior that a few dozen rows outweigh. A target with fewer
    than ten rows of either class takes the fit on both targets; a head without both classes keeps 1 and 0.

    Thresholds are chosen on the rows of the fit, and moved if need be so that the bound of a rate holds on the target's
    own rows too. ``strict`` flags whatever ``balanced`` flags, and ``balanced`` whatever ``permissive`` flags; the
    bounds still hold then. A rule whose class is nowhere among the rows leaves 0.5.

    Args:
        logits: ``[rows, 1 + K]``, harmfulness first.
        labels: ``[rows, 1 + K]``: 1 harmful, 0 unharmful, nan not annotated.
        targets: of each row.
        categories: K names.
        balanced: how the default policy chooses; ``strict`` and ``permissive`` keep a recall of 0.95 and a false
            positive rate of 0.02.
        harmful_shares: of a target's texts where the guard will run, in (0, 1). Labelled rows are harmful far more
            often than chats; thresholds of best F1 are then those of rows whose unharmful ones weigh as much as makes
            up the share. Targets that are not named keep the share of their rows.
    """
    shares = harmful_shares or {}
    policies = {STRICT: _STRICT, BALANCED: balanced, PERMISSIVE: _PERMISSIVE}
    own = {target: np.array([row == target for row in targets], dtype=bool) for target in TARGETS}

    def part(target: Target) -> TargetCalibration:
        weight = _unharmful_weight(labels[:, 0], own[target], shares.get(target))
        # What is not harmful is unharmful; what is not of a category may be harmful, and counts as one row then.
        weights = [np.full(len(labels), weight), np.where(labels[:, 0] == 0, weight, 1.0)]
        heads = [
            _fit_head(logits[:, i], labels[:, i], own[target], target, policies, weights[i > 0])
            for i in range(1 + len(categories))
        ]
        return TargetCalibration(
            harmful=heads[0],
            categories=dict(zip(categories, heads[1:], strict=True)),
            harmful_share=shares.get(target),
        )

    return Calibration(default_policy=BALANCED, policies=policies, prompt=part("prompt"), response=part("response"))


def threshold(policy: Policy, scores: Floats, labels: Bools, weights: Floats | None = None) -> float | None:
    """The threshold of a policy on rows, halfway between the lowest flagged score and the highest other one.

    Best F1 and recall take the highest threshold that will do, a false positive rate the lowest. Bounds hold on the
    labels; best F1 is what the scores, as probabilities, let expect (Lipton et al., arXiv 1402.1892): over labels it is
    so flat that their chances decide where its top is.

    Args:
        policy: how to choose.
        scores: ``[rows]`` in [0, 1), calibrated on the labels.
        labels: ``[rows]``, true is harmful.
        weights: ``[rows]``, how much each counts for best F1 where it is unharmful; 1 when None, as harmful ones do.

    Returns:
        None where the rows lack the class that the policy needs: harmful ones for recall, unharmful ones for a false
        positive rate, both for best F1.
    """
    of_f1 = policy.rule == "best_f1"
    if of_f1 and (labels.all() or not labels.any()):
        return None
    masses = (scores, (1 - scores) * (1 if weights is None else weights)) if of_f1 else (labels, ~labels)
    levels, level = np.unique(scores, return_inverse=True)
    # Cut i flags the rows of levels i and above; the last cut flags none.
    sums = [np.bincount(level, mass, minlength=len(levels)) for mass in masses]
    true, false = (np.append(each[::-1].cumsum()[::-1], 0) for each in sums)
    positives, negatives = true[0], false[0]
    if of_f1:
        f1 = 2 * true / np.maximum(true + false + positives, np.finfo(float).tiny)
        cut = np.flatnonzero(f1 == f1.max())[-1]
    elif policy.rule == "target_recall" and positives:
        cut = np.flatnonzero(true / positives >= policy.value)[-1]
    elif policy.rule == "target_fpr" and negatives:
        cut = np.flatnonzero(false / negatives <= policy.value)[0]
    else:
        return None
    edges = np.concatenate([[0.0], levels, [1.0]])
    lower, upper = edges[cut], edges[cut + 1]
    middle = (lower + upper) / 2
    return float(middle if lower < middle else upper)  # neighbouring floats have no number between them


def scores(calibration: Calibration, logits: Floats, targets: Sequence[Target]) -> Floats:
    """The scores of logits, both ``[rows, 1 + K]``, by each row's target."""
    rows = zip(logits, targets, strict=True)
    pairs = [zip(calibration.of(target).heads, row, strict=True) for row, target in rows]
    return np.array([[head.score(float(logit)) for head, logit in pair] for pair in pairs]).reshape(logits.shape)


def held_out_scores(
    logits: Floats,
    labels: Floats,
    targets: Sequence[Target],
    groups: Sequence[str],
    calibration: Calibration,
    *,
    seed: int = 0,
) -> Floats:
    """Scores ``[rows, 1 + K]``, each by a fit on the half of the groups that the row is not in: an honest error.

    Args:
        logits: ``[rows, 1 + K]``.
        labels: ``[rows, 1 + K]``, nan where not annotated.
        targets: of each row.
        groups: of each row; its prompt, so that no half knows a prompt of the other.
        calibration: its categories and policies are fitted.
        seed: of the halves.
    """
    names = sorted(set(groups))
    first = {names[place] for place in np.random.default_rng(seed).permutation(len(names))[::2]}
    half = np.array([group in first for group in groups], dtype=bool)
    found = np.empty_like(logits)
    for inside in (half, ~half):
        fitted = fit(
            logits[~inside],
            labels[~inside],
            [target for target, held in zip(targets, inside, strict=True) if not held],
            calibration.categories,
            calibration.policies[BALANCED],
        )
        chosen = [target for target, held in zip(targets, inside, strict=True) if held]
        found[inside] = scores(fitted, logits[inside], chosen)
    return found


def _unharmful_weight(harmful: Floats, own: Bools, share: float | None) -> float:
    """What an unharmful row of the target must count for, so that its harmful ones make up the share."""
    positives, negatives = (int((own & (harmful == label)).sum()) for label in (1, 0))
    if share is None or not positives or not negatives:
        return 1.0
    return positives / negatives * (1 - share) / share


def _fit_head(
    logits: Floats, labels: Floats, own: Bools, target: Target, policies: Mapping[str, Policy], weights: Floats
) -> Calibrator:
    """The calibrator of one head on one target; the arrays are ``[rows]`` of both targets."""
    known, positive = ~np.isnan(labels), labels == 1
    alone = _rarer(positive[known & own]) >= _FEWEST
    rows = known & own if alone else known
    fitted_on: Literal["prompt", "response", "both", "nothing"] = target if alone else "both"
    temperature, bias = 1.0, 0.0
    if _rarer(positive[rows]):
        temperature, bias = _platt(logits[rows], positive[rows])
    else:
        fitted_on = "nothing"
    head = Calibrator(
        temperature=temperature,
        bias=bias,
        thresholds={},
        fitted_on=fitted_on,
        rows=int(rows.sum()),
        positives=int(positive[rows].sum()),
    )
    found = np.array([head.score(float(logit)) for logit in logits])  # as verdicts have them, to the bit
    parts = [(found[part], positive[part], weights[part]) for part in ([rows] if alone else [rows, known & own])]
    thresholds = {name: _bounded(policy, parts) for name, policy in policies.items()}
    thresholds[STRICT] = min(thresholds[STRICT], thresholds[BALANCED])
    thresholds[PERMISSIVE] = max(thresholds[PERMISSIVE], thresholds[BALANCED])
    return head.model_copy(update={"thresholds": thresholds})


def _rarer(positive: Bools) -> int:
    """Rows of the rarer class."""
    return int(min(positive.sum(), (~positive).sum()))


def _bounded(policy: Policy, parts: Sequence[tuple[Floats, Bools, Floats]]) -> float:
    """A threshold that keeps the policy's bound on every part that has the class; best F1 is that of the first part."""
    found = [chosen for part in parts if (chosen := threshold(policy, *part)) is not None]
    if not found:
        return 0.5
    return {"best_f1": found[0], "target_recall": min(found), "target_fpr": max(found)}[policy.rule]


def _platt(logits: Floats, labels: Bools) -> tuple[float, float]:
    """Temperature and bias of the highest posterior."""
    truth = labels.astype(float)

    def loss(point: Floats) -> tuple[float, Floats]:
        scaled = logits * np.exp(-point[0])
        shifted = scaled + point[1]
        error = expit(shifted) - truth
        value = (np.logaddexp(0, shifted) - truth * shifted).sum() + ((point / _SPREAD) ** 2).sum() / 2
        return float(value), np.array([-(error * scaled).sum(), error.sum()]) + point / _SPREAD**2

    log_temperature, bias = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-4, 4), (None, None)]).x
    return float(np.exp(log_temperature)), float(bias)
