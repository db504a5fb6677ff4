"""The training loss: weighted binary cross-entropy over known labels only.

``0.5 · BCE(harmful) + 0.5 · BCE(categories)`` (arXiv 2407.02987, section 3). Each term is a sum over the known labels
of the whole global batch, divided by their number there: summed over accumulation steps and processes. With all labels
known the second term is the paper's mean over categories. Unknown labels are nan and carry neither loss nor gradient.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def label_counts(labels: Tensor) -> Tensor:
    """Known labels of ``[rows, 1 + K]`` as ``[2]``: harmfulness, categories."""
    known = ~labels.isnan()
    return torch.stack([known[:, 0].sum(), known[:, 1:].sum()])


def softened(labels: Tensor, smoothing: float) -> Tensor:
    """Labels ``[rows, 1 + K]`` with 1 - s/2 and s/2 for 1 and 0 in the column of harmfulness, where s is ``smoothing``.

    The categories stay: most are so rare that s/2 on every other row would outweigh their positives.
    """
    soft = labels.clone()
    soft[:, 0] = labels[:, 0] * (1 - smoothing) + smoothing / 2
    return soft


def loss_terms(logits: Tensor, labels: Tensor, pos_weight: Tensor, counts: Tensor) -> Tensor:
    """This part's share of the two terms, ``[2]``; the shares of all parts of a global batch add up to its terms.

    Args:
        logits: ``[rows, 1 + K]``.
        labels: ``[rows, 1 + K]``, 1 harmful, 0 unharmful, nan unknown.
        pos_weight: ``[1 + K]``, weight of the positive labels.
        counts: ``[2]``, :func:`label_counts` of the global batch.
    """
    known = ~labels.isnan()
    losses = binary_cross_entropy_with_logits(
        logits, torch.where(known, labels, 0.0), pos_weight=pos_weight, reduction="none"
    )
    losses = torch.where(known, losses, 0.0)
    return torch.stack([losses[:, 0].sum(), losses[:, 1:].sum()]) / counts.clamp(min=1)


def pos_weights(labels: Tensor, maximum: float | None) -> Tensor:
    """Negatives / positives of each column of ``[rows, 1 + K]`` over known labels, at most ``maximum``.

    A column without a positive gets 1: there is nothing to weigh.
    """
    positives = (labels == 1).sum(0)
    negatives = (labels == 0).sum(0)
    ratios = torch.where((positives > 0) & (negatives > 0), negatives / positives.clamp(min=1), 1.0)
    return ratios if maximum is None else ratios.clamp(max=maximum)
