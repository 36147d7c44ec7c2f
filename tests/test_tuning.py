"A search that is killed goes on, bad trials are pruned, other searches are refused, and the test set is not used."
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from course_ml.config import Recipe
from course_ml.data import Split
from course_ml.datasets import load_dataset
from course_ml.evidence import evaluations
from course_ml.evidence import test_set_name as name_of_test_set
from course_ml.provenance import holder
from course_ml.runs import Run
from course_ml.tuning import open_study, plot_tuning, search_key, tune
from course_ml.user_code import code_of

LIMIT = 300  # seconds that a test waits for another process, on a busy machine


def small_images():
    dataset = load_dataset("digits", size=16)
    dataset = dataset.take(np.random.default_rng(0).permutation(len(dataset))[:150])
    return dataset, Split.holdout(dataset)


@pytest.fixture(scope="module")
def images(): return small_images()


def pause(trial):
    "Wait in the third trial, in the process that is to be killed."
    if trial.number != 2 or "COURSE_ML_SIGN" not in os.environ: return
    with open(os.environ["COURSE_ML_SIGN"], "w") as file: file.write(repr(trial.params))
    time.sleep(2 * LIMIT)


def suggest(trial):
    rate = trial.suggest_float("rate", 1e-4, 1e-2, log=True)
    seed = trial.suggest_int("seed", 0, 10**6)
    pause(trial)
    return Recipe(image_size=16, epochs=3, monitor="accuracy", learning_rate=rate, seed=seed)


@pytest.fixture(scope="module")
def search(images, tmp_path_factory):
    return tune(suggest, *images, tmp_path_factory.mktemp("search"), 5, "accuracy", workers=2, threads=1)


def test_two_workers_share_the_trials_and_never_use_the_test_set(search):
    assert len(search.table()) == 5 and search.table().seed.nunique() == 5
    runs = [Run(file.parent) for file in search.folder.glob("trials/*/run.json")]
    assert runs and not any((run.folder / "test").exists() for run in runs)
    tests = {name_of_test_set(run.images.digest[run.images.role == "test"]) for run in runs}
    assert len(tests) == 1 and not len(evaluations(tests.pop()))
    assert search.best == Recipe.from_yaml((search.folder / "best.yml").read_text())
    best = search.table().set_index("trial").loc[search.study.best_trial.number]
    assert best.seed == search.best.seed and best.rate == search.best.learning_rate


def test_the_same_search_goes_on(images, search):
    again = tune(suggest, *images, search.folder, 5, "accuracy", threads=1)
    assert again.table().equals(search.table())


def without_third(images):
    dataset, split = images
    kept = np.delete(np.arange(len(dataset)), 2)
    cut = [[values[i] for i in kept] for values in (split.ids, split.splits, split.groups)]
    return {"dataset": dataset.take(kept), "split": Split(*cut, split.seed)}


def suggest_wider(trial):
    return Recipe(image_size=16, epochs=3, monitor="accuracy", learning_rate=trial.suggest_float("rate", 1e-4, 1e-1))


MUTATIONS = {
    "suggest": (lambda images: {"suggest": suggest_wider}, "suggest code: "),
    "monitor": (lambda images: {"monitor": "loss"}, "monitor: accuracy became loss"),
    "seed": (lambda images: {"seed": 1}, "seed: 0 became 1"),
    "split": (lambda images: {"split": Split.holdout(images[0], seed=1)}, "split: "),
    "data": (without_third, "data: "),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_another_search_in_the_folder_is_refused_with_what_differs(images, search, what):
    mutate, message = MUTATIONS[what]
    own = {"suggest": suggest, "dataset": images[0], "split": images[1], "folder": search.folder, "trials": 5,
           "monitor": "accuracy"}
    with pytest.raises(ValueError, match=f"something else: .*{message}"):
        tune(**own | mutate(images))


def make(rate, comment=False):
    "Return a function to search with, made in one of two layouts."
    if comment:
        def inner(trial):
            "Return a recipe."
            return Recipe(learning_rate=rate)  # for every trial the same
    else:
        def inner(trial): return Recipe(learning_rate=rate)
    return inner


def test_a_function_counts_by_code_and_by_the_values_it_uses_but_not_by_comments(images):
    assert code_of(make(.1)) == code_of(make(.1, comment=True))
    assert code_of(make(.1)) != code_of(make(.2))
    def key(function): return search_key(function, *images, "accuracy", 0)
    assert key(make(.1)).differences(key(make(.2)))[0].startswith("suggest rate: ")


def test_a_helper_counts_too():
    assert set(code_of(suggest)["pause"]) >= {"code", "LIMIT"}


def plain(trial):
    rate = trial.suggest_categorical("rate", [1e-3, 1e-9])
    return Recipe(image_size=16, epochs=2, learning_rate=rate, seed=trial.number)


def test_a_search_with_defaults_returns_the_recipe_of_the_lowest_loss(images, tmp_path):
    tuning = tune(plain, *images, tmp_path, trials=4)
    table = tuning.table()
    assert (table.state != "fail").all() and tuning.study.direction.name == "MINIMIZE"
    best = table.loc[table.value.idxmin()]
    assert tuning.best.learning_rate == best.rate and tuning.best.seed == best.trial
    with pytest.raises(ValueError, match="monitor must be one of loss, accuracy, not 'macro F1'"):
        tune(plain, *images, tmp_path / "other", monitor="macro F1")


def test_a_trial_whose_score_is_no_number_is_never_the_best(tmp_path):
    study = open_study(tmp_path, "loss")
    def objective(trial):
        for epoch in range(3): trial.report(float("nan") if trial.number >= 5 else 1.0, epoch)
        return float("nan") if trial.number in (0, 6) else float(trial.number)
    study.optimize(objective, n_trials=7)
    assert study.best_value == 1.0 and [trial.state.name for trial in study.trials][::6] == ["FAIL", "FAIL"]
    trial = study.ask()
    for epoch in range(3): trial.report(float("nan"), epoch)
    assert trial.should_prune()


def test_a_trial_that_is_behind_is_pruned(images, tmp_path):
    def hopeless(trial):
        rate = 3e-3 if trial.number < 5 else 1e-7
        return Recipe(image_size=16, epochs=6, monitor="accuracy", learning_rate=rate)
    table = tune(hopeless, *images, tmp_path, 7, "accuracy").table()
    assert (table.state[5:] == "pruned").any() and (table.epochs[table.state == "pruned"] < 6).all()


def test_a_recipe_that_monitors_something_else_fails_its_trial(images, tmp_path):
    def other(trial): return Recipe(image_size=16, epochs=1, monitor="loss")
    table = tune(other, *images, tmp_path, 1, "accuracy").table()
    assert table.state.tolist() == ["fail"] and "'accuracy'" in table.why[0]
    again = tune(other, *images, tmp_path, 1, "accuracy")
    with pytest.raises(ValueError, match="two finished trials, not 0"): plot_tuning(again)


def test_keras_trials_report_too(images, tmp_path):
    pytest.importorskip("keras")
    def in_keras(trial):
        rate = trial.suggest_float("rate", 1e-4, 1e-2, log=True)
        return Recipe(framework="keras", image_size=16, epochs=2, monitor="accuracy", learning_rate=rate)
    tuning = tune(in_keras, *images, tmp_path, 1, "accuracy")
    assert tuning.table().epochs.tolist() == [2]
    with pytest.raises(ValueError, match="two finished trials, not 1"): plot_tuning(tuning)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import test_tuning
from course_ml.tuning import tune
tune(test_tuning.suggest, *test_tuning.small_images(), {folder!r}, 5, "accuracy", threads=1)
"""


def test_a_killed_search_goes_on_with_the_trial_that_was_cut(images, tmp_path):
    sign, folder = tmp_path / "third", tmp_path / "study"
    script = KILLED.format(tests=os.path.dirname(__file__), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "COURSE_ML_SIGN": str(sign)})
    end = time.monotonic() + LIMIT
    while not (sign.exists() and sign.read_text()):
        assert process.poll() is None, "the search ended before it could be killed"
        assert time.monotonic() < end, "the third trial never began"
        time.sleep(.1)
    assert holder(folder)["pid"] == process.pid
    with pytest.raises(RuntimeError, match=f"process {process.pid} .* is working on"):
        tune(suggest, *images, folder, 5, "accuracy", wait=False)
    process.send_signal(signal.SIGKILL)
    process.wait()
    cut = eval(sign.read_text())
    table = tune(suggest, *images, folder, 5, "accuracy", threads=1).table()
    states = table.state.tolist()
    assert states.count("complete") + states.count("pruned") == 4 and states[2] == "fail"
    again = table[(table.rate == cut["rate"]) & (table.trial != 2)]
    assert len(again) == 1 and again.why.iloc[0] == "goes on with trial 2" and again.state.iloc[0] != "fail"
