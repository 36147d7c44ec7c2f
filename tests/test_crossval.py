"Folds on three kinds of executors, folders that belong to a key, failures, and ensembles against closed forms."
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import given, settings, strategies
from safetensors.torch import load_file, save_file

from course_ml import provenance
from course_ml.backbones import PACKAGED
from course_ml.config import Recipe
from course_ml.crossval import (
    average,
    compare_recipes,
    cross_validate,
    cross_validation_key,
    diversity,
    ensemble,
    greedy,
    mean_and_deviation,
    predict_out_of_fold,
    write_submission,
)
from course_ml.data import Split
from course_ml.datasets import load_dataset
from course_ml.executors import Outcome, submit
from course_ml.predictions import Predictions
from course_ml.provenance import claim, holder

RECIPE = Recipe(image_size=16, epochs=2, augment=("flip",), batch_size=16)
LIMIT = 300  # seconds that a test waits for another process, on a busy machine


def wait_until(condition, process=None):
    "Wait until `condition()` is true. Fails when the process ends before, or after LIMIT seconds."
    end = time.monotonic() + LIMIT
    while not condition():
        assert process is None or process.poll() is None, "the process ended too early"
        assert time.monotonic() < end, "waited too long"
        time.sleep(.02)


@pytest.fixture(scope="module")
def images():
    dataset = load_dataset("digits", size=16)
    dataset = dataset.take(np.random.default_rng(0).permutation(len(dataset))[:120])
    return dataset, Split.kfold(dataset, k=3)


@pytest.fixture(scope="module")
def by_local_processes(images, tmp_path_factory):
    return cross_validate(RECIPE, *images, tmp_path_factory.mktemp("local"), workers=2, threads=1)


def test_every_image_is_predicted_once_by_a_model_that_did_not_see_it(images, by_local_processes):
    dataset, split = images
    oof = by_local_processes.out_of_fold
    assert oof.ids == list(dataset.items.id) and list(oof.y_true) == list(dataset.labels)
    for fold in range(3):
        trained_on = dataset.items.id.iloc[split.rows("train", fold)]
        assert set(oof.table.id[oof.table.fold == fold]).isdisjoint(trained_on)


@pytest.mark.parametrize("executor, package", [("dask", "distributed"), ("slurm:local", "submitit")])
def test_another_executor_gives_the_same_table(images, by_local_processes, tmp_path, executor, package, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.setenv("COURSE_ML_HOME", str(tmp_path / "home"))
    there = cross_validate(RECIPE, *images, tmp_path / "runs", executor=executor, workers=2, threads=1)
    pd.testing.assert_frame_equal(there.out_of_fold.table, by_local_processes.out_of_fold.table, check_exact=True)


def changed_images(dataset):
    "Return the data set with one label changed."
    labels = dataset.items.label.to_numpy().copy()
    labels[0] = (labels[0] + 1) % 10
    return replace(dataset, items=dataset.items.assign(label=labels))


def other_split(dataset):
    "Return a split of the same images that is not the fixture's."
    return Split.kfold(dataset, k=3, seed=1)


MUTATIONS = {
    "recipe": (lambda recipe, dataset, split: (recipe.replace(seed=1), dataset, split), "recipe seed: 0 became 1"),
    "data": (lambda recipe, dataset, split: (recipe, changed_images(dataset), split), "data: "),
    "split": (lambda recipe, dataset, split: (recipe, dataset, other_split(dataset)), "split: "),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_folder_of_another_cross_validation_is_refused_with_what_differs(images, by_local_processes, what):
    mutate, message = MUTATIONS[what]
    with pytest.raises(ValueError, match=f"something else: .*{message}"):
        cross_validate(*mutate(RECIPE, *images), by_local_processes.runs[0].folder.parent)


@pytest.mark.parametrize("name, value, message", [
    ("used_modules", lambda *_: {"training": "changed"}, "module training is used now|module training changed"),
    ("package_versions", lambda names: dict.fromkeys(names, "99"), "package torch: .* became 99"),
])
def test_other_code_and_other_packages_are_refused(images, by_local_processes, monkeypatch, name, value, message):
    monkeypatch.setattr(provenance, name, value)
    with pytest.raises(ValueError, match=message):
        cross_validate(RECIPE, *images, by_local_processes.runs[0].folder.parent)


def test_the_same_cross_validation_is_read_and_its_default_place_is_named_by_the_key(images, by_local_processes):
    folder = by_local_processes.runs[0].folder.parent
    written = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    again = cross_validate(RECIPE, *images, folder)
    pd.testing.assert_frame_equal(again.out_of_fold.table, by_local_processes.out_of_fold.table, check_exact=True)
    assert written == {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    names = {cross_validation_key(*mutate(RECIPE, *images)).name for mutate, _ in MUTATIONS.values()}
    assert len(names | {cross_validation_key(RECIPE, *images).name}) == 4


def test_metadata_and_a_file_of_weights_are_in_the_key(images, tmp_path):
    dataset, split = images
    with_light = replace(dataset, items=dataset.items.assign(light="sun"))
    other_light = replace(dataset, items=dataset.items.assign(light="lamp"))
    recipe = Recipe(backbone="resnet10t", weights="packaged", freeze="backbone", metadata="light")
    one, other = (cross_validation_key(recipe, data, split) for data in (with_light, other_light))
    assert any(line.startswith("metadata") for line in one.differences(other))
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"some")
    recipe = Recipe(backbone="resnet10t", weights=str(file))
    one = cross_validation_key(recipe, *images)
    file.write_bytes(b"other")
    assert any(line.startswith("weights") for line in one.differences(cross_validation_key(recipe, *images)))


def test_the_packaged_weights_are_in_the_key_by_their_content(images, tmp_path, monkeypatch):
    recipe = Recipe(backbone="resnet10t", weights="packaged")
    key = cross_validation_key(recipe, *images)
    zeros = tmp_path / "zeros.safetensors"
    save_file({name: value * 0 for name, value in load_file(PACKAGED["resnet10t"]).items()}, zeros)
    monkeypatch.setitem(PACKAGED, "resnet10t", zeros)
    assert key.differences(cross_validation_key(recipe, *images)) == ["weights changed"]


def test_test_time_augmentation_is_in_the_key_of_the_predictions(images, by_local_processes):
    plain = predict_out_of_fold(by_local_processes, images[0])
    flipped = predict_out_of_fold(by_local_processes, images[0], ("identity", "flip"))
    assert plain.key == predict_out_of_fold(by_local_processes, images[0]).key != flipped.key


def test_recipes_under_old_names_are_refused(images, by_local_processes):
    "The folder of a comparison may hold other recipes under the same names."
    folder = by_local_processes.runs[0].folder.parent
    with pytest.raises(ValueError, match="recipe learning_rate"):
        compare_recipes({folder.name: RECIPE.replace(learning_rate=.1)}, *images, folder.parent)


def test_a_job_that_dies_is_named_and_the_others_go_on():
    def fail_or_die(what):  # defined here, so that the worker need not import this file
        if what == "raise": raise ValueError("no such thing")
        if what == "die": os.kill(os.getpid(), signal.SIGKILL)
        return what
    outcomes = submit(fail_or_die, {name: (name,) for name in ("one", "die", "two", "raise", "three")})
    finished = {name: outcome.value for name, outcome in outcomes.items() if not outcome.error}
    assert finished == {"one": "one", "two": "two", "three": "three"}
    assert outcomes["raise"] == Outcome(error="ValueError: no such thing")
    assert "TerminatedWorkerError" in outcomes["die"].error


def test_an_idle_worker_is_not_used_after_the_environment_changed(monkeypatch):
    def environment(name): return os.environ.get(name)
    monkeypatch.setenv("COURSE_ML_EXAMPLE", "one")
    assert submit(environment, {"a": ("COURSE_ML_EXAMPLE",)})["a"].value == "one"
    monkeypatch.setenv("COURSE_ML_EXAMPLE", "two")
    assert submit(environment, {"a": ("COURSE_ML_EXAMPLE",)})["a"].value == "two"


def test_only_what_is_missing_is_trained_again(images, tmp_path):
    "A fold that cannot finish is named; the others stay, and the next call trains that one alone."
    blocked = claim(tmp_path / "runs", cross_validation_key(RECIPE, *images)) / "fold_1"
    blocked.write_text("a file where the run's folder should be")
    with pytest.raises(RuntimeError, match="1 of 3 folds failed: fold 1: .*the same call trains what is missing"):
        cross_validate(RECIPE, *images, tmp_path / "runs")
    files = [tmp_path / f"runs/fold_{fold}/last.safetensors" for fold in (0, 2)]
    def written(): return [file.stat().st_mtime_ns for file in files]
    before = written()
    blocked.unlink()
    assert len(cross_validate(RECIPE, *images, tmp_path / "runs").out_of_fold) == 120
    assert before == written()


SCRIPT = """
import sys
import numpy as np
from course_ml.config import Recipe
from course_ml.crossval import cross_validate
from course_ml.data import Split
from course_ml.datasets import load_dataset
dataset = load_dataset("digits", size=16)
dataset = dataset.take(np.random.default_rng(0).permutation(len(dataset))[:120])
recipe = Recipe(image_size=16, epochs=2, augment=("flip",), batch_size=16)
cross_validate(recipe, dataset, Split.kfold(dataset, k=3), sys.argv[1], threads=1)
"""


def test_a_killed_cross_validation_goes_on_where_it_was(by_local_processes, images, tmp_path):
    "While it works, whoever does not want to wait learns who works; after a kill, the same call does the rest."
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, tmp_path / "runs"], start_new_session=True)
    wait_until((tmp_path / "runs/fold_0/predictions.parquet").exists, process)
    assert holder(tmp_path / "runs")["pid"] == process.pid
    with pytest.raises(RuntimeError, match=f"process {process.pid} .* is working on"):
        cross_validate(RECIPE, *images, tmp_path / "runs", threads=1, wait=False)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "runs/fold_2/predictions.parquet").exists(), "it ended before it could be killed"
    again = cross_validate(RECIPE, *images, tmp_path / "runs", threads=1)
    pd.testing.assert_frame_equal(again.out_of_fold.table, by_local_processes.out_of_fold.table, check_exact=True)


def test_of_two_processes_one_works_and_the_other_waits(images, by_local_processes, tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", SCRIPT, tmp_path / "runs"], stderr=subprocess.PIPE, text=True)
                 for _ in range(2)]
    errors = [process.communicate(timeout=LIMIT)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sum("waiting for process" in error for error in errors) == 1, errors
    both = cross_validate(RECIPE, *images, tmp_path / "runs", threads=1)
    pd.testing.assert_frame_equal(both.out_of_fold.table, by_local_processes.out_of_fold.table, check_exact=True)


def random_members(seed, n=40, classes=3, members=3):
    rng = np.random.default_rng(seed)
    truth, split = rng.integers(0, classes, n), np.arange(n) % 4
    names = list("abc")[:classes]
    def predict():
        return Predictions.from_arrays(range(n), truth, rng.dirichlet(np.ones(classes), n), names)
    preds = [predict() for _ in range(members)]
    return {f"model {i}": replace(one, table=one.table.assign(fold=split)) for i, one in enumerate(preds)}


@settings(deadline=None, max_examples=20)
@given(seed=strategies.integers(0, 1000))
def test_ensembles_are_mixtures_of_their_members(seed):
    members = random_members(seed)
    probabilities = np.array([member.probabilities for member in members.values()])
    for weighting in ("uniform", "by accuracy", "greedy"):
        preds, weights = ensemble(members, weighting)
        assert preds.ids == members["model 0"].ids
        np.testing.assert_allclose(preds.probabilities.sum(1), 1)
        np.testing.assert_allclose(weights[list(members)].sum(axis=1), 1)
        of_image = weights.set_index("fold")[list(members)].loc[preds.table.fold].to_numpy()
        by_hand = np.einsum("nm,mnc->nc", of_image, probabilities)
        np.testing.assert_allclose(preds.probabilities, by_hand, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=strategies.integers(0, 1000))
def test_weights_of_a_fold_do_not_know_its_truth(seed):
    "Another truth in fold 0 changes nothing about the weights of fold 0."
    members = random_members(seed)
    def other_truth(table): return np.where(table.fold == 0, (table.y_true + 1) % 3, table.y_true)
    changed = {name: replace(one, table=one.table.assign(y_true=other_truth(one.table)))
               for name, one in members.items()}
    for weighting in ("by accuracy", "greedy"):
        np.testing.assert_array_equal(ensemble(members, weighting)[1].iloc[0], ensemble(changed, weighting)[1].iloc[0])


@settings(deadline=None, max_examples=20)
@given(seed=strategies.integers(0, 1000))
def test_greedy_selection_does_not_lose_against_the_best_member(seed):
    from sklearn.metrics import log_loss
    members = list(random_members(seed).values())
    truth = members[0].y_true
    def loss(preds): return log_loss(truth, preds.probabilities, labels=[0, 1, 2])
    assert loss(average(members, greedy(members))) <= min(map(loss, members)) + 1e-9


def test_diversity_by_hand():
    truth = [0, 0, 1, 1]
    def predict(classes):
        return Predictions.from_arrays(range(4), truth, np.eye(2)[classes] * .8 + .1, ["a", "b"])
    row = diversity({"a": predict([0, 1, 1, 1]), "b": predict([0, 0, 0, 1])}).iloc[0]
    assert row.disagreement == .5 and row["either correct"] == 1
    assert row["correlation of errors"] == pytest.approx(-1 / 3)


def test_the_interval_of_the_mean_is_students():
    from scipy.stats import ttest_1samp
    scores = np.random.default_rng(0).normal(.8, .02, 7)
    interval = ttest_1samp(scores, 0).confidence_interval(.95)
    assert tuple(mean_and_deviation(scores)[["low", "high"]].iloc[0]) == pytest.approx((interval.low, interval.high))
    with pytest.raises(ValueError, match="at least two"): mean_and_deviation([.8])


def test_a_submission_with_unknown_ids_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="1 ids are not asked for, e.g. c"):
        write_submission(tmp_path / "s.csv", ["a", "b", "c"], [0, 1, 2], ["a", "b"])
    assert not (tmp_path / "s.csv").exists()


def test_workers_end_with_a_caller_that_was_killed(tmp_path):
    code = f"""
import os, time
from course_ml.executors import submit
def job(folder):
    open(folder + "/pid", "w").write(str(os.getpid()))
    time.sleep(600)
submit(job, {{"a": ({str(tmp_path)!r},)}})
"""
    caller = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), caller)
    worker = int((tmp_path / "pid").read_text())
    caller.kill()
    caller.wait()
    wait_until(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE)
