"""The table of predictions: made in one place, checked, saved and read."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies

from course_ml.data import Dataset, Split
from course_ml.predictions import Predictions


@pytest.fixture
def dataset():
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), "uint8")
    return Dataset.from_arrays("noise", images, np.arange(40) % 4, list("abcd"), groups=np.arange(40) // 8)


def uniform(n, classes=4):
    return np.full((n, classes), 1 / classes)


def test_columns_come_from_the_data_set(dataset):
    split = Split.kfold(dataset, 2)
    rows = split.rows("validation", 1)
    preds = Predictions.make(dataset, rows, uniform(len(rows)), "validation", 1, key="recipe")
    assert list(preds.table) == ["id", "group", "fold", "split", "y_true", "p:a", "p:b", "p:c", "p:d"]
    assert preds.ids == list(dataset.items.id.iloc[rows]) and preds.groups == list(dataset.items.group.iloc[rows])
    assert preds.y_true.tolist() == dataset.labels[rows].tolist()
    assert set(preds.table.fold) == {1} and set(preds.table.split) == {"validation"}
    assert (preds.classes, preds.key, preds.fingerprint) == (dataset.classes, "recipe", dataset.fingerprint)


def test_rows_may_come_in_any_order(dataset):
    preds = Predictions.make(dataset, [30, 2, 17], uniform(3))
    assert preds.ids == ["000030", "000002", "000017"] and preds.y_true.tolist() == [2, 2, 1]


@pytest.mark.parametrize(
    "probabilities, message",
    [
        (
            uniform(2),
            "3 ids, 3 groups, 3 true classes, 4 class names and probabilities of shape .2, 4. do not fit together",
        ),
        (uniform(3, 3), "do not fit together"),
        (uniform(3) + 0.1, "'000000': its probabilities .* are not numbers from 0 to 1 that add up to 1"),
        ([[1, 0, 0, 0], [1, 0, 0, np.nan], [1, 0, 0, 0]], "'000001': its probabilities"),
        ([[1, 0, 0, 0], [1, 0, 0, 0], [2, -1, 0, 0]], "'000002': its probabilities"),
    ],
)
def test_impossible_probabilities_are_refused(dataset, probabilities, message):
    with pytest.raises(ValueError, match=message):
        Predictions.make(dataset, range(3), probabilities)


@pytest.mark.parametrize("y_true", [[0, 2], [-1, 0]])
def test_classes_that_do_not_exist_are_refused(y_true):
    with pytest.raises(ValueError, match="its true class is not among the 2"):
        Predictions.from_arrays(["a", "b"], y_true, uniform(2, 2), ["x", "y"])


def test_without_groups_every_image_is_alone():
    preds = Predictions.from_arrays([7, 8], [0, 1], uniform(2, 2), ["x", "y"])
    assert preds.groups == preds.ids == ["7", "8"]


def test_one_split_is_selected(dataset):
    table = pd.concat([Predictions.make(dataset, [0, 1], uniform(2), name).table for name in ("validation", "test")])
    both = Predictions(table.reset_index(drop=True), dataset.classes, "key", "fingerprint")
    assert len(both.select("test")) == 2 and set(both.select("test").table.split) == {"test"}
    assert both.select("test").key == "key"
    with pytest.raises(ValueError, match="no predictions for 'train'; there are some for test, validation"):
        both.select("train")


names = strategies.lists(
    strategies.text(min_size=1, max_size=8).filter(str.isprintable), min_size=2, max_size=5, unique=True
)


@settings(max_examples=30, deadline=None)
@given(names, strategies.integers(0, 2**31))
def test_what_is_saved_is_read(tmp_path_factory, classes, seed):
    rng, n = np.random.default_rng(seed), 6
    path = tmp_path_factory.mktemp("saved") / "p.parquet"
    preds = Predictions.from_arrays(
        range(n),
        rng.integers(0, len(classes), n),
        rng.dirichlet(np.ones(len(classes)), n),
        classes,
        "test",
        3,
        rng.integers(0, 3, n),
        "a key",
        "a fingerprint",
    )
    preds.save(path)
    read = Predictions.load(path)
    assert read.table.equals(preds.table) and np.array_equal(read.probabilities, preds.probabilities)
    assert (read.classes, read.key, read.fingerprint) == (classes, "a key", "a fingerprint")


def test_predictions_survive_class_names_of_all_kinds(tmp_path):
    preds = Predictions.from_arrays(["x"], [1], [[0.25, 0.75]], ["id", "fold, “quoted”"], fingerprint="f")
    preds.save(tmp_path / "p.parquet")
    assert Predictions.load(tmp_path / "p.parquet").table.equals(preds.table)
