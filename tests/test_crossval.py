"Folds on three kinds of machine, folds that fail, and ensembles against their closed forms."
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

from course_ml.config import Recipe
from course_ml.executors import Outcome, submit
from course_ml.crossval import average, cross_validate, diversity, ensemble, greedy, mean_and_deviation, write_submission
from course_ml.data import Split
from course_ml.predictions import Predictions
from course_ml.datasets import load_dataset

RECIPE = Recipe(image_size=16, epochs=2, augment=("flip",), batch_size=16)


@pytest.fixture(scope="module")
def images():
    dataset = load_dataset("digits", size=16)
    dataset = dataset.take(np.random.default_rng(0).permutation(len(dataset))[:120])
    return dataset, Split.kfold(dataset, k=3)


@pytest.fixture(scope="module")
def by_local_processes(images, tmp_path_factory):
    return cross_validate(RECIPE, *images, tmp_path_factory.mktemp("local"), workers=2, threads=1)


def test_every_image_is_judged_once_by_a_model_that_did_not_see_it(images, by_local_processes):
    dataset, split = images
    oof = by_local_processes.out_of_fold
    assert oof.ids == list(dataset.items.id) and list(oof.y_true) == list(dataset.labels)
    for fold in range(3): assert set(oof.table.id[oof.table.fold == fold]).isdisjoint(dataset.items.id.iloc[split.rows("train", fold)])


@pytest.mark.parametrize("executor, package", [("dask", "distributed"), ("slurm:local", "submitit")])
def test_another_executor_gives_the_same_table(images, by_local_processes, tmp_path, executor, package, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.setenv("COURSE_ML_HOME", str(tmp_path / "home"))
    there = cross_validate(RECIPE, *images, tmp_path / "runs", executor=executor, workers=2, threads=1)
    pd.testing.assert_frame_equal(there.out_of_fold.table, by_local_processes.out_of_fold.table, check_exact=True)


def fail_or_die(what):
    if what == "raise": raise ValueError("no such thing")
    if what == "die": os.kill(os.getpid(), signal.SIGKILL)
    return what


def test_a_job_that_dies_is_named_and_the_others_go_on():
    outcomes = submit(fail_or_die, {name: (name,) for name in ("one", "die", "two", "raise", "three")})
    assert {name: outcome.value for name, outcome in outcomes.items() if not outcome.error} == {"one": "one", "two": "two", "three": "three"}
    assert outcomes["raise"] == Outcome(error="ValueError: no such thing") and "TerminatedWorkerError" in outcomes["die"].error


def test_only_what_is_missing_is_trained_again(images, tmp_path):
    "A fold that cannot finish is named; the others stay, and the next call trains that one alone."
    blocked = tmp_path / "fold_1"
    blocked.write_text("a file where the run's folder should be")
    with pytest.raises(RuntimeError, match="1 of 3 folds failed: fold 1: .*the same call trains what is missing"): cross_validate(RECIPE, *images, tmp_path)
    written = {fold: (tmp_path / f"fold_{fold}/last.safetensors").stat().st_mtime_ns for fold in (0, 2)}
    blocked.unlink()
    assert len(cross_validate(RECIPE, *images, tmp_path).out_of_fold) == 120
    assert written == {fold: (tmp_path / f"fold_{fold}/last.safetensors").stat().st_mtime_ns for fold in (0, 2)}


SCRIPT = """
import sys
import numpy as np
from course_ml.config import Recipe
from course_ml.crossval import cross_validate
from course_ml.data import Folds
from course_ml.datasets import load_dataset
dataset = load_dataset("digits", size=16)
dataset = dataset.take(np.random.default_rng(0).permutation(len(dataset))[:120])
cross_validate(Recipe(image_size=16, epochs=2, augment=("flip",), batch_size=16), dataset, Folds.kfold(dataset, k=3), sys.argv[1], threads=1)
"""


def test_a_killed_cross_validation_goes_on_where_it_was(by_local_processes, images, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, tmp_path / "runs"], start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs/fold_0/predictions.parquet").exists() and process.poll() is None and time.monotonic() < deadline: time.sleep(.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "runs/fold_2/predictions.parquet").exists(), "it ended before it could be killed"
    again = cross_validate(RECIPE, *images, tmp_path / "runs", threads=1)
    pd.testing.assert_frame_equal(again.out_of_fold.table, by_local_processes.out_of_fold.table, check_exact=True)


def random_members(seed, n=40, classes=3, members=3):
    rng = np.random.default_rng(seed)
    truth, split = rng.integers(0, classes, n), np.arange(n) % 4
    preds = [Predictions.from_arrays(range(n), truth, rng.dirichlet(np.ones(classes), n), list("abc")[:classes]) for _ in range(members)]
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
        by_hand = np.einsum("nm,mnc->nc", weights.set_index("fold")[list(members)].loc[preds.table.fold].to_numpy(), probabilities)
        np.testing.assert_allclose(preds.probabilities, by_hand, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=strategies.integers(0, 1000))
def test_weights_of_a_fold_do_not_know_its_truth(seed):
    "Another truth in fold 0 changes nothing about the weights of fold 0."
    members = random_members(seed)
    changed = {name: replace(one, table=one.table.assign(y_true=np.where(one.table.fold == 0, (one.table.y_true + 1) % 3, one.table.y_true))) for name, one in members.items()}
    for weighting in ("by accuracy", "greedy"):
        np.testing.assert_array_equal(ensemble(members, weighting)[1].iloc[0], ensemble(changed, weighting)[1].iloc[0])


@settings(deadline=None, max_examples=20)
@given(seed=strategies.integers(0, 1000))
def test_greedy_selection_does_not_lose_against_the_best_member(seed):
    from sklearn.metrics import log_loss
    members = list(random_members(seed).values())
    truth = members[0].y_true
    mixed = average(members, greedy(members))
    assert log_loss(truth, mixed.probabilities, labels=[0, 1, 2]) <= min(log_loss(truth, m.probabilities, labels=[0, 1, 2]) for m in members) + 1e-9


def test_diversity_by_hand():
    truth = [0, 0, 1, 1]
    def says(answers): return Predictions.from_arrays(range(4), truth, np.eye(2)[answers] * .8 + .1, ["a", "b"])
    row = diversity({"a": says([0, 1, 1, 1]), "b": says([0, 0, 0, 1])}).iloc[0]
    assert row.disagreement == .5 and row["either right"] == 1 and row["correlation of errors"] == pytest.approx(-1 / 3)


def test_spread_is_students_interval():
    from scipy.stats import ttest_1samp
    scores = np.random.default_rng(0).normal(.8, .02, 7)
    interval = ttest_1samp(scores, 0).confidence_interval(.95)
    assert tuple(mean_and_deviation(scores)[["low", "high"]].iloc[0]) == pytest.approx((interval.low, interval.high))
    with pytest.raises(ValueError, match="at least two"): mean_and_deviation([.8])


def test_a_submission_with_unknown_ids_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="1 ids are not asked for, e.g. c"): write_submission(tmp_path / "s.csv", ["a", "b", "c"], [0, 1, 2], ["a", "b"])
    assert not (tmp_path / "s.csv").exists()


def test_workers_end_with_a_caller_that_was_killed(tmp_path):
    code = f"""
import os, time
from course_ml.executors import submit
def job(folder):
    open(folder + "/pid", "w").write(str(os.getpid()))
    time.sleep(60)
submit(job, {{"a": ({str(tmp_path)!r},)}})
"""
    caller = subprocess.Popen([sys.executable, "-c", code])
    end = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()): time.sleep(.1); assert time.monotonic() < end
    worker = int((tmp_path / "pid").read_text())
    caller.kill()
    caller.wait()
    end = time.monotonic() + 10
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE: time.sleep(.1); assert time.monotonic() < end, "the worker goes on"
