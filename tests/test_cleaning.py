"Cleaning against scikit-learn, against planted errors, and what a file of decisions survives."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies
from sklearn.metrics import average_precision_score

from course_ml.cleaning import (
    acquisition_batches,
    apply_decisions,
    clean_split,
    compare_detectors,
    decide,
    label_issue_scores,
    label_issues,
    leak_effect,
    leaking_pairs,
    order_blocks,
    outlier_scores,
    pairs_in_blocks,
    read_decisions,
    score_cuts,
    similar_pairs,
    similarity_threshold,
)
from course_ml.config import Recipe
from course_ml.crossval import cross_validate, predict_out_of_fold
from course_ml.data import Dataset, Split
from course_ml.datasets import load_dataset
from course_ml.predictions import Predictions


def guess(classes=4, n=200, noise=.1, seed=0):
    "Return a fair model's predictions with noisy labels as truth, and which labels are wrong."
    rng = np.random.default_rng(seed)
    true = np.arange(n) % classes
    wrong = rng.random(n) < noise
    given_labels = np.where(wrong, (true + rng.integers(1, classes, n)) % classes, true)
    logits = rng.normal(size=(n, classes)) + 3 * np.eye(classes)[true]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ids = [f"p{i:03d}" for i in range(n)]
    return Predictions.from_arrays(ids, given_labels, probabilities, list("abcd")[:classes]), wrong


@given(data=strategies.data(), n=strategies.integers(2, 60))
def test_the_area_under_the_cuts_is_scikit_learns(data, n):
    scores = np.array(data.draw(strategies.permutations(range(n))), float)
    errors = np.array(data.draw(strategies.lists(strategies.booleans(), min_size=n, max_size=n).filter(any)))
    table = score_cuts(scores, errors)
    area = (np.diff(table.recall, prepend=0) * table.precision).sum()
    assert area == pytest.approx(average_precision_score(errors, scores))
    assert table.recall.iloc[-1] == 1 and table.recall.is_monotonic_increasing


@pytest.mark.parametrize("method", ["loss", "confident learning"])
def test_planted_noise_is_found_far_better_than_at_random(method):
    preds, wrong = guess()
    scores = {method: label_issue_scores(preds, method), "random": np.random.default_rng(1).random(len(preds))}
    found, random = compare_detectors(scores, wrong).itertuples()
    assert found.low > 3 * wrong.mean() and random.low < wrong.mean() < random.high


def test_the_predicted_label_is_the_true_one():
    preds, wrong = guess(n=400)
    issues = label_issues(preds)
    caught = issues[issues.issue & issues.id.isin(np.array(preds.ids)[wrong])]
    true = pd.Series(np.array(list("abcd"))[np.arange(400) % 4], index=preds.ids)
    assert len(caught) > .7 * wrong.sum() and (true[caught.id].to_numpy() == caught.predicted).mean() > .85


@pytest.fixture
def images():
    dataset = load_dataset("digits", size=16)
    return dataset.take(np.random.default_rng(0).permutation(len(dataset))[:80])


def test_decisions_outlive_the_notebook_and_replace_one_another(images, tmp_path):
    file, (first, second) = tmp_path / "new" / "decisions.csv", images.items.id[:2]
    file.parent.mkdir()
    decide(file, first, "remove")
    decide(file, second, "relabel", "7")
    decide(file, first, "keep")
    assert read_decisions(file).to_numpy().tolist() == [[second, "relabel", "7"], [first, "keep", ""]]
    reviewed = apply_decisions(images, file)
    assert reviewed.labels[1] == 7 and len(reviewed) == len(images) and images.labels[1] == images.items.label[1]


def test_decisions_that_make_no_sense_are_named(images, tmp_path):
    file = tmp_path / "decisions.csv"
    file.write_text(f"id,decision,label\n{images.items.id[0]},keep,\n{images.items.id[1]},burn,\n")
    with pytest.raises(ValueError, match=r"decisions.csv, row 3: 'burn'"): read_decisions(file)
    file.write_text("id,decision,label\nnobody,keep,\n")
    with pytest.raises(KeyError, match="no image 'nobody'"): apply_decisions(images, file)
    file.write_text(f"id,decision,label\n{images.items.id[0]},relabel,eleven\n")
    with pytest.raises(KeyError, match="no class 'eleven'"): apply_decisions(images, file)


@pytest.fixture
def series():
    "Return forty things in four classes, photographed twice in a row, and features that know the thing."
    rng = np.random.default_rng(0)
    things = rng.normal(size=(40, 32))
    features = np.repeat(things, 2, axis=0) + .15 * rng.normal(size=(80, 32))
    images = rng.integers(0, 256, (80, 8, 8, 3), dtype="uint8")
    return Dataset.from_arrays("series", images, np.repeat(np.arange(40) // 10, 2)), features


def test_series_are_found_without_being_told(series):
    dataset, features = series
    pairs = similar_pairs(dataset, features)
    found = {tuple(sorted(pair)) for pair in pairs[["id", "other"]].to_numpy()}
    assert found == {(f"{i:06d}", f"{i + 1:06d}") for i in range(0, 80, 2)}
    assert order_blocks(dataset, features)[["size", "begins"]].iloc[0].tolist() == [2, 0]
    neighbors = pairs_in_blocks(dataset, 2, 0)
    assert len(neighbors) == 40 and (neighbors.id < neighbors.other).all()


def test_grouped_folds_do_not_leak_and_careless_ones_do(series):
    dataset, features = series
    pairs = similar_pairs(dataset, features)
    careless = leaking_pairs(pairs, Split.kfold(dataset, k=4))
    assert len(careless) > 20 and (careless.split != careless.other_split).all()
    assert leaking_pairs(pairs, Split.kfold(dataset.grouped(pairs), k=4)).empty


def test_order_without_structure_shows_none(series):
    dataset, features = series
    shuffled = features[np.random.default_rng(3).permutation(80)]
    assert order_blocks(dataset, shuffled).t.max() < 4 < order_blocks(dataset, features).t.max()


def test_the_similarity_threshold_falls_as_the_share_grows(series):
    dataset, features = series
    labels = dataset.labels
    assert similarity_threshold(features, labels, 1e-1) < similarity_threshold(features, labels, 1e-3)


def in_folds(ids, folds):
    "Return a split in which every image is its own group."
    return Split(ids, [f"fold {fold}" for fold in folds], ids)


def test_leak_effect_counts_every_image_once(series):
    dataset, features = series
    predicted = (dataset.labels + (np.arange(80) % 5 == 0)) % 4
    preds = Predictions.from_arrays(dataset.items.id, dataset.labels, np.eye(4)[predicted], dataset.classes)
    split = in_folds(list(dataset.items.id), np.arange(80) % 2)
    table = leak_effect(preds, similar_pairs(dataset, features).head(7), split).set_index("images")
    assert table.n.to_dict() == {"all": 80, "with a near duplicate": 14, "without": 66}
    assert (table.n * table.accuracy).round().astype(int).to_dict()["all"] == 64


@given(strategies.integers(0, 10_000))
def test_the_fewest_links_leak_as_all_pairs_do(seed):
    rng = np.random.default_rng(seed)
    things, folds = rng.integers(0, 6, 14), rng.integers(0, 3, 14)
    ids = np.array([f"{i:02d}" for i in range(14)])
    every = [(i, j) for i in range(14) for j in range(i + 1, 14) if things[i] == things[j]]
    fewest = [(np.flatnonzero(things == thing)[0], i) for i, thing in enumerate(things)]
    split = in_folds(list(ids), folds)
    leaks = {i for i, j in [*every, *[(j, i) for i, j in every]] if folds[i] != folds[j]}
    preds = Predictions.from_arrays(ids, np.zeros(14, int), np.eye(2)[np.zeros(14, int)], ["a", "b"])
    for pairs in (every, [(i, j) for i, j in fewest if i != j]):
        table = pd.DataFrame({"id": ids[[i for i, _ in pairs]], "other": ids[[j for _, j in pairs]]})
        assert leak_effect(preds, table, split).n[1] == len(leaks)


def test_a_point_far_away_is_the_first_outlier():
    features = np.random.default_rng(0).normal(size=(100, 8)) + 4
    features[17] *= [1, -1] * 4
    assert outlier_scores(features).argmax() == 17


def test_batches_need_to_be_apart():
    rng = np.random.default_rng(0)
    colors = rng.normal(size=(120, 3))
    colors[:30] += 12
    assert acquisition_batches(colors)[0].tolist() == [1] * 30 + [0] * 90
    assert not acquisition_batches(rng.normal(size=(120, 3)))[0].any()


def test_the_predictions_for_all_are_those_of_the_kept_and_of_each_folds_own_model(images, tmp_path):
    split, removed = Split.kfold(images, k=2), images.items.id[[3, 10, 40]]
    cleaned = images.without(pd.DataFrame({"id": removed, "reason": "a test"}))
    validated = cross_validate(Recipe(image_size=16, epochs=1), cleaned, clean_split(split, cleaned), tmp_path)
    everything = predict_out_of_fold(validated, images, split=split)
    assert everything.ids == list(images.items.id)
    kept = ~np.isin(everything.ids, removed)
    np.testing.assert_allclose(everything.probabilities[kept], validated.out_of_fold.probabilities, atol=1e-6)
    own = dict(zip(split.ids, split.splits))
    assert [f"fold {fold}" for fold in everything.table.fold] == [own[i] for i in everything.ids]
    renamed = replace(images, items=images.items.assign(id="new-" + images.items.id))
    with pytest.raises(ValueError, match="not among the images of the folds"):
        clean_split(split, renamed)
