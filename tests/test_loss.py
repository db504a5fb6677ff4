"""The loss is the paper's when all labels are known; unknown ones carry neither loss nor gradient."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lora_guard.training.loss import label_counts, loss_terms, pos_weights, softened

ONES = torch.ones(4)


def random_labels(rows: int, seed: int, known: float = 0.6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(rows, 4, generator=generator) < 0.5).float()
    return labels.masked_fill(torch.rand(rows, 4, generator=generator) > known, math.nan)


def random_logits(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed + 1)).requires_grad_()


def test_with_all_labels_known_it_is_the_papers_loss() -> None:
    labels, logits = random_labels(6, 0, known=1.1), random_logits(6, 0)
    weight = torch.tensor([2.0, 1.0, 3.0, 0.5])
    terms = loss_terms(logits, labels, weight, label_counts(labels))
    harmful = binary_cross_entropy_with_logits(logits[:, 0], labels[:, 0], pos_weight=weight[0])
    per_category = [
        binary_cross_entropy_with_logits(logits[:, k], labels[:, k], pos_weight=weight[k]) for k in range(1, 4)
    ]
    assert torch.allclose(terms, torch.stack([harmful, torch.stack(per_category).mean()]))


@given(st.integers(1, 8), st.integers(0, 1000))
def test_a_masked_label_moves_nothing(rows: int, seed: int) -> None:
    labels, logits = random_labels(rows, seed), random_logits(rows, seed)
    loss_terms(logits, labels, ONES, label_counts(labels)).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[labels.isnan()] == 0).all()
    assert (logits.grad[~labels.isnan()] != 0).all()


def test_smoothing_softens_harmfulness_alone_and_knows_no_more_labels_than_before() -> None:
    labels = torch.tensor([[1.0, 1.0], [0.0, math.nan], [math.nan, 0.0]])
    soft = softened(labels, 0.1)
    assert torch.allclose(soft, torch.tensor([[0.95, 1.0], [0.05, math.nan], [math.nan, 0.0]]), equal_nan=True)
    assert torch.equal(softened(labels, 0).nan_to_num(), labels.nan_to_num())


@given(st.integers(2, 12), st.integers(1, 11), st.integers(0, 1000))
def test_the_shares_of_the_parts_add_up_to_the_whole(rows: int, cut: int, seed: int) -> None:
    labels, logits = random_labels(rows, seed), random_logits(rows, seed)
    counts = label_counts(labels)
    whole = loss_terms(logits, labels, ONES, counts)
    parts = [loss_terms(logits[part], labels[part], ONES, counts) for part in (slice(0, cut), slice(cut, rows))]
    assert torch.allclose(sum(parts, torch.zeros(2)), whole, atol=1e-6)


def test_a_batch_without_any_label_has_no_loss() -> None:
    labels = torch.full((2, 4), math.nan)
    logits = random_logits(2, 0)
    terms = loss_terms(logits, labels, ONES, label_counts(labels))
    terms.sum().backward()
    assert terms.tolist() == [0, 0]
    assert logits.grad is not None
    assert not logits.grad.any()


def test_positive_weights_are_negatives_over_positives_of_known_labels() -> None:
    nan = math.nan
    labels = torch.tensor([[1, 0, 1, nan], [0, 0, 1, nan], [0, 0, nan, nan], [nan, 0, 0, nan]])
    assert pos_weights(labels, None).tolist() == [2, 1, 0.5, 1]  # none of the second column's labels is positive
    assert pos_weights(torch.tensor([[1.0]] + [[0.0]] * 50), 20).tolist() == [20]
