"""Runs that are killed, resumed, repeated: what a notebook cell cannot show."""
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

from course_ml.provenance import read_json
from course_ml.runtime import set_seed
from course_ml.config import Recipe
from course_ml.data import Dataset, Split
from course_ml.training import Batches, class_weights, epoch_batches, weighted_loss
from course_ml.fitting import fit
from course_ml.launching import launch
from course_ml.config import BatchNorm, Conv, Flatten, Pool, Rotation
from course_ml.transforms import augment_batch

SCRIPT = """
import sys, time
import numpy as np
import course_ml.fitting as training
from course_ml.config import Recipe
from course_ml.data import Dataset, Folds
from course_ml.experiment import train_recipe

training.CHECKPOINT_SECONDS = 0
rng = np.random.default_rng(0)
dataset = Dataset.from_arrays("noise", rng.integers(0, 256, (120, 24, 24, 3), dtype="uint8"), rng.integers(0, 3, 120))
recipe = Recipe(backbone="dropout_cnn", image_size=24, epochs=6, augment=("flip", "rotation 20", "zoom 0.2"), clip_norm=1.0, **{changes})
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


@pytest.mark.parametrize("changes", [
    {"schedule": "cosine", "optimizer": "adamw", "average": .9, "warmup_epochs": 1.0, "mixup": .2, "cutmix": 1.0},
    {"schedule": "plateau", "optimizer": "sgd", "sampling": "balanced", "focal_gamma": 2.0},
    {"schedule": "one-cycle", "optimizer": "ranger", "grad_accum_steps": 2, "head_l2": 1e-4},
], ids=["average", "plateau", "ranger"])
def test_a_run_killed_in_the_middle_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, changes):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(changes=changes))
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
    histories = [pd.read_csv(folder / "history.csv").drop(columns="seconds") for folder in (killed, whole)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)


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
    run = fit(small_cnn(), recipe, noise, Split.holdout(noise), folder=tmp_path / "run")
    losses = run.history.validation_loss
    assert len(losses) < 40 and len(losses) - 1 - losses.idxmin() == 2
    probabilities = run.predictions.probabilities
    loss = -np.log(probabilities[np.arange(len(run.predictions)), run.predictions.y_true]).mean()
    assert loss == pytest.approx(losses.min(), abs=1e-6)


def test_plateau_lowers_the_learning_rate(noise, tmp_path):
    recipe = Recipe(image_size=16, epochs=30, schedule="plateau", learning_rate=3e-3)
    rates = fit(small_cnn(), recipe, noise, Split.holdout(noise), folder=tmp_path / "run").history.learning_rate
    assert rates.iloc[-1] == pytest.approx(rates.iloc[0] / 10 ** round(np.log10(rates.iloc[0] / rates.iloc[-1]))) and rates.iloc[-1] < rates.iloc[0]


def test_bf16_stays_close_to_fp32(noise, tmp_path):
    recipe = Recipe(image_size=16, epochs=15, learning_rate=3e-3)
    runs = [fit(small_cnn(), recipe.replace(precision=p), noise, Split.holdout(noise), folder=tmp_path / p) for p in ("fp32", "bf16")]
    assert runs[0].history.train_loss.iloc[-1] < .7 * runs[0].history.train_loss.iloc[0], "nothing was learned, so nothing is compared"
    assert abs(runs[0].history.train_loss - runs[1].history.train_loss).max() < .15


def test_a_keras_recipe_is_sent_to_keras(noise, tmp_path):
    with pytest.raises(ValueError, match="fit_keras"): fit(small_cnn(), Recipe(framework="keras", image_size=16), noise, Split.holdout(noise), folder=tmp_path)


def test_folds_of_other_images_are_refused(noise, tmp_path):
    with pytest.raises(ValueError, match="the split"): fit(small_cnn(), Recipe(image_size=16), noise, Split.holdout(noise.take(range(60))), folder=tmp_path)


@given(n=strategies.integers(1, 300), batch_size=strategies.integers(1, 64), seed=strategies.integers(0, 2**31))
def test_every_image_is_in_one_batch(n, batch_size, seed):
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
    recipe = Recipe(image_size=16, epochs=12, batch_size=8, optimizer=optimizer, learning_rate={"lion": 1e-3, "sgd": 2e-2, "ranger": 1e-2}.get(optimizer, 3e-3))
    losses = fit(small_cnn(), recipe, bright, Split.holdout(bright), folder=tmp_path / "run").history.train_loss
    assert losses.iloc[-1] < .7


def test_the_best_epoch_is_that_of_the_monitored_figure(noise, tmp_path):
    recipe = Recipe(image_size=16, epochs=8, learning_rate=1e-2, monitor="accuracy")
    run = fit(small_cnn(), recipe, noise, Split.holdout(noise), folder=tmp_path / "run")
    assert run.best_epoch == run.history.validation_accuracy.idxmax() != run.history.validation_loss.idxmin(), "choose a seed at which the two differ"
    assert (run.predictions.y_true == run.predictions.y_pred).mean() == pytest.approx(run.history.validation_accuracy.max())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")
def test_a_compiled_network_learns_the_same(noise, tmp_path):
    runs = [fit(small_cnn(), Recipe(image_size=16, epochs=2, compile=compiled), noise, Split.holdout(noise), folder=tmp_path / str(compiled)) for compiled in (False, True)]
    np.testing.assert_allclose(runs[0].history.train_loss, runs[1].history.train_loss, rtol=1e-4)
    np.testing.assert_allclose(runs[0].predictions.probabilities, runs[1].predictions.probabilities, atol=1e-4)


def test_gradients_of_several_batches_make_the_step_of_one(noise, tmp_path):
    "Two batches of 16 whose gradients are added move the weights as one batch of 32 does."
    recipe = Recipe(image_size=16, epochs=3, optimizer="sgd", batch_size=32)
    runs = [fit(small_cnn(), recipe.replace(**changes), noise, Split.holdout(noise), folder=tmp_path / name)
            for name, changes in {"one": {}, "two": {"batch_size": 16, "grad_accum_steps": 2}}.items()]
    assert len(epoch_batches(Split.holdout(noise).rows("train"), 32, 0)) * 2 == len(epoch_batches(Split.holdout(noise).rows("train"), 16, 0))
    for name, value in runs[0].model.state_dict().items(): torch.testing.assert_close(runs[1].model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_the_average_is_kept_and_scored_beside_the_raw_weights(noise, tmp_path):
    recipe = Recipe(image_size=16, epochs=4, ema_decay=.9)
    run = fit(small_cnn(), recipe, noise, Split.holdout(noise), folder=tmp_path / "run")
    assert {"validation_loss", "raw_validation_loss", "raw_validation_accuracy"} <= set(run.history)
    assert not np.allclose(run.history.validation_loss, run.history.raw_validation_loss)
    plain = fit(small_cnn(), recipe.replace(ema_decay=0.0), noise, Split.holdout(noise), folder=tmp_path / "plain")
    np.testing.assert_allclose(run.history.raw_validation_loss, plain.history.validation_loss, rtol=1e-6)


def test_the_average_of_batch_norm_statistics_is_averaged(noise, tmp_path):
    from course_ml.baselines import build_cnn
    set_seed(0)
    model = build_cnn((Conv(4), BatchNorm(), Pool(), Flatten()), 16, 3)
    run = fit(model, Recipe(image_size=16, epochs=6, ema_decay=.5), noise, Split.holdout(noise), folder=tmp_path / "run")
    assert run.history.validation_loss.iloc[-1] == pytest.approx(run.history.raw_validation_loss.iloc[-1], abs=.2)


def test_mixed_images_have_an_accuracy_of_clean_ones(noise, tmp_path):
    run = fit(small_cnn(), Recipe(image_size=16, epochs=2, mixup=.4), noise, Split.holdout(noise), folder=tmp_path / "run")
    assert run.history.train_accuracy.between(0, 1).all()


def test_the_head_penalty_is_the_sum_of_squares(noise):
    from course_ml.fitting import Training
    model, logits, labels = small_cnn(), torch.randn(6, 3), torch.arange(6) % 3
    plain, penalized = (Training(model, Recipe(image_size=16, head_l2=penalty), noise.labels, 3, 1).loss(logits, labels).item() for penalty in (0.0, .1))
    squares = sum(layer.weight.square().sum().item() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    assert penalized == pytest.approx(plain + .1 * squares, rel=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_do_not_change_the_result(noise, tmp_path, workers):
    recipe = Recipe(image_size=16, epochs=2, augment=("flip", "rotation 20", "color 0.2"), mixup=.2)
    run = fit(small_cnn(), recipe, noise, Split.holdout(noise), folder=tmp_path / "run", workers=workers)
    again = fit(small_cnn(), recipe, noise, Split.holdout(noise), folder=tmp_path / "again")
    assert (run.folder / "last.safetensors").read_bytes() == (again.folder / "last.safetensors").read_bytes()


def test_workers_share_the_images_on_disk(noise):
    import pickle
    batches = Batches(noise.images(16), noise.labels, 3, Recipe(image_size=16))
    assert isinstance(batches.inputs, np.memmap)
    text = pickle.dumps(batches)
    assert len(text) < 8000
    np.testing.assert_array_equal(pickle.loads(text).inputs, batches.inputs)


def test_a_probe_chooses_and_the_run_says_what(noise, tmp_path):
    run = fit(small_cnn(), Recipe(image_size=16, epochs=1, precision="auto"), noise, Split.holdout(noise), folder=tmp_path / "run")
    assert set(run.info["computed"]) == {"layout", "precision", "threads"}


def test_a_run_goes_on_as_it_was_begun(noise, tmp_path, monkeypatch):
    recipe, split = Recipe(image_size=16, epochs=1, precision="auto"), Split.holdout(noise)
    first = fit(small_cnn(), recipe, noise, split, folder=tmp_path / "run")
    def never(*arguments): raise AssertionError("probed again, perhaps with another result")
    monkeypatch.setattr("course_ml.fitting.probe_speed", never)
    assert fit(small_cnn(), recipe, noise, split, folder=tmp_path / "run").info == first.info


def test_fp16_without_a_gpu_is_refused(noise, tmp_path):
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="fp16 needs a GPU"): fit(small_cnn(), Recipe(image_size=16, precision="fp16"), noise, Split.holdout(noise), folder=tmp_path / "run")


BUILT_IN = {"data": "nature10", "images": 200, "size": 24}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    "A recipe without chance or batch statistics, trained by two processes of 16 images and by one of 32."
    from course_ml.datasets import load_dataset
    from course_ml.experiment import train_recipe
    folder, dataset = tmp_path_factory.mktemp("processes"), load_dataset(**BUILT_IN)
    split, recipe = Split.holdout(dataset), Recipe(image_size=24, epochs=4, batch_size=16, optimizer="sgd", learning_rate=.02, max_grad_norm=1.0)
    two = launch(recipe, split, folder / "two", processes=2, **BUILT_IN)
    one = train_recipe(recipe.replace(batch_size=32), dataset, split, folder=folder / "one")
    return one, two, split


def test_two_processes_equal_one_of_twice_the_batch(two_processes):
    from safetensors.torch import load_file
    one, two, _ = two_processes
    assert two.info["processes"] == 2
    ours, theirs = load_file(one.folder / "last.safetensors"), load_file(two.folder / "last.safetensors")
    for name in ours: torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=1e-5)
    columns = ["train_loss", "train_accuracy", "validation_loss", "validation_accuracy"]
    np.testing.assert_allclose(two.history[columns], one.history[columns], rtol=1e-4)


def test_two_processes_count_every_image_once(two_processes):
    one, two, split = two_processes
    assert two.predictions.ids == one.predictions.ids and len(two.predictions) == len(split.rows("validation"))


def test_a_killed_worker_ends_the_run_with_a_message_and_the_next_call_goes_on(two_processes, tmp_path, monkeypatch):
    import threading
    import psutil
    _, two, split = two_processes
    folder = tmp_path / "killed"
    ended = []

    def kill_one():
        "Kill the second worker as soon as there is a checkpoint."
        deadline = time.monotonic() + 120
        while not list((folder / "checkpoints").glob("epoch_*")) and time.monotonic() < deadline: time.sleep(.01)
        workers = [p for p in psutil.Process().children(recursive=True) if "course_ml.launching" in " ".join(p.cmdline()) and "torch.distributed.run" not in " ".join(p.cmdline())]
        workers[-1].kill()
        ended.append(True)

    recipe = two.recipe.replace(epochs=60)
    monkeypatch.setenv("COURSE_ML_CHECKPOINT_SECONDS", "0")
    thread = threading.Thread(target=kill_one)
    thread.start()
    with pytest.raises(RuntimeError, match="a process was killed .SIGKILL.; the checkpoint after epoch .* is kept"): launch(recipe, split, folder, processes=2, **BUILT_IN)
    thread.join()
    assert ended and read_json(folder / "run.json")["state"] == "running"
    newest = int(sorted((folder / "checkpoints").glob("epoch_*"))[-1].name[6:])
    assert 0 < newest < 60
    again = launch(recipe, split, folder, processes=2, **BUILT_IN)
    assert again.finished and list(again.history.epoch) == list(range(60))


def test_accelerate_launches_the_same_command(tmp_path):
    (tmp_path / "recipe.yml").write_text(Recipe(image_size=24, epochs=1).to_yaml())
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "-m", "course_ml.launching", tmp_path / "recipe.yml", "--data", "nature10", "--images", "200", "--size", "24", "--folder", tmp_path / "run"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "of the validation images are right" in ended.stdout and read_json(tmp_path / "run" / "run.json")["state"] == "finished"


MEMORY = """
import sys, numpy as np, psutil
from course_ml.config import Recipe
from course_ml.training import Batches, build_loader, train_epoch
from course_ml.fitting import Training
from course_ml.transfer import build_model
images = np.load(sys.argv[1], mmap_mode="r")
recipe, rows = Recipe(image_size=32, batch_size=64), np.arange(3000)
training = Training(build_model(recipe, 2), recipe, rows % 2, 2, 1)
loader = build_loader(Batches(images, np.arange(len(images)) % 2, 2, recipe))
def own(): memory = psutil.Process().memory_info(); return memory.rss - getattr(memory, "shared", 0)
def epoch(rows): loader.sampler.items = training.plan(rows, loader.dataset.labels.numpy()); train_epoch(training, loader, np.arange(len(images)).astype(str).astype(object))
epoch(rows)
before = own()
epoch(np.random.default_rng(0).permutation(len(images))[:30000])
print(own() - before)
"""


def test_memory_does_not_grow_with_the_set(tmp_path):
    "An epoch over 30,000 of 100,000 images (300 MB): what the process owns grows by less than a twentieth of them."
    images = np.lib.format.open_memmap(tmp_path / "images.npy", mode="w+", dtype="uint8", shape=(100_000, 32, 32, 3))
    images[::1000] = 7
    del images
    grown = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "images.npy"], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 15e6
