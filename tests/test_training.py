"""Runs that are killed, resumed, repeated: what a notebook cell cannot show."""

import contextlib
import hashlib
import os
import shutil
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
from safetensors.torch import load_file, save_file
from torch import nn

from course_ml import fitting, provenance
from course_ml.backbones import PACKAGED
from course_ml.baselines import CNNS, build_cnn
from course_ml.config import BatchNorm, Conv, Flatten, Flip, Pool, Recipe, Rotation
from course_ml.data import Dataset, Split
from course_ml.experiment import evaluate_test, load_model, predict_images, train_recipe
from course_ml.fitting import Training, fit, training_key
from course_ml.launching import launch
from course_ml.provenance import read_json
from course_ml.runs import best_epoch
from course_ml.runtime import choose_device, set_seed
from course_ml.speed import Choice
from course_ml.training import (
    Batches,
    build_optimizer,
    class_weights,
    count_batches,
    epoch_batches,
    loss_and_accuracy,
    parameter_groups,
    predict,
    training_sample,
    weighted_loss,
)
from course_ml.transfer import build_model
from course_ml.transforms import augment_batch

SCRIPT = """
import sys, time
import course_ml.fitting as training
from course_ml.experiment import train_recipe
from test_training import killed_recipe, random_images, Split

training.CHECKPOINT_SECONDS = 0
original = training.train_epoch
def slow_epoch(*arguments, **options):
    print("an epoch", flush=True)
    row = original(*arguments, **options)
    time.sleep(.5)  # killed here: the epoch's work is done but not saved
    return row
training.train_epoch = slow_epoch
dataset = random_images()
train_recipe(killed_recipe({changes}), dataset, Split.holdout(dataset), folder=sys.argv[1])
"""


def killed_recipe(changes):
    augment = ("flip", "rotation 20", "zoom 0.2")
    return Recipe(
        **{
            "backbone": "dropout_cnn",
            "image_size": 24,
            "epochs": 4,
            "augment": augment,
            "max_grad_norm": 1.0,
            **changes,
        }
    )


def random_images():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (120, 24, 24, 3), dtype="uint8")
    return Dataset.from_arrays("noise", images, rng.integers(0, 3, 120))


def start(changes, folder):
    "Another process that trains the recipe in `folder`."
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(changes=changes), folder],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def weights_of(folder):
    names = ("last.safetensors", "best.safetensors", "predictions.parquet")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


@pytest.mark.parametrize(
    "changes",
    [
        {
            "schedule": "cosine",
            "optimizer": "adamw",
            "ema_decay": 0.9,
            "warmup_epochs": 1.0,
            "mixup": 0.2,
            "cutmix": 1.0,
        },
        {"schedule": "plateau", "optimizer": "sgd", "sampling": "balanced", "focal_gamma": 2.0},
        {"schedule": "one-cycle", "optimizer": "ranger", "grad_accum_steps": 2, "head_l2": 1e-4},
    ],
    ids=["average", "plateau", "ranger"],
)
def test_a_run_killed_in_the_middle_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, changes):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(changes, killed)
    dataset, recipe = random_images(), killed_recipe(changes)
    split = Split.holdout(dataset)
    train_recipe(recipe, dataset, split, folder=whole)

    deadline = time.monotonic() + 120
    while (
        not (killed / "checkpoints" / "epoch_00002").exists() and time.monotonic() < deadline and process.poll() is None
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert read_json(killed / "run.json")["state"] == "running"
    assert not (killed / "last.safetensors").exists()

    train_recipe(recipe, dataset, split, folder=killed)
    assert weights_of(killed) == weights_of(whole)
    histories = [pd.read_csv(folder / "history.csv").drop(columns="seconds") for folder in (killed, whole)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)


def test_of_two_processes_at_one_folder_one_works_and_the_other_waits(tmp_path):
    "The other one says for whom it waits, and then reads the finished run."
    processes = [start({"epochs": 3}, tmp_path / "run") for _ in range(2)]
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert sorted(output.count("an epoch") for output, _ in printed) == [0, 3]
    worker = processes[max((0, 1), key=lambda i: printed[i][0].count("an epoch"))]
    waiting = next(errors for output, errors in printed if "an epoch" not in output)
    assert f"run: waiting for process {worker.pid} (since " in waiting
    assert read_json(tmp_path / "run" / "run.json")["state"] == "finished"


@pytest.fixture(scope="module")
def noise():
    rng = np.random.default_rng(1)
    return Dataset.from_arrays("noise", rng.integers(0, 256, (90, 16, 16, 3), dtype="uint8"), np.arange(90) % 3)


def small_cnn(seed=0):
    set_seed(seed)
    return build_cnn(CNNS["baseline_cnn"], 16, 3)


def test_early_stopping_keeps_the_best_epoch(noise, tmp_path):
    recipe = Recipe(image_size=16, epochs=40, patience=2, learning_rate=3e-3)
    run = fit(small_cnn(), recipe, noise, Split.holdout(noise), folder=tmp_path / "run")
    losses = run.history.validation_loss
    assert len(losses) < 40 and len(losses) - 1 - losses.idxmin() == 2
    probabilities = run.predictions.probabilities
    loss = -np.log(probabilities[np.arange(len(run.predictions)), run.predictions.y_true]).mean()
    assert loss == pytest.approx(losses.min(), abs=1e-6)


def test_plateau_lowers_the_learning_rate(noise, tmp_path):
    recipe = Recipe(image_size=16, epochs=30, schedule="plateau", learning_rate=3e-3)
    rates = fit(small_cnn(), recipe, noise, Split.holdout(noise), folder=tmp_path / "run").history.learning_rate
    assert (
        rates.iloc[-1] == pytest.approx(rates.iloc[0] / 10 ** round(np.log10(rates.iloc[0] / rates.iloc[-1])))
        and rates.iloc[-1] < rates.iloc[0]
    )


def test_bf16_stays_close_to_fp32(noise, tmp_path):
    recipe = Recipe(image_size=16, epochs=15, learning_rate=3e-3)
    runs = [
        fit(small_cnn(), recipe.replace(precision=p), noise, Split.holdout(noise), folder=tmp_path / p)
        for p in ("fp32", "bf16")
    ]
    assert runs[0].history.train_loss.iloc[-1] < 0.7 * runs[0].history.train_loss.iloc[0], (
        "nothing was learned, so nothing is compared"
    )
    assert abs(runs[0].history.train_loss - runs[1].history.train_loss).max() < 0.15


def test_a_keras_recipe_is_sent_to_keras(noise, tmp_path):
    with pytest.raises(ValueError, match="fit_keras"):
        fit(small_cnn(), Recipe(framework="keras", image_size=16), noise, Split.holdout(noise), folder=tmp_path)


def test_folds_of_other_images_are_refused(noise, tmp_path):
    with pytest.raises(ValueError, match="the split"):
        fit(small_cnn(), Recipe(image_size=16), noise, Split.holdout(noise.take(range(60))), folder=tmp_path)


@given(n=strategies.integers(1, 300), batch_size=strategies.integers(1, 64), seed=strategies.integers(0, 2**31))
def test_every_image_is_in_one_batch(n, batch_size, seed):
    batches = epoch_batches(np.arange(n), batch_size, seed)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(n))
    assert max(map(len, batches)) <= batch_size and max(map(len, batches)) - min(map(len, batches)) <= 1


@settings(deadline=None)
@given(labels=strategies.lists(strategies.integers(0, 4), min_size=5, max_size=80), smoothing=strategies.floats(0, 0.5))
def test_loss_and_weights_equal_torch_and_scikit_learn(labels, smoothing):
    labels = np.array([*range(5), *labels])
    from sklearn.utils.class_weight import compute_class_weight

    inverse, balanced = class_weights(labels, 5, "inverse"), class_weights(labels, 5, "balanced")
    np.testing.assert_allclose(balanced, compute_class_weight("balanced", classes=np.arange(5), y=labels), rtol=1e-5)
    np.testing.assert_allclose(inverse, 5 * balanced, rtol=1e-5)
    np.testing.assert_allclose(balanced[labels].mean(), 1, rtol=1e-5)
    np.testing.assert_allclose(class_weights(labels, 5, "normalized").sum(), 1, rtol=1e-6)
    logits, truth = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0)), torch.from_numpy(labels)
    expected = torch.nn.functional.cross_entropy(logits, truth, label_smoothing=smoothing)
    torch.testing.assert_close(weighted_loss(logits, truth, torch.ones(5), smoothing), expected)


def test_augmentation_turns_by_the_angle_asked_for():
    image = torch.zeros(1, 3, 65, 65)
    image[:, :, 32, 40:60] = 1  # a line to the right
    turned = augment_batch(image.repeat(200, 1, 1, 1), (Rotation(30),), seed=0)[:, 0]
    rows, columns = np.mgrid[-32:33, -32:33]
    angles = [np.degrees(np.arctan2((rows * t).sum(), (columns * t).sum())) for t in turned.numpy()]
    assert 25 < max(map(abs, angles)) <= 31 and abs(np.mean(angles)) < 5


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "lion", "ranger"])
def test_every_optimizer_learns(tmp_path, optimizer):
    "Three classes of different brightness: twelve epochs must do better than chance by far."
    labels = np.arange(90) % 3
    images = np.random.default_rng(0).integers(0, 100, (90, 16, 16, 3)) + 70 * labels[:, None, None, None]
    bright = Dataset.from_arrays("bright", images.astype("uint8"), labels)
    recipe = Recipe(
        image_size=16,
        epochs=12,
        batch_size=8,
        optimizer=optimizer,
        learning_rate={"lion": 1e-3, "sgd": 2e-2, "ranger": 1e-2}.get(optimizer, 3e-3),
    )
    losses = fit(small_cnn(), recipe, bright, Split.holdout(bright), folder=tmp_path / "run").history.train_loss
    assert losses.iloc[-1] < 0.7


def test_the_best_epoch_is_that_of_the_monitored_figure(noise, tmp_path):
    recipe = Recipe(image_size=16, epochs=8, learning_rate=1e-2, monitor="accuracy")
    run = fit(small_cnn(), recipe, noise, Split.holdout(noise), folder=tmp_path / "run")
    assert run.best_epoch == run.history.validation_accuracy.idxmax() != run.history.validation_loss.idxmin(), (
        "choose a seed at which the two differ"
    )
    assert (run.predictions.y_true == run.predictions.y_pred).mean() == pytest.approx(
        run.history.validation_accuracy.max()
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")
def test_a_compiled_network_learns_the_same(noise, tmp_path):
    def train(compiled):
        set_seed(0)
        model, recipe = build_cnn((Conv(4), Flatten()), 16, 3), Recipe(image_size=16, epochs=2, compile=compiled)
        return fit(model, recipe, noise, Split.holdout(noise), folder=tmp_path / str(compiled))

    runs = [train(compiled) for compiled in (False, True)]
    np.testing.assert_allclose(runs[0].history.train_loss, runs[1].history.train_loss, rtol=1e-4)
    np.testing.assert_allclose(runs[0].predictions.probabilities, runs[1].predictions.probabilities, atol=1e-4)


def test_gradients_of_several_batches_make_the_step_of_one(noise, tmp_path):
    "Two batches of 16 whose gradients are added move the weights as one batch of 32 does."
    recipe = Recipe(image_size=16, epochs=3, optimizer="sgd", batch_size=32)
    runs = [
        fit(small_cnn(), recipe.replace(**changes), noise, Split.holdout(noise), folder=tmp_path / name)
        for name, changes in {"one": {}, "two": {"batch_size": 16, "grad_accum_steps": 2}}.items()
    ]
    assert len(epoch_batches(Split.holdout(noise).rows("train"), 32, 0)) * 2 == len(
        epoch_batches(Split.holdout(noise).rows("train"), 16, 0)
    )
    for name, value in runs[0].model.state_dict().items():
        torch.testing.assert_close(runs[1].model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_the_average_is_kept_and_scored_beside_the_raw_weights(noise, tmp_path):
    recipe = Recipe(image_size=16, epochs=4, ema_decay=0.9)
    run = fit(small_cnn(), recipe, noise, Split.holdout(noise), folder=tmp_path / "run")
    assert {"validation_loss", "raw_validation_loss", "raw_validation_accuracy"} <= set(run.history)
    assert not np.allclose(run.history.validation_loss, run.history.raw_validation_loss)
    plain = fit(small_cnn(), recipe.replace(ema_decay=0.0), noise, Split.holdout(noise), folder=tmp_path / "plain")
    np.testing.assert_allclose(run.history.raw_validation_loss, plain.history.validation_loss, rtol=1e-6)


def test_the_average_of_batch_norm_statistics_is_averaged(noise, tmp_path):
    set_seed(0)
    model = build_cnn((Conv(4), BatchNorm(), Pool(), Flatten()), 16, 3)
    run = fit(
        model, Recipe(image_size=16, epochs=6, ema_decay=0.5), noise, Split.holdout(noise), folder=tmp_path / "run"
    )
    assert run.history.validation_loss.iloc[-1] == pytest.approx(run.history.raw_validation_loss.iloc[-1], abs=0.2)


@pytest.mark.parametrize(
    "changes",
    [{"mixup": 0.4}, {"augment": ("flip", "rotation 20"), "label_smoothing": 0.2, "class_weights": "inverse"}],
)
def test_training_images_are_scored_as_validation_images_are(noise, tmp_path, changes):
    from sklearn.metrics import accuracy_score, log_loss

    recipe, split = Recipe(backbone="dropout_cnn", image_size=24, epochs=3, **changes), Split.holdout(noise)
    run = train_recipe(recipe, noise, split, folder=tmp_path / "run")
    best = run.history.iloc[run.best_epoch]
    rows = training_sample(split.rows("train"), split.rows("validation"))
    assert len(rows) == len(split.rows("validation")) and set(rows) <= set(split.rows("train"))
    for name, some in (("train", rows), ("validation", split.rows("validation"))):
        probabilities, truth = predict(run.model, run.inputs, some), noise.labels[some]
        assert best[f"{name}_loss"] == pytest.approx(log_loss(truth, probabilities), rel=1e-5)
        assert best[f"{name}_accuracy"] == accuracy_score(truth, probabilities.argmax(1))
    assert abs(best.objective - best.train_loss) > 1e-3


def test_scores_of_a_reloaded_model_are_those_of_the_trained_one_in_mixed_precision_too(noise, tmp_path):
    recipe, split = Recipe(image_size=16, epochs=2, precision="bf16"), Split.holdout(noise)
    run = train_recipe(recipe, noise, split, folder=tmp_path / "run")
    rows = split.rows("test")
    assert np.array_equal(predict(run.model, run.inputs, rows), predict(load_model(run, 3), run.inputs, rows))
    assert np.array_equal(run.predictions.probabilities, predict(run.model, run.inputs, split.rows("validation")))


@pytest.mark.parametrize("monitor", ["loss", "accuracy"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_nan_is_never_the_best_epoch(monitor, place):
    scores = [0.5, 0.4, 0.6] if monitor == "loss" else [0.5, 0.6, 0.4]
    scores.insert(place, np.nan)
    history = [{f"validation_{monitor}": score} for score in scores]
    assert best_epoch(history, monitor) == scores.index({"loss": 0.4, "accuracy": 0.6}[monitor])
    assert best_epoch([history[place]] * 3, monitor) == 0


def test_a_first_epoch_without_a_loss_is_neither_kept_nor_stops_the_training(noise, tmp_path, monkeypatch):
    original, split = Training.evaluate, Split.holdout(noise)

    def evaluate(self, *arguments):
        row = original(self, *arguments)
        return {name: np.nan if self.epoch == 0 else value for name, value in row.items()}

    monkeypatch.setattr(Training, "evaluate", evaluate)
    for schedule in ("constant", "plateau"):
        recipe = Recipe(image_size=16, epochs=6, patience=5, schedule=schedule, learning_rate=1e-4)
        run = fit(small_cnn(), recipe, noise, split, folder=tmp_path / schedule)
        assert len(run.history) == 6 and run.best_epoch == 1 + run.history.validation_loss[1:].argmin()


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_slope_of_the_focal_loss_is_a_number_at_certainty(gamma, smoothing):
    margins = torch.tensor([0.0, 5.0, 20.0, 40.0, 90.0, 300.0], dtype=torch.float32)
    logits = torch.stack([margins, -margins], 1).requires_grad_()
    weighted_loss(logits, torch.zeros(6, dtype=torch.int64), torch.ones(2), smoothing, gamma).backward()
    assert torch.isfinite(logits.grad).all()
    if smoothing: return
    p = torch.sigmoid(2 * margins.double())
    q = torch.sigmoid(-2 * margins.double())  # 1 - p, exact
    slope = gamma * q**gamma * p * torch.log1p(-q) - q ** (gamma + 1)  # d/dz of -(1 - p)^gamma log p
    torch.testing.assert_close(logits.grad[:4, 0].double(), slope[:4] / 6, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("name, accumulated", [("cosine", 1), ("cosine", 3), ("one-cycle", 3)])
def test_the_schedule_of_accumulated_steps_ends_with_the_training(noise, tmp_path, monkeypatch, name, accumulated):
    rates, moves = [], Training._move_weights

    def move(self):
        rates.append(self.optimizer.param_groups[0]["lr"])
        moves(self)

    monkeypatch.setattr(Training, "_move_weights", move)
    recipe = Recipe(image_size=16, epochs=4, batch_size=8, schedule=name, grad_accum_steps=accumulated, ema_decay=0.9)
    fit(small_cnn(), recipe, noise, Split.holdout(noise), folder=tmp_path / "run")
    steps = count_batches(len(Split.holdout(noise).rows("train")), 8, accumulated) // accumulated * 4
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1e-3)
    schedules = torch.optim.lr_scheduler
    if name == "cosine": oracle = schedules.CosineAnnealingLR(optimizer, steps)
    else: oracle = schedules.OneCycleLR(optimizer, 1e-3, steps, cycle_momentum=False)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_the_head_penalty_is_the_sum_of_squares(noise):
    model, logits, labels = small_cnn(), torch.randn(6, 3), torch.arange(6) % 3

    def loss(penalty):
        recipe = Recipe(image_size=16, head_l2=penalty)
        return Training(model, recipe, noise.labels, 3, 1, ids=None).loss(logits, labels).item()

    plain, penalized = loss(0.0), loss(0.1)
    squares = sum(layer.weight.square().sum().item() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    assert penalized == pytest.approx(plain + 0.1 * squares, rel=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_do_not_change_the_result(noise, tmp_path, workers):
    recipe = Recipe(image_size=16, epochs=2, augment=("flip", "rotation 20", "color 0.2"), mixup=0.2)
    run = fit(small_cnn(), recipe, noise, Split.holdout(noise), folder=tmp_path / "run", workers=workers)
    again = fit(small_cnn(), recipe, noise, Split.holdout(noise), folder=tmp_path / "again")
    assert (run.folder / "last.safetensors").read_bytes() == (again.folder / "last.safetensors").read_bytes()


def test_workers_share_the_images_on_disk(noise):
    import pickle

    batches = Batches(noise.images(16), noise.labels, 3, (Flip(),))
    assert isinstance(batches.inputs, np.memmap)
    text = pickle.dumps(batches)
    assert len(text) < 8000
    np.testing.assert_array_equal(pickle.loads(text).inputs, batches.inputs)


def test_a_probe_chooses_and_the_run_says_what(noise, tmp_path):
    run = fit(
        small_cnn(),
        Recipe(image_size=16, epochs=1, precision="auto"),
        noise,
        Split.holdout(noise),
        folder=tmp_path / "run",
    )
    assert set(run.info["computed"]) == {"layout", "precision", "threads"}


def test_a_run_goes_on_as_it_was_begun(noise, tmp_path, monkeypatch):
    recipe, split = Recipe(image_size=16, epochs=1, precision="auto"), Split.holdout(noise)
    first = fit(small_cnn(), recipe, noise, split, folder=tmp_path / "run")

    def never(*arguments):
        raise AssertionError("probed again, perhaps with another result")

    monkeypatch.setattr("course_ml.fitting.probe_speed", never)
    assert fit(small_cnn(), recipe, noise, split, folder=tmp_path / "run").info == first.info


def test_fp16_without_a_gpu_is_refused(noise, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        fit(small_cnn(), Recipe(image_size=16, precision="fp16"), noise, Split.holdout(noise), folder=tmp_path / "run")


BUILT_IN = {"data": "nature10", "images": 200, "size": 24}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A recipe without randomness or batch statistics, trained by two processes of 16 images and by one of 32.

    It takes ten steps: in flat areas of the synthetic images values are so near to the corner of a ReLU, or to each
    other before pooling, that after more steps rounding decides on which side they fall, and the two runs part.
    """
    from course_ml.datasets import load_dataset

    folder, dataset = tmp_path_factory.mktemp("processes"), load_dataset(**BUILT_IN)
    split, recipe = (
        Split.holdout(dataset),
        Recipe(image_size=24, epochs=2, seed=1, batch_size=16, optimizer="sgd", learning_rate=0.02, max_grad_norm=1.0),
    )
    two = launch(recipe, split, folder / "two", processes=2, **BUILT_IN)
    one = train_recipe(recipe.replace(batch_size=32), dataset, split, folder=folder / "one")
    return one, two, split


def test_two_processes_equal_one_of_twice_the_batch(two_processes):
    one, two, _ = two_processes
    assert two.info["processes"] == 2
    ours, theirs = load_file(one.folder / "last.safetensors"), load_file(two.folder / "last.safetensors")
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=1e-5)
    columns = ["train_loss", "train_accuracy", "validation_loss", "validation_accuracy"]
    np.testing.assert_allclose(two.history[columns], one.history[columns], rtol=1e-4)


def test_two_processes_count_every_image_once(two_processes):
    one, two, split = two_processes
    assert two.predictions.ids == one.predictions.ids and len(two.predictions) == len(split.rows("validation"))


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_two_processes_report_the_loss_of_the_statistics_that_they_save(tmp_path, average):
    from course_ml.datasets import load_dataset

    dataset = load_dataset(**BUILT_IN)
    split, recipe = Split.holdout(dataset), Recipe(backbone="small_image_cnn", image_size=24, epochs=2, batch_size=8)
    run = launch(recipe.replace(ema_decay=average), split, tmp_path / "run", processes=2, **BUILT_IN)
    rows = split.rows("validation")
    probabilities = predict(load_model(run, len(dataset.classes)), dataset.images(24), rows)
    scores, reported = loss_and_accuracy(probabilities, dataset.labels[rows]), run.history.iloc[run.best_epoch]
    assert reported.validation_loss == pytest.approx(scores["validation_loss"], rel=1e-5)
    assert reported.validation_accuracy == scores["validation_accuracy"]


def test_a_killed_worker_ends_the_run_with_a_message_and_the_next_call_goes_on(two_processes, tmp_path, monkeypatch):
    import threading

    import psutil

    _, two, split = two_processes
    folder = tmp_path / "killed"
    ended = []

    def kill_one():
        "Kill the second worker as soon as there is a checkpoint."
        deadline = time.monotonic() + 120
        while not list((folder / "checkpoints").glob("epoch_*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = [
            p
            for p in psutil.Process().children(recursive=True)
            if "course_ml.launching" in " ".join(p.cmdline()) and "torch.distributed.run" not in " ".join(p.cmdline())
        ]
        workers[-1].kill()
        ended.append(True)

    recipe = two.recipe.replace(epochs=25)
    monkeypatch.setenv("COURSE_ML_CHECKPOINT_SECONDS", "0")
    thread = threading.Thread(target=kill_one)
    thread.start()
    with pytest.raises(RuntimeError, match="a process was killed .SIGKILL.; the checkpoint after epoch .* is kept"):
        launch(recipe, split, folder, processes=2, **BUILT_IN)
    thread.join()
    assert ended and read_json(folder / "run.json")["state"] == "running"
    newest = int(sorted((folder / "checkpoints").glob("epoch_*"))[-1].name[6:])
    assert 0 < newest < 25
    again = launch(recipe, split, folder, processes=2, **BUILT_IN)
    assert again.finished and list(again.history.epoch) == list(range(25))


def test_accelerate_launches_the_same_command(tmp_path):
    (tmp_path / "recipe.yml").write_text(Recipe(image_size=24, epochs=1).to_yaml())
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "course_ml.launching",
        tmp_path / "recipe.yml",
        "--data",
        "nature10",
        "--images",
        "200",
        "--size",
        "24",
        "--folder",
        tmp_path / "run",
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "validation accuracy" in ended.stdout and read_json(tmp_path / "run" / "run.json")["state"] == "finished"


MEMORY = """
import sys, numpy as np, psutil, torch
from course_ml.config import Recipe
from course_ml.training import Batches
from course_ml.fitting import build_loader, Training
images = np.load(sys.argv[1], mmap_mode="r")
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32 * 32 * 3, 2))
recipe, rows, labels = Recipe(image_size=32, batch_size=64), np.arange(3000), np.arange(len(images)) % 2
training = Training(model, recipe, rows % 2, 2, 1, np.arange(len(images)).astype(str).astype(object))
loader = build_loader(Batches(images, labels, 2))
def own():
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)
def epoch(rows):
    loader.sampler.items = training.begin_epoch(rows, labels)
    training.train_epoch(loader)
epoch(rows)
before = own()
epoch(np.random.default_rng(0).permutation(len(images))[:15000])
print(own() - before)
"""


def test_memory_does_not_grow_with_the_set(tmp_path):
    "An epoch over 15,000 of 100,000 images (46 of 300 MB): what the process owns grows by less than a third of them."
    images = np.lib.format.open_memmap(tmp_path / "images.npy", mode="w+", dtype="uint8", shape=(100_000, 32, 32, 3))
    images[::1000] = 7
    del images
    command = [sys.executable, "-c", MEMORY, tmp_path / "images.npy"]
    grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(grown) < 15e6


# What decides a run: each change of it makes another key


@pytest.fixture(scope="module")
def colored():
    "Twelve images with a metadata column and features."
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (40, 16, 16, 3), dtype="uint8")
    metadata = pd.DataFrame({"color": ["red", "blue"] * 20})
    return Dataset.from_arrays("colored", array, np.arange(40) % 2, metadata=metadata)


HEAD = Recipe(backbone="resnet10t", weights="packaged", freeze="backbone", image_size=16, metadata="color")
FEATURES = np.arange(40 * 6, dtype="float32").reshape(40, 6)


def head(activation=torch.nn.ReLU):
    set_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 4), activation(), torch.nn.Linear(4, 2))


def key_of(dataset, recipe=HEAD, model=None, split=None, fold=0, inputs=FEATURES, **options):
    return training_key(model or head(), recipe, dataset, split or Split.holdout(dataset), fold, inputs, **options)


def with_array(dataset, array):
    return Dataset.from_arrays("colored", array, dataset.labels, metadata=dataset.items[["color"]])


def one_pixel(dataset):
    array = dataset.source.array.copy()
    array[3, 0, 0, 0] ^= 1
    return with_array(dataset, array)


def other_color(dataset):
    colors = dataset.items[["color"]].assign(color=["red"] * 3 + ["blue"] * 37)
    return Dataset.from_arrays("colored", dataset.source.array, dataset.labels, metadata=colors)


def zeros():
    model = head()
    for weight in model.parameters():
        weight.data.zero_()
    return model


MUTATIONS = {
    "a field of the recipe": lambda d: key_of(d, HEAD.replace(learning_rate=2e-3)),
    "a pixel": lambda d: key_of(one_pixel(d)),
    "images of the same bytes in another shape": lambda d: key_of(with_array(d, d.source.array.reshape(40, 8, 32, 3))),
    "values of the metadata column": lambda d: key_of(other_color(d)),
    "another split": lambda d: key_of(d, split=Split.holdout(d, seed=1)),
    "another fold": lambda d: key_of(d, fold=1),
    "starting weights of zeros": lambda d: key_of(d, model=zeros()),
    "another activation function": lambda d: key_of(d, model=head(torch.nn.Tanh)),
    "other inputs": lambda d: key_of(d, inputs=FEATURES + 1),
    "inputs of the same bytes in another shape": lambda d: key_of(d, inputs=FEATURES.reshape(80, 3)),
    "no inputs": lambda d: key_of(d, inputs=None),
    "more processes": lambda d: key_of(d, processes=2),
    "another way to compute": lambda d: key_of(d, choice=Choice(precision="bf16")),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_what_decides_a_run_is_in_its_key(colored, mutation):
    assert key_of(colored).differences(mutation(colored)), "the result of something else would be read"


def test_the_same_training_has_the_same_key(colored):
    again = with_array(colored, colored.source.array.copy())
    assert key_of(colored).differences(key_of(again, HEAD.replace(epochs=HEAD.epochs))) == []


def test_another_device_is_another_key(colored, monkeypatch):
    before = key_of(colored)
    monkeypatch.setattr(fitting, "choose_device", lambda: "tpu")
    assert before.differences(key_of(colored)) == ["device: cpu became tpu"]


@pytest.mark.parametrize(
    "old, new, module",
    [
        ("return (losses * (weights[targets]", "return (0 * losses * (weights[targets]", "training"),
        ("self.optimizer.step()", "pass", "fitting"),
        ("- self.mean) / self.std", "- self.mean)", "transfer"),
    ],
)
def test_code_that_computes_is_in_the_key_and_comments_are_not(colored, tmp_path, monkeypatch, old, new, module):
    package = tmp_path / "course_ml"
    shutil.copytree(provenance.package_folder(), package, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    monkeypatch.setattr(provenance, "package_folder", lambda: package)
    file, before = package / f"{module}.py", key_of(colored)
    file.write_text(file.read_text() + "\n# a comment at the end\n")
    assert before.differences(key_of(colored)) == []
    changed = file.read_text().replace(old, new)
    assert changed != file.read_text()
    file.write_text(changed)
    assert before.differences(key_of(colored)) == [f"module {module} changed"]


def test_a_folder_of_another_run_is_refused_with_what_differs(colored, tmp_path):
    "The same path of a weights file, with zeros in it."
    file = tmp_path / "own.safetensors"
    shutil.copy(PACKAGED["resnet10t"], file)
    recipe, split = HEAD.replace(weights=str(file), metadata="", epochs=1), Split.holdout(colored)
    train_recipe(recipe, colored, split, folder=tmp_path / "run")
    save_file({name: value * 0 for name, value in load_file(file).items()}, file)
    with pytest.raises(
        ValueError, match="holds the result of something else: inputs: .* became .*; give another|inputs: "
    ):
        train_recipe(recipe, colored, split, folder=tmp_path / "run")
    with pytest.raises(ValueError, match="recipe epochs: 1 became 2"):
        train_recipe(recipe.replace(epochs=2), colored, split, folder=tmp_path / "run")


def test_test_predictions_are_kept_and_never_those_of_training_images(colored, tmp_path):
    split, recipe = Split.holdout(colored), Recipe(image_size=16, epochs=1)
    run = train_recipe(recipe, colored, split, folder=tmp_path / "run")
    preds = evaluate_test(run, colored, split)
    assert preds.key and evaluate_test(run, colored, split).table.equals(preds.table)
    with pytest.raises(ValueError, match=r"the model was trained on \d+ of these \d+ images"):
        evaluate_test(run, colored, Split.holdout(colored, seed=1))
    assert evaluate_test(run, one_pixel(colored), split).fingerprint != preds.fingerprint


def own_network(factor=2, forward=None, frozen=False):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.factor, self.layer = factor, nn.Linear(3 * 16 * 16, 2)

        def forward(self, images):
            return forward(self.layer(images.flatten(1))) if forward else self.factor * self.layer(images.flatten(1))

    net = Net()
    net.layer.bias.requires_grad_(not frozen)
    return net


@pytest.mark.parametrize("change, named", [
    ({"factor": 3}, "start"), ({"forward": torch.tanh}, "start"), ({"frozen": True}, "frozen")],
    ids=["settings", "code", "frozen"])
def test_code_settings_and_frozen_weights_of_an_own_network_are_in_the_key(colored, change, named):
    recipe, split = Recipe(image_size=16), Split.holdout(colored)
    key = training_key(own_network(), recipe, colored, split)
    assert key.differences(training_key(own_network(), recipe, colored, split)) == []
    changed = key.differences(training_key(own_network(**change), recipe, colored, split))
    assert [line.split(":")[0] for line in changed] == [named]


def test_a_model_that_was_trained_further_predicts_with_the_weights_of_the_run(colored, tmp_path):
    recipe, split, model = Recipe(image_size=16, epochs=1), Split.holdout(colored), own_network()
    run = fit(model, recipe, colored, split, folder=tmp_path / "run")
    expected = predict(model, run.inputs, split.rows("test"))
    fit(model, recipe.replace(learning_rate=0.1), colored, split, folder=tmp_path / "next")
    assert np.array_equal(evaluate_test(run, colored, split).probabilities, expected)
    assert not np.allclose(predict(model, run.inputs, split.rows("test")), expected)


# Weight decay


@pytest.mark.parametrize("backbone", ["resnet10t", "vit_tiny_patch16_224", "torchvision:resnet18"])
def test_weights_without_decay_are_those_of_timm(backbone):
    "timm's factory leaves alone what is one-dimensional, biases, and what a network names."
    from timm.optim._param_groups import param_groups_weight_decay

    model = build_model(Recipe(backbone=backbone, image_size=224), 3)
    named = getattr(model.backbone, "no_weight_decay", set)()
    theirs = param_groups_weight_decay(model, 0.05, no_weight_decay_list=[f"backbone.{name}" for name in named])
    ours = parameter_groups(model, 0.1, 0.05, layer_decay=0.5)
    for decay in (0.0, 0.05):
        listed, expected = (
            {id(weight) for group in groups if group["weight_decay"] == decay for weight in group["params"]}
            for groups in (ours, theirs)
        )
        assert listed == expected and listed


def test_decay_moves_no_bias_and_no_norm():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, "adamw", lr=0.1, weight_decay=0.5)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"0.weight"}


@pytest.fixture
def elsewhere(monkeypatch):
    "Another device, on which nothing can be computed; the devices of what the last layer read that was called."
    from course_ml import experiment, features, interpretation

    seen = set()

    def note(module, inputs):
        values = [*inputs, *module.parameters(recurse=False), *module.buffers(recurse=False)]
        if devices := {value.device.type for value in values if isinstance(value, torch.Tensor)}:
            seen.clear()
            seen.update(devices)

    for module in (experiment, features, fitting, interpretation):
        monkeypatch.setattr(module, "choose_device", lambda: "meta")
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: contextlib.nullcontext())  # not on this one
    hook = nn.modules.module.register_module_forward_pre_hook(note)
    yield seen
    hook.remove()


def heat(run, dataset, rows):
    from course_ml.interpretation import grad_cam

    return grad_cam(run, dataset, rows)


def features_of(run, dataset, rows):
    from course_ml.features import frozen_features

    return frozen_features(build_model(run.recipe.replace(seed=1), 3), dataset, 24)


def turned(run, dataset, rows):
    return predict_images(run, dataset, rows, tta=("flip", "turn 90"))


ENTRIES = {"predictions": predict_images, "test-time augmentation": turned, "heat maps": heat, "features": features_of,
           "reloaded": lambda run, dataset, rows: predict(load_model(run, 3), dataset.images(24), rows),
           "trained": lambda run, dataset, rows: evaluate_test(run, dataset, Split.holdout(dataset)),
           "test set": lambda run, dataset, rows: evaluate_test(type(run)(run.folder), dataset, Split.holdout(dataset))}


@pytest.fixture(scope="module")
def frozen_run(noise, tmp_path_factory):
    recipe = Recipe(backbone="resnet10t", freeze="backbone", image_size=24, epochs=1)
    return train_recipe(recipe, noise, Split.holdout(noise), folder=tmp_path_factory.mktemp("frozen") / "run")


@pytest.mark.parametrize("entry", ENTRIES)
def test_model_and_images_are_on_the_device_that_is_chosen(noise, frozen_run, elsewhere, entry):
    with pytest.raises((NotImplementedError, RuntimeError)):
        ENTRIES[entry](frozen_run, noise, np.arange(4))
    assert elsewhere == {"meta"}


def test_a_probe_and_a_training_use_the_device_that_is_chosen(noise, tmp_path, elsewhere, monkeypatch):
    def probe(model, *arguments):
        raise RuntimeError(f"probed on {next(model.parameters()).device}")

    monkeypatch.setattr(fitting, "probe_speed", probe)
    with pytest.raises(RuntimeError, match="probed on meta"):
        fit(small_cnn(), Recipe(image_size=16, precision="auto"), noise, Split.holdout(noise), folder=tmp_path / "run")
    assert fitting.this_process().device.type == choose_device()
