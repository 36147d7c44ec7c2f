"""Figures drawn by two processes are the same bytes, and small; and what the figures show in odd cases."""

import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from course_ml import plots
from course_ml.predictions import Predictions


def make(n, names, skill=2.0, seed=0):
    "Predictions of n images of the named classes; the more skill, the better."
    rng = np.random.default_rng(seed)
    y_true = np.arange(n) % len(names)
    logits = rng.normal(size=(n, len(names)))
    logits[np.arange(n), y_true] += skill
    probabilities = np.exp(1.5 * logits)
    return Predictions.from_arrays(
        [f"image {i}" for i in range(n)], y_true, probabilities / probabilities.sum(axis=1, keepdims=True), names
    )


def images_of(predictions):
    "A data set with an image for each prediction."
    images = np.random.default_rng(0).integers(0, 255, (len(predictions), 1, 1, 3), dtype="uint8")
    return SimpleNamespace(
        name="squares",
        items=pd.DataFrame({"id": predictions.ids}),
        images=lambda size: np.tile(images, (1, size, size, 1)),
    )


def draw_all():
    "Every figure of the module, by name."
    names = [f"Genus{i % 40} species{i}" for i in range(200)]
    two, ten, many = make(300, ["no cactus", "has cactus"]), make(500, list("0123456789")), make(4000, names)
    epochs = np.arange(1, 21)
    history = pd.DataFrame(
        {
            "epoch": epochs,
            "train_loss": 1 / epochs,
            "validation_loss": 0.5 + (epochs - 9) ** 2 / 99,
            "train_accuracy": 1 - 0.5 / epochs,
            "validation_accuracy": 0.9 - 0.3 / epochs,
        }
    )
    return {
        "matrix_of_2": plots.plot_confusion(two),
        "matrix_of_10": plots.plot_confusion(ten),
        "matrix_of_200": plots.plot_confusion(many),
        "top_confusions": plots.plot_top_confusions(ten, images_of(ten)),
        "errors": plots.plot_gallery(ten, images_of(ten), "errors"),
        "correct": plots.plot_gallery(ten, images_of(ten), "correct"),
        "per_class": plots.plot_per_class({"two": two, "again": two}),
        "reliability": plots.plot_reliability(ten),
        "curves": plots.plot_learning_curves({"first": history, "second": history}),
    }


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "The files of every figure, drawn by this process."
    folder = tmp_path_factory.mktemp("figures")
    return {
        path.name: path.read_bytes()
        for name, figure in draw_all().items()
        for path in plots.save_figure(figure, folder / name)
    }


def test_bytes_are_the_same_in_another_process(drawn, tmp_path):
    script = (
        "import sys, test_plots as t\n"
        "for name, figure in t.draw_all().items(): t.plots.save_figure(figure, f'{sys.argv[1]}/{name}')"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=__file__.rsplit("/", 1)[0], check=True, timeout=300
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == drawn


def test_bytes_are_the_same_after_the_figure_was_shown(tmp_path):
    figure, again = plots.plot_confusion(make(300, ["a", "b"])), plots.plot_confusion(make(300, ["a", "b"]))
    figure.savefig(tmp_path / "shown.png", bbox_inches="tight")
    shown, fresh = (plots.save_figure(f, tmp_path / name) for f, name in ((figure, "one"), (again, "two")))
    assert [path.read_bytes() for path in shown] == [path.read_bytes() for path in fresh]


def test_files_are_small_and_undated(drawn):
    assert len(drawn["matrix_of_200.svg"]) < 100_000
    assert max(map(len, drawn.values())) < 300_000
    assert not any(b"dc:date" in content or b"Software" in content for content in drawn.values())


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    figure = plots.show_images([np.zeros((4, 4))])
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plots.save_figure(figure, tmp_path / "figure")
    assert not list(tmp_path.iterdir())


def test_no_figure_stays_in_pyplot(drawn):
    assert plt.get_fignums() == []


@pytest.mark.parametrize("classes", [2, 12, 13, 20, 21, 60, 61, 200])
def test_axes_are_named(classes):
    figure = plots.plot_confusion(
        make(3 * classes, [f"a rather long name of a class, number {i}" for i in range(classes)])
    )
    axis = figure.axes[0]
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("true class", "predicted class")
    assert len(axis.get_xticks()) == (classes if classes <= 60 else 0)


def test_rows_are_true_classes():
    probabilities = np.eye(3)[[1, 1, 2]]  # class 0 is predicted as class 1, twice
    figure = plots.plot_confusion(Predictions.from_arrays(["a", "b", "c"], [0, 0, 2], probabilities, ["zero", "one", "two"]))
    cells = {text.get_position(): text.get_text() for text in figure.axes[0].texts}  # (column, row)
    assert cells[1, 0] == "2" and cells[0, 1] == "·" and cells[2, 2] == "1"


def test_order_is_a_permutation_whatever_the_matrix():
    rng = np.random.default_rng(0)
    for counts in (
        np.zeros((5, 5)),
        np.eye(4),
        np.ones((3, 3)),
        rng.integers(0, 9, (40, 40)),
        np.ones((1, 1)),
        np.ones((2, 2)),
    ):
        assert sorted(plots.confusion_order(counts)) == list(range(len(counts)))


def test_no_errors_to_show():
    perfect = Predictions.from_arrays(["a", "b"], [0, 1], np.eye(2), ["x", "y"])
    assert plots.plot_gallery(perfect, images_of(perfect)).axes[0].get_title() == "no errors"
    assert "no image" in plots.plot_top_confusions(perfect, images_of(perfect)).axes[0].texts[0].get_text()
    assert plots.top_confusions(perfect).empty


def test_an_absent_class_is_drawn():
    absent = Predictions.from_arrays(["a", "b"], [0, 1], np.eye(3)[:2], ["x", "y", "z"])
    for figure in (plots.plot_per_class(absent), plots.plot_confusion(absent), plots.plot_reliability(absent)):
        figure.canvas.draw()


def test_only_the_lowest_classes_are_drawn():
    figure = plots.plot_per_class(make(600, [str(i) for i in range(60)]))
    assert "lowest 40 of 60" in figure.axes[0].get_title() and len(figure.axes[0].get_yticks()) == 40


def test_a_single_epoch_is_seen():
    history = pd.DataFrame({"epoch": [3], "train_loss": .5, "validation_loss": .5, "train_accuracy": .7,
                            "validation_accuracy": .7})
    for axis in plots.plot_learning_curves(history).axes:
        assert axis.get_xlim() == (2.5, 3.5) and all(line.get_marker() == "o" for line in axis.lines[:2])
