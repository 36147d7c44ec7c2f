"Scores of random labels, marks that stay with a score, test sets that are counted, images that were learned from."
import ast
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from safetensors.torch import save_file

from course_ml.cleaning import label_issue_scores
from course_ml.config import Recipe
from course_ml.crossval import (
    ablation,
    average,
    compare_predictions,
    compare_recipes,
    cross_validate,
    ensemble,
    predict_folds,
    predict_out_of_fold,
    sweep,
)
from course_ml.data import Dataset, Split
from course_ml.evidence import MARK, NOTE, count_evaluation, evaluations, evaluations_in_words
from course_ml.evidence import test_set_name as name_of
from course_ml.experiment import evaluate_test, predict_images, predict_labeled, train_recipe
from course_ml.finetuning import fine_tune
from course_ml.interpretation import apply_temperature, find_temperature
from course_ml.metrics import wilson_interval
from course_ml.plots import plot_learning_curves, plot_reliability
from course_ml.predictions import Predictions
from course_ml.provenance import read_json
from course_ml.reporting import Report
from course_ml.runs import Run
from course_ml.study_models import Models, accuracy, gain_over_best, record_gains, record_scores
from course_ml.tuning import tune

RECIPE = Recipe(image_size=12, epochs=6, batch_size=32, learning_rate=3e-3, monitor="accuracy")
SEEDS = range(3)


def noise(seed, n=150, name="noise"):
    "Images of noise, with labels that say nothing about them."
    rng = np.random.default_rng(seed)
    return Dataset.from_arrays(name, rng.integers(0, 256, (n, 12, 12, 3), dtype="uint8"), rng.permutation(n) % 2)


def contains_chance(preds):
    "Whether 95 % Wilson's interval of the accuracy of all predictions together contains one half."
    correct = sum(int((one.y_true == one.y_pred).sum()) for one in preds)
    low, high = wilson_interval(correct, sum(map(len, preds)))
    return low <= .5 <= high


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_ML_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A data set, its split and a run."
    dataset = noise(0, 80)
    split = Split.holdout(dataset)
    return dataset, split, train_recipe(RECIPE.replace(epochs=2), dataset, split, folder=tmp_path_factory.mktemp("run"))


# --- out of fold


FEATURES = {"freeze": "backbone", "backbone": "resnet10t", "weights": "packaged"}


@pytest.mark.parametrize("fields", [{}, {"keep_epoch": "best", "patience": 3}, {"ema_decay": .9}, FEATURES],
                         ids=["last", "inner fold, early stopping", "average of weights", "features"])
def test_random_labels_are_predicted_at_chance_out_of_fold(fields):
    "The best epoch of each fold, chosen on the fold itself, would be above its last one."
    runs = [cross_validate(RECIPE.replace(**fields), data := noise(seed), Split.kfold(data, 3, seed)) for seed in SEEDS]
    assert contains_chance([one.out_of_fold for one in runs])
    assert not any(one.out_of_fold.selected for one in runs)
    if fields: return
    histories = [run.history.validation_accuracy for one in runs for run in one.runs]
    assert np.mean([one.max() for one in histories]) > np.mean([one.iloc[-1] for one in histories]) + .02


def test_random_labels_with_keras():
    recipe = RECIPE.replace(framework="keras", epochs=3)
    for fields in ({}, {"keep_epoch": "best"}):
        preds = [cross_validate(recipe.replace(**fields), data := noise(seed), Split.kfold(data, 3)).out_of_fold
                 for seed in SEEDS[:1]]
        assert contains_chance(preds) and not any(one.selected for one in preds)


def test_random_labels_in_comparisons_label_issues_and_searches():
    recipes = sweep(RECIPE, "learning_rate", [1e-3]) | ablation(RECIPE.replace(label_smoothing=.1), ["label_smoothing"])
    tables = [compare_recipes(recipes, data := noise(seed), Split.kfold(data, 3, seed)) for seed in SEEDS[:2]]
    for rows in zip(*(table.itertuples() for table in tables)):
        low, high = wilson_interval(sum(row.accuracy * row.n for row in rows), sum(row.n for row in rows))
        assert low <= .5 <= high
    assert MARK not in tables[0]
    data = noise(9)
    oof = cross_validate(RECIPE, data, Split.kfold(data, 3)).out_of_fold
    scores = label_issue_scores(oof)
    assert abs(scores[oof.y_true == 0].mean() - scores[oof.y_true == 1].mean()) < .2  # no class is flagged alone


def test_a_search_with_folds_marks_its_best_trial_and_its_recipe(tmp_path):
    data = noise(3)
    folds = Split.kfold(data, 3)
    tuning = tune(lambda trial: RECIPE.replace(learning_rate=trial.suggest_float("rate", 1e-4, 1e-2, log=True)),
                  data, folds, tmp_path / "search", 3, "accuracy")
    table = tuning.table()
    done, tried = table[table.state == "complete"], table.state.isin(["complete", "pruned"]).sum()
    assert done[MARK].str.contains("best of").sum() == 1 and done[MARK][done.value.idxmax()] == f"best of {tried} trials"
    assert tuning.best.chosen_on == data.fingerprint
    assert cross_validate(tuning.best, data, folds).out_of_fold.selected == "recipe"
    single = Split.holdout(data)
    run = train_recipe(tuning.best.replace(keep_epoch="last"), data, single)
    assert run.predictions.selected == "recipe" and evaluate_test(run, data, single).selected == ""


def test_what_would_choose_on_the_scored_fold_is_refused_by_name():
    data = noise(0, 60)
    for field, value in (("patience", 2), ("schedule", "plateau")):
        for framework in ("torch", "keras"):
            with pytest.raises(ValueError, match=f"{field}: with k folds.*keep_epoch='best'"):
                cross_validate(RECIPE.replace(framework=framework, **{field: value}), data, Split.kfold(data, 3))
    with pytest.raises(ValueError, match="two folds"):
        cross_validate(RECIPE.replace(keep_epoch="best"), data, Split.kfold(data, 2))


def test_a_model_of_an_inner_fold_has_seen_neither_fold():
    data = noise(0, 60)
    folds = Split.kfold(data, 3)
    run = train_recipe(RECIPE.replace(epochs=2, keep_epoch="best"), data, folds, fold=2)
    images = run.images
    roles = {role: set(images.id[images.role == role]) for role in ("train", "choice", "validation")}
    ids = np.array(folds.ids)
    assert [roles[role] for role in roles] == [set(ids[folds.rows("validation", fold)]) for fold in (1, 0, 2)]
    assert set(run.predictions.ids) == roles["validation"]


SCRIPT = """
import sys
sys.path.insert(0, "tests")
from test_evidence import RECIPE, noise
from course_ml.data import Split
from course_ml.experiment import train_recipe
data = noise(0, 60)
def stop(epoch, row):
    if epoch == 2 and len(sys.argv) > 2: import os; os._exit(9)
run = train_recipe(RECIPE.replace(framework=sys.argv[1], epochs=5), data, Split.kfold(data, 3), folder=sys.argv[3], callback=stop)
"""


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_killed_fold_ends_with_its_last_epoch(framework, tmp_path):
    environment = {**os.environ, "COURSE_ML_CHECKPOINT_SECONDS": "0"}
    command = [sys.executable, "-c", SCRIPT, framework, "kill", str(tmp_path / "run")]
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == 9
    data = noise(0, 60)
    folds, recipe = Split.kfold(data, 3), RECIPE.replace(framework=framework, epochs=5)
    resumed = train_recipe(recipe, data, folds, folder=tmp_path / "run")
    straight = train_recipe(recipe, data, folds, folder=tmp_path / "straight")
    assert resumed.best_epoch == 4 and len(resumed.history) == 5
    pd.testing.assert_frame_equal(resumed.predictions.table, straight.predictions.table, check_exact=True)
    final = resumed.history.validation_accuracy.iloc[-1]
    assert (resumed.predictions.y_pred == resumed.predictions.y_true).mean() == pytest.approx(final)


# --- marks


def test_the_epoch_of_a_single_split_is_marked_and_the_mark_stays(trained, tmp_path):
    dataset, split, run = trained
    preds = run.predictions
    assert preds.selected == "epoch" and evaluate_test(run, dataset, split).selected == ""
    preds.save(tmp_path / "preds.parquet")
    assert Predictions.load(tmp_path / "preds.parquet").selected == "epoch"
    assert average([preds, preds]).selected == preds.select("validation").selected == "epoch"
    scaled = apply_temperature(preds, find_temperature(preds))
    assert scaled.selected == "epoch, temperature"
    assert compare_predictions({"plain": preds, "scaled": scaled})[MARK].tolist() == ["epoch", "epoch, temperature"]
    assert apply_temperature(evaluate_test(run, dataset, split), find_temperature(preds)).selected == ""
    assert train_recipe(RECIPE.replace(epochs=2, keep_epoch="last"), dataset, split).predictions.selected == ""
    assert train_recipe(RECIPE.replace(epochs=1), dataset, split).predictions.selected == ""


def test_selected_scores_are_recorded_and_shown_with_their_mark(trained, tmp_path, capsys):
    _, _, run = trained
    report, preds = Report(tmp_path), {"net": run.predictions, "other": run.predictions.marked("best of 2 models")}
    table = record_scores(report, preds, {"accuracy": accuracy}, "{model}, {score}, validation")
    gains = record_gains(report, preds, [("net", "other")], "{second} minus {first}, validation")
    records = read_json(tmp_path / "results.json")["records"]
    assert [record["selected"] for record in records.values()] == ["epoch", "epoch, best of 2 models", "epoch, best of 2 models"]
    assert table[MARK].tolist() == ["epoch", "epoch, best of 2 models"] and MARK in gains
    report.table(table, "scores", "Validation set.")
    assert NOTE in read_json(tmp_path / "manifest.json")["tables"]["scores"]["caption"]
    titles = [axis.get_title() for axis in plot_reliability(preds).axes]
    assert any(f"{MARK}:\nepoch" in title for title in titles)
    assert f"{MARK}: epoch" in plot_learning_curves(run.history).axes[0].get_title()


def test_the_best_of_several_models_is_marked(trained):
    dataset, split, _ = trained
    models = Models(dataset, split)
    models.train_all({f"seed {seed}": RECIPE.replace(epochs=2, keep_epoch="last", seed=seed) for seed in range(3)})
    together = models.add_mean_of_best(["seed 0", "seed 1", "seed 2"])
    assert models.validation[together].selected == "best 2 of 3 models" and not models.tests[together].selected
    best = models.best(["seed 0", "seed 1", "seed 2"])
    assert models.validation[best].selected == "best of 3 models" and not models.tests[best].selected
    models.add_tta("flipped", best, ("identity", "flip"))
    assert models.validation["flipped"].selected == "best of 3 models"


def recordings(tree):
    "The calls of `record` in some code, of a report: those with a name that is a string."
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "record"]
    return [call for call in calls if ast.unparse(call.func.value).endswith("report")]


def test_no_module_records_a_score_without_saying_what_was_selected():
    "Only what is no score of predictions may go without: counts, times, and areas of detectors."
    without = []
    for path in sorted((ROOT / "course_ml").glob("*.py")):
        for call in recordings(ast.parse(path.read_text())):
            named = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if "selected" not in named and "a count" not in named.get("reason", ""):
                without.append(path.stem)
    assert set(without) == {"benchmarking", "study_models"} and without.count("study_models") == 2, without


# --- ensembles


def random_folds(seed, members=5, n=300):
    "Out-of-fold predictions of models that know nothing."
    rng, truth = np.random.default_rng(seed), np.arange(n) % 2
    def one(): return Predictions.from_arrays(range(n), truth, rng.dirichlet([1, 1], n), ["a", "b"])
    return {str(m): replace(p := one(), table=p.table.assign(fold=np.arange(n) // 2 % 5)) for m in range(members)}


@pytest.mark.parametrize("weighting", ["by accuracy", "greedy", "best member"])
def test_weights_of_an_ensemble_are_not_fitted_on_what_they_score(weighting):
    "Of models that know nothing, no ensemble is better than chance; the best member by its own score is."
    preds = [ensemble(random_folds(seed), weighting)[0] for seed in range(25)]
    assert contains_chance(preds) and not any(one.selected for one in preds)
    best = [max(random_folds(seed).values(), key=lambda one: accuracy(one)[0]) for seed in range(25)]
    assert not contains_chance(best)
    moved = random_folds(0)
    rows = moved["0"].table.fold == 0
    changed = {name: replace(one, table=one.table.assign(y_true=np.where(rows, 1 - one.table.y_true, one.table.y_true)))
               for name, one in moved.items()}
    before, after = (ensemble(members, weighting)[1].iloc[0].tolist() for members in (moved, changed))
    assert before == after  # the labels of a fold do not decide its weights


def test_a_single_fold_that_chooses_its_own_weights_is_marked():
    single = {name: replace(one, table=one.table.assign(fold=0)) for name, one in random_folds(0).items()}
    assert ensemble(single, "greedy")[0].selected == "weights of the ensemble" and not ensemble(single)[0].selected
    assert "best member" in gain_over_best(single, ensemble(single)[0])[MARK]
    assert MARK not in gain_over_best(random_folds(0), ensemble(random_folds(0))[0])


# --- test sets


def test_every_way_to_the_test_set_is_counted_once(trained):
    dataset, split, run = trained
    rows = split.rows("test")
    test_set = name_of(dataset.digests[rows])
    predict_images(run, dataset, rows[:3])
    assert evaluations_in_words(test_set) == "this test set was evaluated by 1 model of 1 recipe"
    for _ in range(2): evaluate_test(Run(run.folder), dataset, split)
    predict_labeled(run, dataset, rows, "test")
    assert len(evaluations(test_set)) == 1
    predict_images(run, dataset, rows, ("identity", "flip"))
    predict_labeled(run, dataset, rows, "test", ("identity", "flip"))
    assert len(evaluations(test_set)) == 2
    Predictions.make(dataset, rows, np.full((len(rows), 2), .5), "test")
    assert len(evaluations(test_set)) == 3
    predict_images(run, noise(99), np.arange(5))
    assert len(evaluations(test_set)) == 3


def test_folds_with_a_given_test_set_and_another_split_with_the_same_images_have_one_count():
    data = noise(5, 90)
    given = replace(data, items=data.items.assign(split=np.where(np.arange(90) < 20, "test", "train")))
    folds = Split.of(given, k=3)
    validated = cross_validate(RECIPE.replace(epochs=1), given, folds)
    predict_folds(validated, given.take(folds.rows("test")))
    test_set = name_of(given.digests[folds.rows("test")])
    assert evaluations_in_words(test_set) == "this test set was evaluated by 3 models of 1 recipe"
    single = Split.of(given)
    evaluate_test(train_recipe(RECIPE.replace(epochs=2), given, single), given, single)
    assert evaluations_in_words(test_set) == "this test set was evaluated by 4 models of 2 recipes"


COUNT = """
import sys
from course_ml.evidence import count_evaluation
for number in range(20): count_evaluation("set", f"{sys.argv[1]} {number}", "recipe")
"""


def test_two_processes_count_at_the_same_time_and_a_kill_leaves_a_whole_count():
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, name]) for name in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(evaluations("set")) == 40
    killed = subprocess.Popen([sys.executable, "-c", COUNT.replace("range(20)", "range(10**6)"), "c"])
    while len(evaluations("set")) < 45: assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = len(evaluations("set"))
    count_evaluation("set", "after", "recipe")
    assert len(evaluations("set")) == before + 1


def test_the_manifest_and_the_page_say_how_many_models_saw_the_test_set(trained, tmp_path):
    from course_ml.manifests import _evaluated
    from course_ml.pages import footer_of
    dataset, split, run = trained
    evaluate_test(run, dataset, split)
    predict_images(run, dataset, split.rows("test"))
    Report(tmp_path).made_from(dataset, split)
    words = _evaluated(read_json(tmp_path / "manifest.json"))
    assert words == {"evaluated": "this test set was evaluated by 1 model of 1 recipe"}
    manifest = {"command": "course-ml report x", "source": {"commit": "c", "dirty": False}, "finished": "now", **words}
    assert footer_of(manifest).endswith("now · this test set was evaluated by 1 model of 1 recipe")


# --- images that a model has learned from


def copied(dataset, rows, ids=None):
    "The same images in another data set, under other names."
    images = dataset.images(12)[rows]
    ids = ids or [f"new {i}" for i in rows]
    return Dataset.from_arrays("copy", np.array(images), dataset.labels[rows], dataset.classes, ids)


@pytest.mark.parametrize("framework", ["torch", "keras", "features"])
def test_a_model_is_not_scored_on_images_that_it_was_trained_on(framework, tmp_path):
    fields = {"keras": {"framework": "keras"}, "torch": {},
              "features": FEATURES}[framework]
    dataset = noise(1, 60)
    split = Split.holdout(dataset)
    train_recipe(RECIPE.replace(epochs=1, **fields), dataset, split, folder=tmp_path / "run")
    run, train = Run(tmp_path / "run"), split.rows("train")
    other = Split.holdout(dataset, seed=1)
    seen = len(np.intersect1d(other.rows("test"), train))
    with pytest.raises(ValueError, match=f"trained on {seen} of these {len(other.rows('test'))} images"):
        evaluate_test(run, dataset, other)
    renamed = copied(dataset, np.arange(60))
    with pytest.raises(ValueError, match=f"trained on {seen} of these"):
        evaluate_test(run, renamed, Split(list(renamed.items.id), other.splits, list(renamed.items.id)))
    subset = dataset.take(np.r_[train[:4], split.rows("test")])
    with pytest.raises(ValueError, match=f"trained on 4 of these {len(subset)} images.*{subset.items.id[0]}"):
        predict_labeled(run, subset, np.arange(len(subset)), "test")
    with pytest.raises(ValueError, match="trained on 4 of these"):
        Predictions.make(subset, range(len(subset)), np.full((len(subset), 2), .5), "test", run=run)
    assert predict_labeled(run, dataset, split.rows("validation"), "validation").selected == ""
    fresh = noise(2, 20)
    assert len(predict_labeled(run, fresh, np.arange(20), "test")) == 20


def test_images_that_chose_the_epoch_are_marked_in_any_data_set(trained):
    dataset, split, run = trained
    chosen = copied(dataset, split.rows("validation"))
    assert predict_labeled(run, chosen, np.arange(len(chosen)), "test").selected == "epoch"


def test_duplicates_that_the_split_separates_are_marked():
    data = noise(4, 60)
    split = Split.holdout(data)
    images = np.array(data.images(12))
    images[split.rows("test")[0]] = images[split.rows("train")[0]]
    doubled = Dataset.from_arrays("doubled", images, data.labels)
    run = train_recipe(RECIPE.replace(epochs=1), doubled, split)
    assert evaluate_test(run, doubled, split).selected == "training images (1 duplicates)"


def test_images_of_an_earlier_stage_count(tmp_path):
    data = noise(6, 60)
    split, other = Split.holdout(data), Split.holdout(data, seed=1)
    recipe = RECIPE.replace(epochs=1, backbone="resnet10t", weights="packaged")
    first = train_recipe(recipe, data, split, folder=tmp_path / "first")
    second = fine_tune(first, recipe.replace(weights="none"), data, split, folder=tmp_path / "second")
    with pytest.raises(ValueError, match="trained on"): evaluate_test(second, data, other)
    half, file = data.take(np.arange(30)), tmp_path / "first" / "backbone.safetensors"
    save_file({name: value.contiguous() for name, value in first.model.backbone.state_dict().items()}, file)
    with pytest.raises(ValueError, match=f"weights of {file}: the model was trained on"):
        train_recipe(recipe.replace(weights=str(file)), half, Split.holdout(half, seed=2))


def test_kept_images_of_a_fold_are_predicted_by_a_model_that_did_not_see_them():
    data = noise(7, 60)
    folds = Split.kfold(data, 3)
    validated = cross_validate(RECIPE.replace(epochs=1), data, folds)
    assert predict_out_of_fold(validated, data).ids == list(data.items.id)
    with pytest.raises(ValueError, match="trained on"):
        predict_out_of_fold(validated, data, split=Split.kfold(data, 3, seed=1))
