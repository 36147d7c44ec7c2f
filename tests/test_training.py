"""Runs that are killed, resumed, repeated: what a notebook cell cannot show."""
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies

from course_ml.core import Recipe, read_json, set_seed
from course_ml.data import Dataset, Folds
from course_ml.training import augment_batch, class_weights, epoch_batches, fit, weighted_loss

SCRIPT = """
import sys, time
import numpy as np
import course_ml.training as training
from course_ml.core import Recipe
from course_ml.data import Dataset, Folds
from course_ml.transfer import train_recipe

training.CHECKPOINT_SECONDS = 0
rng = np.random.default_rng(0)
dataset = Dataset.from_arrays("noise", rng.integers(0, 256, (120, 24, 24, 3), dtype="uint8"), rng.integers(0, 3, 120))
recipe = Recipe(backbone="dropout_cnn", image_size=24, epochs=6, augment=("flip", "rotation 20", "zoom 0.2"), schedule="{schedule}", optimizer="{optimizer}", clip_norm=1.0)
original = training.train_epoch
def slow_epoch(*arguments, **options):
    row = original(*arguments, **options)
    time.sleep(float(sys.argv[2]))  # killed here: the epoch's work is done but not saved
    return row
training.train_epoch = slow_epoch
train_recipe(recipe, dataset, Folds.holdout(dataset), folder=sys.argv[1])
"""


def weights_of(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("last.safetensors", "best.safetensors", "predictions.parquet")}


@pytest.mark.parametrize("schedule, optimizer", [("cosine", "adamw"), ("plateau", "sgd")])
def test_a_run_killed_in_the_middle_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, schedule, optimizer):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(schedule=schedule, optimizer=optimizer))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([sys.executable, script, whole, "0"], check=True)

    process = subprocess.Popen([sys.executable, script, killed, "0.5"])
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "epoch_00003").exists() and time.monotonic() < deadline and process.poll() is None: time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert read_json(killed / "run.json")["state"] == "running"
    assert not (killed / "last.safetensors").exists()

    subprocess.run([sys.executable, script, killed, "0"], check=True)
    assert weights_of(killed) == weights_of(whole)
    columns = ["epoch", "learning_rate", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"]
    pd.testing.assert_frame_equal(pd.read_csv(killed / "history.csv")[columns], pd.read_csv(whole / "history.csv")[columns], check_exact=True)


@pytest.fixture
def noise():
    rng = np.random.default_rng(1)
    return Dataset.from_arrays("noise", rng.integers(0, 256, (90, 16, 16, 3), dtype="uint8"), np.arange(90) % 3)


def small_cnn(seed=0):
    from course_ml.baselines import CNNS, build_cnn
    set_seed(seed)
    return build_cnn(CNNS["baseline_cnn"], 16, 3)


def test_early_stopping_keeps_the_best_epoch(noise, tmp_path):
    recipe = Recipe(image_size=16, epochs=40, patience=2, learning_rate=3e-3)
    run = fit(small_cnn(), recipe, noise, Folds.holdout(noise), folder=tmp_path / "run")
    losses = run.history.validation_loss
    assert len(losses) < 40 and len(losses) - 1 - losses.idxmin() == 2
    probabilities = run.predictions.probabilities
    loss = -np.log(probabilities[np.arange(len(run.predictions)), run.predictions.y_true]).mean()
    assert loss == pytest.approx(losses.min(), abs=1e-6)


def test_plateau_lowers_the_learning_rate(noise, tmp_path):
    recipe = Recipe(image_size=16, epochs=30, schedule="plateau", learning_rate=3e-3)
    rates = fit(small_cnn(), recipe, noise, Folds.holdout(noise), folder=tmp_path / "run").history.learning_rate
    assert rates.iloc[-1] == pytest.approx(rates.iloc[0] / 10 ** round(np.log10(rates.iloc[0] / rates.iloc[-1]))) and rates.iloc[-1] < rates.iloc[0]


def test_bf16_stays_close_to_fp32(noise, tmp_path):
    recipe = Recipe(image_size=16, epochs=2)
    runs = [fit(small_cnn(), recipe.replace(precision=p), noise, Folds.holdout(noise), folder=tmp_path / p) for p in ("fp32", "bf16")]
    assert abs(runs[0].history.train_loss - runs[1].history.train_loss).max() < .1


def test_a_keras_recipe_is_sent_to_keras(noise, tmp_path):
    with pytest.raises(ValueError, match="fit_keras"): fit(small_cnn(), Recipe(framework="keras", image_size=16), noise, Folds.holdout(noise), folder=tmp_path)


def test_folds_of_other_pictures_are_refused(noise, tmp_path):
    with pytest.raises(ValueError, match="the folds"): fit(small_cnn(), Recipe(image_size=16), noise, Folds.holdout(noise.take(range(60))), folder=tmp_path)


@given(n=strategies.integers(1, 300), batch_size=strategies.integers(1, 64), seed=strategies.integers(0, 2**31))
def test_every_picture_is_in_one_batch(n, batch_size, seed):
    batches = epoch_batches(np.arange(n), batch_size, seed)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(n))
    assert max(map(len, batches)) <= batch_size and max(map(len, batches)) - min(map(len, batches)) <= 1


@settings(deadline=None)
@given(labels=strategies.lists(strategies.integers(0, 4), min_size=5, max_size=80), smoothing=strategies.floats(0, .5))
def test_loss_and_weights_equal_torch_and_scikit_learn(labels, smoothing):
    labels = np.array([*range(5), *labels])
    from sklearn.utils.class_weight import compute_class_weight
    inverse = class_weights(labels, 5, "inverse")
    np.testing.assert_allclose(inverse / 5, compute_class_weight("balanced", classes=np.arange(5), y=labels), rtol=1e-5)
    np.testing.assert_allclose(class_weights(labels, 5, "normalised").sum(), 1, rtol=1e-6)
    logits, truth = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0)), torch.from_numpy(labels)
    expected = torch.nn.functional.cross_entropy(logits, truth, label_smoothing=smoothing)
    torch.testing.assert_close(weighted_loss(logits, truth, torch.ones(5), smoothing), expected)


def test_augmentation_turns_by_the_angle_asked_for():
    picture = torch.zeros(1, 3, 65, 65)
    picture[:, :, 32, 40:60] = 1  # a line to the right
    set_seed(0)
    turned = augment_batch(picture.repeat(200, 1, 1, 1), ("rotation 30",))[:, 0]
    rows, columns = np.mgrid[-32:33, -32:33]
    angles = [np.degrees(np.arctan2((rows * t).sum(), (columns * t).sum())) for t in turned.numpy()]
    assert 25 < max(map(abs, angles)) <= 31 and abs(np.mean(angles)) < 5
