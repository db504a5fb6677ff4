"""Metrics equal scikit-learn's, intervals are those of a plain bootstrap, and undefined is None, never NaN."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from lora_guard.evaluation.metrics import (
    METRICS,
    TPR_AT,
    Bools,
    Floats,
    _resampled,
    auprc_drop,
    ece_with_interval,
    evaluate,
    point_metrics,
    reliability,
    with_intervals,
)

rows = st.lists(st.tuples(st.integers(0, 10), st.booleans()), min_size=2, max_size=60)


def arrays(pairs: list[tuple[int, bool]]) -> tuple[Floats, Bools]:
    """Scores with many ties, and labels."""
    return np.array([score / 10 for score, _ in pairs]), np.array([label for _, label in pairs])


@given(rows, st.integers(0, 10))
def test_point_metrics_are_those_of_scikit_learn(pairs: list[tuple[int, bool]], tenths: int) -> None:
    scores, labels = arrays(pairs)
    threshold = tenths / 10
    found = point_metrics(scores, labels, threshold)
    flagged = scores >= threshold
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(labels, flagged))
    if labels.any():
        assert found["auprc"] == pytest.approx(reference.average_precision_score(labels, scores))
        assert found["precision"] == pytest.approx(reference.precision_score(labels, flagged, zero_division=0))
        assert found["recall"] == pytest.approx(reference.recall_score(labels, flagged))
        assert found["f1"] == pytest.approx(reference.f1_score(labels, flagged))
        best = max(reference.f1_score(labels, scores >= cut) for cut in np.unique(scores))
        assert found["best_f1"] == pytest.approx(best)
    if labels.any() and not labels.all():
        assert found["auroc"] == pytest.approx(reference.roc_auc_score(labels, scores))
    if not labels.all():
        assert found["fpr"] == pytest.approx(flagged[~labels].mean())


@given(rows)
def test_tpr_at_an_fpr_is_the_best_of_all_thresholds_within_it(pairs: list[tuple[int, bool]]) -> None:
    scores, labels = arrays(pairs)
    found = point_metrics(scores, labels, 0.5)
    for name, limit in TPR_AT.items():
        if labels.all() or not labels.any():
            assert found[name] is None
            continue
        cuts = [scores >= cut for cut in (*np.unique(scores), 2)]
        within = [flagged[labels].mean() for flagged in cuts if flagged[~labels].mean() <= limit]
        assert found[name] == pytest.approx(max(within))


def test_a_tie_is_not_split_to_reach_an_fpr() -> None:
    """One unharmful row of 20 is 5 %; two that share the highest score with all harm are 10 %."""
    labels = np.array([True] * 5 + [False] * 20)
    one, two = np.array([0.9] * 6 + [0.1] * 19), np.array([0.9] * 7 + [0.1] * 18)
    assert point_metrics(one, labels, 0.5)["tpr_at_fpr_5"] == 1
    assert point_metrics(one, labels, 0.5)["tpr_at_fpr_1"] == 0
    assert point_metrics(two, labels, 0.5)["tpr_at_fpr_5"] == 0


@given(rows, st.integers(0, 10), st.integers(0, 10))
def test_a_threshold_a_row_counts_as_one_set_does(pairs: list[tuple[int, bool]], low: int, high: int) -> None:
    scores, labels = arrays(pairs)
    limits = np.where(np.arange(len(scores)) % 2, low / 10, high / 10)
    found, flagged = point_metrics(scores, labels, limits), scores >= limits
    assert found["accuracy"] == pytest.approx((flagged == labels).mean())
    counts = np.ones((1, len(scores)))
    assert _resampled(scores, labels, limits, counts)["accuracy"][0] == pytest.approx(found["accuracy"])


@given(rows, st.integers(0, 10), st.integers(0, 1000))
def test_a_resample_by_weights_is_the_resample_by_rows(pairs: list[tuple[int, bool]], tenths: int, seed: int) -> None:
    scores, labels = arrays(pairs)
    drawn = np.random.default_rng(seed).integers(0, len(scores), len(scores))
    counts = np.bincount(drawn, minlength=len(scores))[None, :].astype(float)
    weighted = _resampled(scores, labels, tenths / 10, counts)
    plain = point_metrics(scores[drawn], labels[drawn], tenths / 10)
    for name in METRICS:
        expected = plain[name]
        if expected is None:
            assert np.isnan(weighted[name][0])
        else:
            assert weighted[name][0] == pytest.approx(expected)


def sample(size: int = 400) -> tuple[Floats, Bools]:
    random = np.random.default_rng(0)
    labels = random.random(size) < 0.4
    return np.clip(random.normal(0.4 + 0.2 * labels, 0.2), 0, 1), labels


def test_an_interval_holds_its_value_and_is_the_same_for_a_seed() -> None:
    found = with_intervals(*sample(), 0.5, resamples=300, seed=3)
    assert found == with_intervals(*sample(), 0.5, resamples=300, seed=3)
    assert found != with_intervals(*sample(), 0.5, resamples=300, seed=4)
    for name in METRICS:
        value, low, high = (found[name][key] for key in ("value", "low", "high"))
        assert value is not None
        assert low is not None
        assert high is not None
        # These are biased upwards in resamples, or move in steps of a row.
        assert low < value < high or name in ("ece", "best_f1", *TPR_AT)


def test_more_rows_give_a_narrower_interval() -> None:
    few, many = (with_intervals(*sample(size), 0.5, resamples=300)["auprc"] for size in (100, 2000))
    assert many["high"] - many["low"] < 0.5 * (few["high"] - few["low"])  # type: ignore[operator]


def test_a_perfect_guard_and_an_inverted_one_get_the_extremes() -> None:
    labels = np.array([True, True, False, False])
    scores = np.array([0.9, 0.8, 0.2, 0.1])
    perfect = point_metrics(scores, labels, 0.5)
    assert [perfect[name] for name in ("auprc", "auroc", "f1", "fpr", "accuracy")] == [1, 1, 1, 0, 1]
    assert point_metrics(1 - scores, labels, 0.5)["auroc"] == 0


@pytest.mark.parametrize("harmful", [True, False])
def test_one_class_alone_leaves_undefined_metrics_none_and_json_without_nan(harmful: bool) -> None:
    scores, labels = np.array([0.1, 0.6, 0.9]), np.full(3, harmful)
    found = with_intervals(scores, labels, 0.5, resamples=20)
    assert found["auroc"] == {"value": None, "low": None, "high": None}
    assert (found["fpr"]["value"] is None) is harmful
    assert (found["auprc"]["value"] is None) is not harmful
    json.dumps(found, allow_nan=False)


def test_a_calibrated_score_has_no_calibration_error_and_a_confident_one_has_its_distance() -> None:
    labels = np.tile([True, False, False, False], 100)
    assert point_metrics(np.full(400, 0.25), labels, 0.5)["ece"] == pytest.approx(0)
    assert point_metrics(np.full(400, 0.95), labels, 0.5)["ece"] == pytest.approx(0.70)


def test_the_reliability_diagram_holds_every_row_and_shows_the_calibration_error() -> None:
    scores, labels = sample()
    mean, share, weight = reliability(scores, labels)
    assert weight.sum() == len(scores)
    assert (mean * weight).sum() == pytest.approx(scores.sum())
    error = (np.abs(share - mean) * weight).sum() / weight.sum()
    assert ece_with_interval(scores, labels, resamples=20)["value"] == pytest.approx(error)


def test_scores_before_calibration_have_their_error_beside_that_after() -> None:
    labels = np.array([[1.0], [0.0]] * 50)
    before, after = np.full((100, 1), 0.9), np.full((100, 1), 0.5)
    found = evaluate(after, labels, [0.5], [], uncalibrated=before, resamples=20)["harmfulness"]
    assert found["ece"]["value"] == pytest.approx(0)
    assert found["ece_uncalibrated"]["value"] == pytest.approx(0.4)


def test_labels_nobody_gave_are_left_out() -> None:
    nan = np.nan
    labels = np.array([[1, nan, 1], [0, nan, nan], [nan, nan, 0]])
    scores = np.array([[0.9, 0.5, 0.8], [0.1, 0.5, 0.5], [0.5, 0.5, 0.1]])
    found = evaluate(scores, labels, [0.5] * 3, ["nobody", "some"], resamples=20)
    assert found["n"] == 3
    assert found["harmfulness"]["n"] == 2
    assert found["harmfulness"]["auprc"]["value"] == 1
    assert list(found["categories"]) == ["some"]
    assert found["categories"]["some"]["positives"] == 1


def test_the_drop_of_auprc_draws_the_same_rows_from_both_scorings() -> None:
    random = np.random.default_rng(0)
    labels = random.random(200) < 0.4
    scores = 0.3 * labels + random.random(200)
    same = auprc_drop(scores, 2 * scores, labels, resamples=50)  # the order is all that counts
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0}
    worse = scores + random.random(200)
    drop = auprc_drop(scores, worse, labels, resamples=200)
    gap = reference.average_precision_score(labels, scores) - reference.average_precision_score(labels, worse)
    assert drop["value"] == pytest.approx(gap)
    assert drop["low"] is not None
    assert drop["high"] is not None
    assert drop["low"] < gap < drop["high"]


def test_there_is_no_drop_without_harmful_rows() -> None:
    assert auprc_drop(np.ones(3), np.zeros(3), np.zeros(3, bool)) == {"value": None, "low": None, "high": None}
