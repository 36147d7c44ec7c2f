"Heat maps lie on the evidence, a temperature changes only the confidence, and slices add up."

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies

from course_ml.config import Recipe
from course_ml.data import Dataset, Split
from course_ml.experiment import train_recipe
from course_ml.interpretation import (
    apply_temperature,
    brightness,
    find_temperature,
    grad_cam,
    plot_embedding,
    plot_slices,
    slices,
    train_validation_gap,
)
from course_ml.predictions import Predictions


def random_predictions(seed=0, n=120, classes=5, sharpness=1.0):
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.normal(size=(n, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = np.array([rng.choice(classes, p=row) for row in probabilities])
    return Predictions.from_arrays(range(n), truth, probabilities, list("abcde")[:classes])


@settings(deadline=None)
@given(seed=strategies.integers(0, 1000), temperature=strategies.floats(0.2, 5))
def test_temperature_changes_confidence_and_nothing_else(seed, temperature):
    preds = random_predictions(seed)
    scaled = apply_temperature(preds, temperature)
    assert (scaled.y_pred == preds.y_pred).all() and np.allclose(scaled.probabilities.sum(1), 1)
    gain = scaled.probabilities.max(1) - preds.probabilities.max(1)
    assert (gain <= 1e-9).all() if temperature >= 1 else (gain >= -1e-9).all()


def test_the_temperature_that_was_put_in_is_found():
    calibrated = random_predictions(n=4000, sharpness=2)
    assert find_temperature(calibrated) == pytest.approx(1, abs=0.1)
    assert find_temperature(apply_temperature(calibrated, 0.5)) == pytest.approx(2, rel=0.1)


@pytest.fixture(scope="module")
def corners(tmp_path_factory):
    "Each class has its bright square in another corner; the rest is noise."
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 90, (160, 32, 32, 3)), np.arange(160) % 4
    for image, label in zip(images, labels):
        image[16 * (label // 2) + 3 : 16 * (label // 2) + 13, 16 * (label % 2) + 3 : 16 * (label % 2) + 13] = 250
    dataset = Dataset.from_arrays("corners", images.astype("uint8"), labels)
    split = Split.holdout(dataset, train=0.7, validation=0.3, test=0)
    return dataset, train_recipe(
        Recipe(image_size=32, epochs=8, learning_rate=3e-3),
        dataset,
        split,
        folder=tmp_path_factory.mktemp("runs") / "corners",
    )


def test_heat_is_where_the_evidence_is(corners):
    dataset, run = corners
    assert (run.predictions.y_pred == run.predictions.y_true).all(), (
        "the network must have learned the task"
    )
    heat = grad_cam(run, dataset, np.arange(40))
    corners = heat.reshape(40, 2, 16, 2, 16).mean((2, 4)).reshape(40, 4)
    assert (corners.argmax(1) == dataset.labels[:40]).mean() >= 0.7, "a random corner would give 0.25"


def test_grad_cam_refuses_a_keras_run(corners):
    class KerasRun:
        recipe = Recipe(framework="keras")

    with pytest.raises(ValueError, match="works on torch models"):
        grad_cam(KerasRun(), corners[0], np.arange(2))


def test_slices_add_up_and_plots_are_drawn(corners):
    dataset, run = corners
    preds = run.predictions
    for by in ("group", brightness(dataset), dataset.labels):
        table = (
            slices(preds, dataset, by)
            if not isinstance(by, str)
            else slices(preds, dataset, np.arange(len(dataset)) % 3)
        )
        assert (
            table.n.sum() == len(preds) and (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()
        )
    plot_slices(table, 1.0)
    plot_embedding(np.random.default_rng(0).normal(size=(len(preds), 2)), preds)
    gap = train_validation_gap({"corners": run}).iloc[0]
    assert gap.gap == pytest.approx(gap["train accuracy"] - gap["validation accuracy"])


SLICES = {
    "numbers as strings": (
        ["1.5", "10", "2", None, *map(str, range(20, 40))],
        ["1.5 to 22.5", "22.5 to 28", "28 to 33.5", "33.5 to 39", "missing"],
    ),
    "few numbers": (["10", "2", "2", ""] * 6, ["2", "10", "missing"]),
    "codes": (["007", "012"] * 12, ["007", "012"]),
    "words": (["b", "a", float("nan")] * 8, ["a", "b", "missing"]),
    "nothing": ([None] * 24, ["missing"]),
    "numbers": ([*range(11), float("nan"), *range(12)], ["0 to 2.5", "2.5 to 5", "5 to 8", "8 to 11", "missing"]),
}


@pytest.mark.parametrize("name", SLICES)
def test_slices_keep_missing_values_and_bin_numbers_as_pandas_does(name):
    values, expected = SLICES[name]
    images = np.zeros((24, 2, 2, 3), "uint8")
    dataset = Dataset.from_arrays("values", images, np.arange(24) % 2)
    predictions = Predictions.make(dataset, np.arange(24), np.full((24, 2), 0.5))
    table = slices(predictions, dataset, np.array(values, object))
    assert table.slice.tolist() == expected and table.n.sum() == 24
    numbers = pd.to_numeric(pd.Series(values), errors="coerce")
    if numbers.nunique() > 10:
        edges = numbers.quantile([0, 0.25, 0.5, 0.75, 1])
        counts = pd.cut(numbers, edges, include_lowest=True).value_counts(sort=False)
        assert table.n[:4].tolist() == counts.tolist()


def test_slices_of_other_images_are_refused(corners):
    dataset, run = corners
    with pytest.raises(ValueError, match="has no image"):
        slices(run.predictions, dataset.take(np.arange(20)), np.arange(20))
    with pytest.raises(ValueError, match="3 values for 160 images"):
        slices(run.predictions, dataset, np.arange(3))
