"""Calibration: probabilities that hold on unseen rows, thresholds that keep their bound, sense from few rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from lora_guard.conversation import TARGETS, Target
from lora_guard.evaluation.calibrate import BALANCED, PERMISSIVE, STRICT, fit, held_out_scores, scores, threshold
from lora_guard.evaluation.metrics import Bools, Floats, point_metrics
from lora_guard.verdict import Calibration, GuardLogits, Policy

BEST_F1 = Policy(rule="best_f1")
tied_rows = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=60)
rates = st.floats(0, 1)
sparse_rows = st.lists(
    st.tuples(st.integers(-6, 6), st.sampled_from([0.0, 1.0, np.nan]), st.sampled_from(TARGETS)), max_size=60
)


def arrays(pairs: list[tuple[int, bool]]) -> tuple[Floats, Bools]:
    """Scores with many ties, and labels."""
    return np.array([score / 10 for score, _ in pairs]), np.array([label for _, label in pairs])


def drawn(
    rows: int, *, temperature: float = 1.0, bias: float = 0.0, seed: int = 0, spread: float = 3.0
) -> tuple[Floats, Floats]:
    """Logits and labels ``[rows, 1]`` whose true probability is ``sigmoid(logit / temperature + bias)``."""
    random = np.random.default_rng(seed)
    logits = random.normal(scale=spread, size=(rows, 1))
    return logits, (random.random((rows, 1)) < expit(logits / temperature + bias)).astype(float)


def fit_one(logits: Floats, labels: Floats, targets: list[Target], balanced: Policy = BEST_F1) -> Calibration:
    return fit(logits.reshape(-1, 1), labels.reshape(-1, 1), targets, [], balanced)


@given(tied_rows, rates)
def test_a_threshold_by_false_positive_rate_holds_and_a_lower_one_would_not(
    pairs: list[tuple[int, bool]], rate: float
) -> None:
    found, labels = arrays(pairs)
    chosen = threshold(Policy(rule="target_fpr", value=rate), found, labels)
    if labels.all():
        assert chosen is None
        return
    assert chosen is not None
    assert (found[~labels] >= chosen).mean() <= rate
    passed = found[found < chosen]
    if len(passed):
        assert (found[~labels] >= passed.max()).mean() > rate


@given(tied_rows, rates)
def test_a_threshold_by_recall_holds_and_a_higher_one_would_not(pairs: list[tuple[int, bool]], rate: float) -> None:
    found, labels = arrays(pairs)
    chosen = threshold(Policy(rule="target_recall", value=rate), found, labels)
    if not labels.any():
        assert chosen is None
        return
    assert chosen is not None
    assert (found[labels] >= chosen).mean() >= rate
    above = found[found > found[found >= chosen].min()] if (found >= chosen).any() else found[:0]
    if (found >= chosen).any():
        assert (np.isin(found, above) & labels).sum() / labels.sum() < rate


@given(tied_rows, st.sampled_from([0.5, 1.0, 3.0]))
def test_no_threshold_has_a_better_f1_by_what_the_scores_let_expect(
    pairs: list[tuple[int, bool]], weight: float
) -> None:
    found, labels = arrays(pairs)
    weights = np.where(found > 0.3, weight, 1.0)
    chosen = threshold(BEST_F1, found, labels, weights)
    if labels.all() or not labels.any():
        assert chosen is None
        return
    assert chosen is not None

    def expected(cut: float) -> float:
        flagged = found >= cut
        false = (weights * (1 - found))[flagged].sum()
        return float(2 * found[flagged].sum() / max(found[flagged].sum() + false + found.sum(), 1e-300))

    assert expected(chosen) == pytest.approx(max(expected(cut) for cut in [*found, 1.0]))


def test_the_best_f1_of_few_rows_is_nearly_that_of_many() -> None:
    few = [fit_of(300, seed).response.harmful.thresholds[BALANCED] for seed in range(30)]
    many = fit_of(30_000, 0).response.harmful.thresholds[BALANCED]
    assert np.std(few) < 0.02
    assert np.mean(few) == pytest.approx(many, abs=0.01)


def fit_of(rows: int, seed: int) -> Calibration:
    logits, labels = drawn(rows, temperature=1.5, bias=0.5, seed=seed)
    return fit(logits, labels, ["response"] * rows, [], BEST_F1)


@given(tied_rows, st.floats(0.1, 10))
def test_a_bound_holds_on_the_rows_as_they_are(pairs: list[tuple[int, bool]], weight: float) -> None:
    found, labels = arrays(pairs)
    for bound in (Policy(rule="target_fpr", value=0.1), Policy(rule="target_recall", value=0.9)):
        assert threshold(bound, found, labels, np.full(len(found), weight)) == threshold(bound, found, labels)


def test_the_rarer_harm_is_the_higher_is_the_threshold_of_best_f1_on_that_target_alone() -> None:
    logits, labels = drawn(1000, temperature=1.0, bias=0.0, seed=0)
    targets: list[Target] = ["prompt", "response"] * 500
    own, tenth, hundredth = (
        fit(logits, labels, targets, [], BEST_F1, shares) for shares in (None, {"prompt": 0.1}, {"prompt": 0.01})
    )
    prompts, responses = (
        [of.of(target).harmful.thresholds[BALANCED] for of in (own, tenth, hundredth)] for target in TARGETS
    )
    assert prompts == sorted(prompts)
    assert len(set(prompts)) == 3
    assert len(set(responses)) == 1
    assert (tenth.prompt.harmful_share, tenth.response.harmful_share) == (0.1, None)


def test_a_threshold_lies_halfway_so_that_rounding_flips_no_row() -> None:
    found, labels = np.array([0.1, 0.3, 0.7, 0.9]), np.array([False, False, True, True])
    for policy in (BEST_F1, Policy(rule="target_recall", value=1), Policy(rule="target_recall", value=0.6)):
        assert threshold(policy, found, labels) == pytest.approx(0.5)
    assert threshold(Policy(rule="target_fpr", value=0), found, labels) == pytest.approx(0.5)
    near = np.array([0.5, np.nextafter(0.5, 1)])
    chosen = threshold(Policy(rule="target_recall", value=1), near, np.array([False, True]))
    assert chosen is not None
    assert (near >= chosen).tolist() == [False, True]


@given(sparse_rows, rates, rates)
def test_bounds_hold_on_the_rows_of_each_target_and_policies_are_nested(
    rows: list[tuple[int, float, Target]], fpr: float, recall: float
) -> None:
    logits = np.array([float(logit) for logit, _, _ in rows])
    labels = np.array([label for _, label, _ in rows])
    targets = [target for _, _, target in rows]
    for balanced in (BEST_F1, Policy(rule="target_fpr", value=fpr), Policy(rule="target_recall", value=recall)):
        calibration = fit_one(logits, labels, targets, balanced)
        found = scores(calibration, logits.reshape(-1, 1), targets)[:, 0]
        for target in TARGETS:
            at = calibration.of(target).harmful.thresholds
            assert at[STRICT] <= at[BALANCED] <= at[PERMISSIVE]
            own = np.array([row == target for row in targets], dtype=bool)
            harmful, unharmful = found[own & (labels == 1)], found[own & (labels == 0)]
            if len(harmful):
                assert (harmful >= at[STRICT]).mean() >= 0.95
            if len(unharmful):
                assert (unharmful >= at[PERMISSIVE]).mean() <= 0.02
            if len(unharmful) and balanced.rule == "target_fpr":
                assert (unharmful >= at[BALANCED]).mean() <= fpr
            if len(harmful) and balanced.rule == "target_recall":
                assert (harmful >= at[BALANCED]).mean() >= recall


@pytest.mark.parametrize(("temperature", "bias"), [(1.0, 0.0), (2.5, -1.5), (0.5, 1.0)])
def test_temperature_and_bias_are_found_again(temperature: float, bias: float) -> None:
    logits, labels = drawn(20_000, temperature=temperature, bias=bias)
    head = fit_one(logits, labels, ["prompt"] * len(logits)).prompt.harmful
    assert head.temperature == pytest.approx(temperature, rel=0.05)
    assert head.bias == pytest.approx(bias, abs=0.1)


def test_twenty_rows_that_a_line_separates_give_no_certainty() -> None:
    logits = np.concatenate([np.full(10, -1.0), np.full(10, 1.0)])
    head = fit_one(logits, (logits > 0).astype(float), ["response"] * 20).response.harmful
    assert 0.2 < head.temperature <= 1  # without the prior it would be 0
    assert abs(head.bias) < 0.1
    assert 0.85 < head.score(1.0) < 0.995


def test_scores_stay_in_order_even_where_the_logits_mislead() -> None:
    logits = np.linspace(-5, 5, 400)
    head = fit_one(logits, (logits < 0).astype(float), ["prompt"] * 400).prompt.harmful
    assert head.temperature > 5
    assert head.score(5) > head.score(-5)


def test_the_calibration_error_on_unseen_prompts_falls_below_five_hundredths() -> None:
    logits, labels = drawn(3000, temperature=3.0, bias=-1.5, spread=6.0)
    targets: list[Target] = ["prompt" if row % 2 else "response" for row in range(len(logits))]
    calibration = fit(logits, labels, targets, [], BEST_F1)
    groups = [f"prompt {row // 3}" for row in range(len(logits))]
    unseen = held_out_scores(logits, labels, targets, groups, calibration)[:, 0]
    raw, after = (point_metrics(found, labels[:, 0] == 1, 0.5)["ece"] for found in (expit(logits[:, 0]), unseen))
    assert raw is not None
    assert after is not None
    assert raw > 0.1
    assert after < 0.05


def test_a_held_out_score_knows_no_label_of_its_own_prompt() -> None:
    logits, labels = drawn(200)
    targets: list[Target] = ["prompt"] * 200
    groups = ["one" if row < 60 else f"{row}" for row in range(200)]
    calibration = fit(logits, labels, targets, [], BEST_F1)
    before = held_out_scores(logits, labels, targets, groups, calibration)
    changed = np.where(np.arange(200)[:, None] < 60, 1 - labels, labels)
    after = held_out_scores(logits, changed, targets, groups, calibration)
    assert np.array_equal(before[:60], after[:60])
    assert not np.array_equal(before[60:], after[60:])


def test_targets_have_fits_of_their_own_where_both_have_rows_enough() -> None:
    one, two = drawn(5000, bias=2.0, seed=1), drawn(5000, bias=-2.0, seed=2)
    logits, labels = (np.concatenate(pair) for pair in zip(one, two, strict=True))
    calibration = fit(logits, labels, ["prompt"] * 5000 + ["response"] * 5000, [], BEST_F1)
    assert calibration.prompt.harmful.bias == pytest.approx(2, abs=0.3)
    assert calibration.response.harmful.bias == pytest.approx(-2, abs=0.3)
    for target, part in (("prompt", one), ("response", two)):
        head = calibration.of(target).harmful  # type: ignore[arg-type]
        assert (head.fitted_on, head.rows, head.positives) == (target, 5000, int(part[1].sum()))


def test_a_target_with_few_rows_of_a_class_takes_the_fit_on_both() -> None:
    logits, labels = drawn(300)
    harmful = int(labels.sum())
    targets: list[Target] = ["response"] * 300 + ["prompt"] * 9
    extra = np.full((9, 1), 2.0)
    calibration = fit(np.vstack([logits, extra]), np.vstack([labels, np.ones((9, 1))]), targets, [], BEST_F1)
    prompt, response = calibration.prompt.harmful, calibration.response.harmful
    assert (prompt.fitted_on, prompt.rows, prompt.positives) == ("both", 309, harmful + 9)
    assert (response.fitted_on, response.rows, response.positives) == ("response", 300, harmful)


def test_a_head_of_one_class_keeps_its_logits_and_says_that_nothing_was_fitted() -> None:
    logits = np.stack([np.linspace(-3, 3, 50), np.linspace(-3, 3, 50), np.linspace(-3, 3, 50)], axis=1)
    labels = np.stack([np.linspace(-3, 3, 50) > 0, np.zeros(50), np.full(50, np.nan)], axis=1)
    calibration = fit(logits, labels, ["prompt"] * 50, ["never", "nobody"], BEST_F1)
    for target in TARGETS:
        never, nobody = calibration.of(target).categories.values()
        for head, rows in ((never, 50), (nobody, 0)):
            assert (head.temperature, head.bias, head.fitted_on) == (1, 0, "nothing")
            assert (head.rows, head.positives) == (rows, 0)
            assert head.thresholds[BALANCED] == 0.5
        assert set(nobody.thresholds.values()) == {0.5}
    # What unharmful rows alone can tell: how high scores go without harm.
    assert (scores(calibration, logits, ["prompt"] * 50)[:, 1] >= never.thresholds[PERMISSIVE]).mean() <= 0.02


def test_scores_are_those_of_verdicts_to_the_bit() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(scale=4, size=(100, 2))
    labels = (random.random((100, 2)) < 0.5).astype(float)
    targets: list[Target] = ["prompt" if row % 2 else "response" for row in range(100)]
    calibration = fit(logits, labels, targets, ["a"], BEST_F1)
    verdicts = [
        calibration.verdict(GuardLogits(float(row[0]), (float(row[1]),)), target)
        for row, target in zip(logits, targets, strict=True)
    ]
    assert scores(calibration, logits, targets).tolist() == [[v.score, v.categories["a"].score] for v in verdicts]
