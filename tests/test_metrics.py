"""The scores against scikit-learn on random cases, and how often the intervals cover the true value."""

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from course_ml import metrics
from course_ml.predictions import Predictions


def make(y_true, probabilities, ids=None):
    ids = [f"image {i}" for i in range(len(y_true))] if ids is None else ids
    return Predictions.from_arrays(ids, y_true, probabilities, [f"class {c}" for c in range(probabilities.shape[1])])


@st.composite
def cases(draw, all_classes=False):
    "Predictions of 2 to 7 classes: skilled or not, with many ties or none, classes absent or not."
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    classes = draw(st.integers(2, 7))
    n = draw(st.integers(2 * classes, 60))
    y_true = rng.integers(0, classes, n)
    if all_classes:
        y_true[:classes] = np.arange(classes)
    scores = (
        rng.integers(1, 5, (n, classes)).astype(float) if draw(st.booleans()) else rng.exponential(size=(n, classes))
    )
    scores[np.arange(n), y_true] += draw(st.sampled_from([0, 1, 10]))
    return make(y_true, scores / scores.sum(axis=1, keepdims=True))


def weights_for(predictions):
    return np.random.default_rng(1).integers(0, 4, (3, len(predictions))) + 1.0


def check_with_weights(ours, theirs, predictions):
    "Our score without weights, and of three rows of weights, against scikit-learn called once for each."
    np.testing.assert_allclose(ours(predictions), theirs(None), atol=1e-10)
    weights = weights_for(predictions)
    np.testing.assert_allclose(ours(predictions, weights), [theirs(row) for row in weights], atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(
    cases(),
    st.sampled_from(["precision", "recall", "F1"]),
    st.sampled_from(["macro", "weighted"]),
    st.sampled_from([0.0, 1.0, np.nan]),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_class_average(predictions, score, average, zero_division):
    place = ["precision", "recall", "F1"].index(score)
    check_with_weights(
        lambda p, weights=None: metrics.class_average(p, weights, score, average, zero_division),
        lambda row: oracle.precision_recall_fscore_support(
            predictions.y_true,
            predictions.y_pred,
            labels=np.unique(predictions.y_true),
            average=average,
            zero_division=zero_division,
            sample_weight=row,
        )[place],
        predictions,
    )


@settings(deadline=None, max_examples=30)
@given(cases(all_classes=True))
def test_scores_of_probabilities(predictions):
    y, p = predictions.y_true, predictions.probabilities
    scores, options = (p[:, 1], {}) if p.shape[1] == 2 else (p, {"multi_class": "ovr"})
    check_with_weights(
        metrics.auc, lambda row: oracle.roc_auc_score(y, scores, sample_weight=row, **options), predictions
    )
    check_with_weights(metrics.log_loss, lambda row: oracle.log_loss(y, p, sample_weight=row), predictions)
    check_with_weights(
        metrics.top_k_accuracy, lambda row: oracle.accuracy_score(y, predictions.y_pred, sample_weight=row), predictions
    )


@settings(deadline=None, max_examples=40)
@given(cases(all_classes=True), st.integers(1, 8))
def test_top_k_breaks_ties_for_the_class_named_first(predictions, k):
    "scikit-learn breaks them for the class named last: mirrored, the two agree."
    p, classes = predictions.probabilities, len(predictions.classes)
    if k < classes and classes > 2:
        expected = oracle.top_k_accuracy_score(classes - 1 - predictions.y_true, p[:, ::-1], k=k, labels=range(classes))
        assert metrics.top_k_accuracy(predictions, k=k) == pytest.approx(expected)
    if k >= classes:
        assert metrics.top_k_accuracy(predictions, k=k) == 1


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_interval(n, share, confidence):
    successes = round(share * n)
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    low, high = metrics.wilson_interval(successes, n, confidence)
    np.testing.assert_allclose([low, high], [expected.low, expected.high], atol=1e-12)
    assert 0 <= low <= successes / n <= high <= 1


@settings(deadline=None, max_examples=30)
@given(cases())
def test_tables_are_consistent_for_any_case(predictions):
    table, classes = metrics.per_class(predictions, resamples=20), predictions.classes
    assert list(table.index) == [*classes, "macro average", "weighted average"]
    assert table.loc[classes, "support"].sum() == table.loc["macro average", "support"] == len(predictions)
    for score in ("precision", "recall", "F1"):
        rows = table.loc[classes]
        known = rows[f"{score} high"] - rows[f"{score} low"] < 1  # 0 to 1: nothing is known
        assert (rows[f"{score} low"] <= rows[score] + 1e-12)[known].all() and (
            rows[score] <= rows[f"{score} high"] + 1e-12
        )[known].all()
    summary = metrics.summary(predictions, resamples=20)
    assert (summary["n"] == len(predictions)).all()
    assert summary.loc["mean per-class accuracy", "value"] == pytest.approx(
        oracle.balanced_accuracy_score(predictions.y_true, predictions.y_pred))
    assert (summary.loc["macro recall"] == summary.loc["mean per-class accuracy"]).all()
    absent = len(np.unique(predictions.y_true)) < len(classes)
    assert summary["value"].isna().sum() == absent and summary.loc["AUC", "interval"].startswith("undefined") == absent
    assert ("top-5 accuracy" in summary.index) == (len(classes) > 5)


@settings(deadline=None, max_examples=30)
@given(cases(), st.integers(0, 100))
def test_pairs_are_found_in_any_order(predictions, seed):
    order = np.random.default_rng(seed).permutation(len(predictions))
    shuffled = make(predictions.y_true[order], predictions.probabilities[order], [predictions.ids[i] for i in order])
    assert (metrics.compare(predictions, shuffled, resamples=10)["better"].isin(["undecided", "undefined"])).all()
    assert metrics.mcnemar(predictions, shuffled).loc["McNemar", "p value"] == 1


def two_models(only_first, only_second, both=30):
    "Predictions of two classes in which only one of the two classifies so many images correctly."
    n = only_first + only_second + both
    y_true = np.arange(n) % 2
    errors_a, errors_b = (
        np.arange(n) < only_second,
        (np.arange(n) >= only_second) & (np.arange(n) < only_first + only_second),
    )
    return [make(y_true, np.eye(2)[np.where(errors, 1 - y_true, y_true)]) for errors in (errors_a, errors_b)]


def test_mcnemar_exact_and_approximate():
    few = metrics.mcnemar(*two_models(3, 12)).loc["McNemar"]
    assert few["test"] == "exact binomial" and few["p value"] == pytest.approx(binomtest(3, 15).pvalue)
    assert (
        few["only first correct"],
        few["only second correct"],
        few["both correct"],
        few["both incorrect"],
        few["n"],
    ) == (3, 12, 30, 0, 45)
    many = metrics.mcnemar(*two_models(10, 30)).loc["McNemar"]
    assert many["test"] == "corrected chi-squared" and many["p value"] == pytest.approx(
        0.0026638, rel=1e-3
    )  # (20 - 1)**2 / 40 = 9.025
    assert metrics.mcnemar(*two_models(20, 20)).loc["McNemar", "p value"] == 1


def test_predictions_of_other_images_are_refused():
    a, b = two_models(3, 4)
    rename = [*a.ids[:-1], "stranger"]
    with pytest.raises(ValueError, match="stranger"):
        metrics.mcnemar(a, make(b.y_true, b.probabilities, rename))
    with pytest.raises(ValueError, match=r"true classes differ for 1 images: \['image 0'\]"):
        metrics.compare(a, make(np.r_[1 - b.y_true[0], b.y_true[1:]], b.probabilities))
    with pytest.raises(ValueError, match="more than once: .'image 0'"):
        metrics.mcnemar(a, make(b.y_true, b.probabilities, [a.ids[0], *a.ids[:-1]]))
    with pytest.raises(ValueError, match="classes differ"):
        other = Predictions.from_arrays(b.ids, b.y_true, b.probabilities, ["class 1", "class 0"])
        metrics.bootstrap_difference(a, other)


def test_no_predictions_are_refused():
    with pytest.raises(ValueError, match="no predictions"):
        next(metrics.bootstrap_weights(np.array([], int)))


def test_resamples_are_stratified_and_repeatable():
    labels = np.random.default_rng(0).integers(0, 4, 200)
    weights = np.concatenate(list(metrics.bootstrap_weights(labels, 50, seed=3)))
    np.testing.assert_array_equal(weights @ np.eye(4)[labels], np.tile(np.bincount(labels), (50, 1)))
    np.testing.assert_array_equal(weights, np.concatenate(list(metrics.bootstrap_weights(labels, 50, seed=3))))


def sample(rng, n):
    "Predictions of a model of known skill that is a little overconfident."
    y_true = np.r_[np.arange(5), rng.choice(5, n - 5, p=[0.4, 0.3, 0.15, 0.1, 0.05])]
    logits = rng.normal(size=(n, 5))
    logits[np.arange(n), y_true] += 1.5
    probabilities = np.exp(1.8 * logits)
    return make(y_true, probabilities / probabilities.sum(axis=1, keepdims=True))


def test_intervals_cover_the_truth():
    "The share of 150 test sets of 300 images whose 95 % interval contains the value of a test set of 100,000."
    rng = np.random.default_rng(0)
    truth = metrics.all_scores(sample(rng, 100_000))
    covered, reflection_needed = [], []
    for seed in range(150):
        predictions = sample(rng, 300)
        table = metrics.summary(predictions, resamples=200, seed=seed)
        covered.append((table["low"] <= truth) & (truth <= table["high"]))
        low, high = metrics.bootstrap_interval(metrics.calibration_error, predictions, resamples=200, seed=seed)
        reflection_needed.append(low <= truth[-1] <= high)
    coverage = pd.DataFrame(covered).mean()
    assert (coverage > 0.85).all(), coverage
    assert np.mean(reflection_needed) < 0.6  # plain percentiles miss the calibration error


def test_f1_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    truth = metrics.class_rows(sample(rng, 100_000))["F1"]
    tables = [metrics.class_rows(sample(rng, 300)) for _ in range(300)]
    coverage = pd.DataFrame([(table["F1 low"] <= truth) & (truth <= table["F1 high"]) for table in tables]).mean()
    assert coverage.between(0.91, 0.99).all(), coverage


def test_classes_of_one_image_give_no_interval_and_the_reason():
    "A report of such data ended after training: an interval missed its value by rounding."
    rng = np.random.default_rng(0)
    first, second = (make(np.arange(12), rng.dirichlet(np.ones(12), 12)) for _ in range(2))
    table = metrics.summary(first)
    assert table.value.notna().all() and table.low.notna().tolist() == (table.interval == "Wilson").tolist()
    assert table.interval["macro F1"] == "undefined: every class has a single image, so there is nothing to resample"
    gain = metrics.bootstrap_difference(first, second)
    assert np.isnan(gain["low"]) and gain["reason"] == table.interval["macro F1"]
    assert set(metrics.compare(first, second).better) == {"undefined"}
    assert metrics.per_class(first).loc["macro average", ["F1 low", "F1 high"]].isna().all()
