"A search that is killed goes on, bad trials are cut short, and the test part stays closed."
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from course_ml.provenance import read_json
from course_ml.config import Recipe
from course_ml.data import Split
from course_ml.datasets import load_dataset
from course_ml.tuning import open_study, plot_tuning, tune


@pytest.fixture(scope="module")
def images():
    dataset = load_dataset("digits", size=16)
    dataset = dataset.take(np.random.default_rng(0).permutation(len(dataset))[:150])
    return dataset, Split.holdout(dataset)


def suggest(trial): return Recipe(image_size=16, epochs=4, monitor="accuracy", learning_rate=trial.suggest_float("rate", 1e-4, 1e-2, log=True), seed=trial.suggest_int("seed", 0, 10**6))


def test_two_workers_share_the_trials_and_never_open_the_test_part(images, tmp_path):
    tuning = tune(suggest, *images, tmp_path, trials=5, workers=2, threads=1)
    assert len(tuning.table()) == 5 and tuning.table().seed.nunique() == 5
    assert all(read_json(file)["test_evaluations"] == 0 for file in tmp_path.glob("trials/*/run.json"))
    assert tuning.best == Recipe.from_yaml((tmp_path / "best.yml").read_text())
    best = tuning.table().set_index("trial").loc[tuning.study.best_trial.number]
    assert best.seed == tuning.best.seed and best.rate == tuning.best.learning_rate


def test_a_trial_that_is_behind_is_cut_short(images, tmp_path):
    def hopeless(trial): return Recipe(image_size=16, epochs=6, monitor="accuracy", learning_rate=3e-3 if trial.number < 5 else 1e-7)
    table = tune(hopeless, *images, tmp_path, trials=7).table()
    assert (table.state[5:] == "pruned").any() and (table.epochs[table.state == "pruned"] < 6).all()


def test_keras_trials_report_too(images, tmp_path):
    pytest.importorskip("keras")
    def in_keras(trial): return Recipe(framework="keras", image_size=16, epochs=2, monitor="accuracy", learning_rate=trial.suggest_float("rate", 1e-4, 1e-2, log=True))
    assert tune(in_keras, *images, tmp_path, trials=1).table().epochs.tolist() == [2]


def test_few_trials_make_no_image(images, tmp_path):
    with pytest.raises(ValueError, match="two finished trials, not 1"): plot_tuning(tune(suggest, *images, tmp_path, trials=1))


KILLED = """
import os, sys, time
import numpy as np
sys.path.insert(0, {tests!r})
import test_tuning
import course_ml.tuning as tuning
from course_ml.data import Folds
from course_ml.datasets import load_dataset

dataset = load_dataset("digits", size=16)
dataset = dataset.take(np.random.default_rng(0).permutation(len(dataset))[:150])
study = tuning.open_study({folder!r}, "accuracy")
def slow(trial):
    recipe = test_tuning.suggest(trial)
    if trial.number == 2: open({sign!r}, "w").write(repr(trial.params)); time.sleep(600)
    return recipe
tuning.work(slow, dataset, Folds.holdout(dataset), __import__("pathlib").Path({folder!r}), "accuracy", 0, 4, 1)
"""


def test_a_killed_search_goes_on_with_the_trial_that_was_cut(images, tmp_path):
    sign = tmp_path / "third"
    script = KILLED.format(tests=os.path.dirname(__file__), folder=str(tmp_path / "study"), sign=str(sign))
    process = subprocess.Popen([sys.executable, "-c", script])
    for _ in range(600):
        if sign.exists() and sign.read_text(): break
        assert process.poll() is None, "the search ended before it could be killed"
        time.sleep(.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    cut = eval(sign.read_text())
    table = tune(suggest, *images, tmp_path / "study", trials=5).table()
    assert table.state.tolist().count("complete") + table.state.tolist().count("pruned") == 4 and table.state[2] == "fail"
    again = table[(table.rate == cut["rate"]) & (table.trial != 2)]
    assert len(again) == 1 and again.why.iloc[0] == "goes on with trial 2" and again.state.iloc[0] != "fail"
