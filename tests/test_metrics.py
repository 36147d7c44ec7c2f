"""The scores against scikit-learn on random cases, and the intervals: what they agree with, and that they cover."""

import re

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as oracle
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2

from course_ml import intervals, metrics
from course_ml.predictions import Predictions
from course_ml.study_models import mean_f1


def make(y_true, probabilities, ids=None, groups=None):
    ids = [f"image {i}" for i in range(len(y_true))] if ids is None else ids
    names = [f"class {c}" for c in range(probabilities.shape[1])]
    return Predictions.from_arrays(ids, y_true, probabilities, names, groups=groups)


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
    expected = oracle.roc_auc_score(y, scores, **options)
    assert metrics.auc(predictions) == pytest.approx(expected)
    assert metrics.auc(predictions, np.ones((1, len(y)))) == pytest.approx(expected)
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
@given(cases(), st.sampled_from(["precision", "recall", "F1"]))
def test_absent_classes_are_left_out_in_every_row(predictions, score):
    "scikit-learn's documented convention: `labels=np.unique(y_true)`."
    place, y, found = ["precision", "recall", "F1"].index(score), predictions.y_true, predictions.y_pred
    present, options = np.unique(y), {"zero_division": 0, "average": "macro"}
    expected = oracle.precision_recall_fscore_support(y, found, labels=present, **options)[place]
    assert metrics.summary(predictions, resamples=4).loc[f"macro {score}", "value"] == pytest.approx(expected)
    assert metrics.per_class(predictions, resamples=4).loc["macro average", score] == pytest.approx(expected)
    if score == "F1":
        every = tuple(range(len(predictions.classes)))
        assert mean_f1(every).value(predictions) == mean_f1().value(predictions) == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_interval(n, share, confidence):
    successes = round(share * n)
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    low, high = intervals.wilson_interval(successes, n, confidence)
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
    assert summary["value"].isna().sum() == absent
    assert not absent or summary.loc["AUC", "interval"].startswith("undefined: no image of")
    known = summary[summary["low"].notna()]
    assert known["value"].between(known["low"], known["high"]).all()
    assert (summary["low"].isna() == summary["interval"].str.startswith("undefined")).all()
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


def test_mcnemar():
    few = metrics.mcnemar(*two_models(3, 12)).loc["McNemar"]
    assert few["p value"] == pytest.approx(chi2.sf(81 / 15, 1))
    assert [few[name] for name in ("only first correct", "only second correct", "both correct", "both incorrect", "n")
            ] == [3, 12, 30, 0, 45]
    assert metrics.mcnemar(*two_models(20, 20)).loc["McNemar", "p value"] == 1


def test_tango_without_discordant_images():
    "Where the models agree on all images, Tango's limits are plus and minus z² / (n + z²)."
    units = intervals.Units(np.arange(20), np.zeros(20, int), np.zeros(20, int))
    same = intervals.compare_pairs(np.ones(20, bool), np.ones(20, bool), units)
    z2 = chi2.ppf(0.95, 1)
    np.testing.assert_allclose([same.low, same.high], [-z2 / (20 + z2), z2 / (20 + z2)], atol=1e-9)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10_000), st.integers(2, 80), st.sampled_from([1, 3, 10]))
def test_the_interval_of_two_accuracies_agrees_with_mcnemars_test(seed, n, size):
    rng = np.random.default_rng(seed)
    a, b = (rng.random(n) < rate for rate in rng.random(2))
    of = np.arange(n) // size
    pair = intervals.compare_pairs(a, b, intervals.Units(of, np.zeros(of[-1] + 1, int), np.zeros(n, int)))
    assert (pair.low <= 0 <= pair.high) == (pair.p_value >= 0.05)
    assert pair.low - 1e-9 <= b.mean() - a.mean() <= pair.high + 1e-9
    if size == 1:
        assert pair.p_value == pytest.approx(intervals.mcnemar_p_value((a & ~b).sum(), (b & ~a).sum()))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_groups_change_intervals_and_no_value(seed, size):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, 40)
    p = rng.dirichlet(np.ones(3), 40)
    groups = rng.permutation(40) // size
    plain, grouped = make(y, p), make(y, p, groups=groups)
    assert intervals.units_of(grouped).grouped == (size > 1)
    table, other = (metrics.summary(preds, resamples=20) for preds in (plain, grouped))
    assert ("groups" in other) == (size > 1)
    np.testing.assert_allclose(table["value"].drop("calibration error"), other["value"].drop("calibration error"))


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
        metrics.difference(a, other)


def test_no_predictions_are_refused():
    with pytest.raises(ValueError, match="no predictions"):
        metrics.summary(make(np.array([], int), np.zeros((0, 2))))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 100))
def test_half_samples_have_the_variance_of_a_stratified_mean(sizes, seed):
    strata = intervals.join_singles(np.repeat(np.arange(len(sizes)), sizes))
    if len(strata) < 2:
        return
    weights = np.concatenate(list(intervals.half_samples(strata, 4000, seed)))
    again = np.concatenate(list(intervals.half_samples(strata, 4000, seed)))
    np.testing.assert_array_equal(weights, again)
    counts = np.bincount(strata)
    np.testing.assert_allclose(weights @ np.eye(len(counts))[strata], np.tile(counts, (4000, 1)))
    values = np.random.default_rng(seed).normal(size=len(strata))
    expected = sum(values[strata == h].var(ddof=1) * n for h, n in enumerate(counts))
    assert (weights @ values).var() == pytest.approx(expected, rel=0.15)


def sample(rng, n):
    "Predictions of a model of known skill that is a little overconfident."
    y_true = np.r_[np.arange(5), rng.choice(5, n - 5, p=[0.4, 0.3, 0.15, 0.1, 0.05])]
    logits = rng.normal(size=(n, 5))
    logits[np.arange(n), y_true] += 1.5
    probabilities = np.exp(1.8 * logits)
    return make(y_true, probabilities / probabilities.sum(axis=1, keepdims=True))


def test_intervals_cover_the_truth():
    "The share of 200 test sets of 300 images whose 95 % interval contains the value of a test set of 100,000."
    rng = np.random.default_rng(0)
    large = sample(rng, 100_000)
    truth = np.array([metrics.SCORES[name].value(large) for name in metrics.score_names(large)])
    tables = [metrics.summary(sample(rng, 300), resamples=200, seed=seed) for seed in range(200)]
    coverage = pd.DataFrame([(table["low"] <= truth) & (truth <= table["high"]) for table in tables]).mean()
    assert (coverage > 0.9).all(), coverage


@pytest.mark.parametrize("images", [1, 2])
def test_equal_models_are_rarely_called_different(images):
    "100 classes of one or two images; with the bootstrap within classes it was 95 % and 13 %."
    rng, better = np.random.default_rng(0), []
    for _ in range(60):
        y = np.repeat(np.arange(100), images)
        found = [np.where(rng.random(len(y)) < 0.7, y, rng.integers(0, 100, len(y))) for _ in range(2)]
        a, b = (make(y, np.eye(100)[labels] * 0.9 + 0.001) for labels in found)
        better.append(metrics.better_model(metrics.difference(a, b, "mean per-class accuracy", 100), ("a", "b")))
    assert np.mean([one != "undecided" for one in better]) < 0.12


def test_plants_with_ten_images_are_sixty_observations():
    rng, covered = np.random.default_rng(0), []
    for _ in range(100):
        hits = np.repeat(rng.random(60) < 0.8, 10)
        preds = make(np.zeros(600, int), np.stack([hits, ~hits], 1).astype(float), groups=np.arange(600) // 10)
        table = metrics.class_rows(preds)
        covered.append(table.loc["class 0", "recall low"] <= 0.8 <= table.loc["class 0", "recall high"])
    assert np.mean(covered) > 0.88


def test_f1_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    truth = metrics.class_rows(sample(rng, 100_000))["F1"]
    tables = [metrics.class_rows(sample(rng, 300)) for _ in range(300)]
    coverage = pd.DataFrame([(table["F1 low"] <= truth) & (truth <= table["F1 high"]) for table in tables]).mean()
    assert coverage.between(0.91, 0.99).all(), coverage


def test_classes_of_one_image_have_intervals_where_they_cover():
    "A report of such data ended after training: an interval missed its value by rounding."
    rng = np.random.default_rng(0)
    first, second = (make(np.arange(12), rng.dirichlet(np.ones(12), 12)) for _ in range(2))
    table = metrics.summary(first)
    assert table.low["mean per-class accuracy"] < table.value["mean per-class accuracy"]
    assert table.interval["macro F1"] == "undefined: biased, with 12 classes of so few images"
    gain = metrics.difference(first, second, "macro F1")
    assert np.isnan(gain.low) and gain.reason == table.interval["macro F1"]
    assert metrics.compare(first, second).better["macro F1"] == "undefined"
    assert metrics.per_class(first).loc["macro average", ["F1 low", "F1 high"]].isna().all()
    assert set(metrics.compare(first, first).better) == {"undecided"}


def test_every_printed_interval_comes_from_one_module():
    "Quantiles of t, of the normal distribution and of resamples are taken in `intervals` alone."
    allowed = {"intervals", "benchmarking"}  # repeated timings have Student's interval of their logarithms
    pattern = r"scipy\.stats import .*\b(t|norm|chi2|beta)\b|(quantile|percentile)\(.*97"
    found = {path.stem for path in (ROOT / "course_ml").glob("*.py") if re.search(pattern, path.read_text("utf-8"))}
    assert found <= allowed, found
