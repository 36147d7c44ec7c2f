"The Keras part where a cell cannot show it: kill and resume, callbacks over many epochs, weights from a file."

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

if importlib.util.find_spec("tensorflow") is None:
    pytest.skip("needs TensorFlow: pip install 'course_ml[keras]'", allow_module_level=True)

from course_ml import keras_training
from course_ml.config import Recipe
from course_ml.data import Dataset, Split
from course_ml.experiment import evaluate_test, predict_images
from course_ml.keras_training import build_keras_model, fit_keras, keras, keras_key, keras_loss, predict_keras
from course_ml.provenance import file_digest
from course_ml.training import count_batches, training_sample

MOBILENET = Path(__file__).parents[1].parent / "shared/weights/keras/mobilenet_v2_1.0_224_no_top_rebuilt.h5"
RECIPE = Recipe(
    framework="keras",
    backbone="dropout_cnn",
    image_size=24,
    epochs=6,
    batch_size=16,
    augment=("flip", "rotation 20"),
    schedule="plateau",
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_ML_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COURSE_ML_PROGRESS", "0")
    monkeypatch.setattr(keras_training, "CHECKPOINT_SECONDS", 0)


def make_data(n=90):
    "Three classes, told apart by their color, with noise."
    random, labels = np.random.default_rng(0), np.arange(n) % 3
    images = random.integers(0, 200, (n, 24, 24, 3))
    images[np.arange(n), :, :, labels] += 40
    dataset = Dataset.from_arrays("colors", images.astype("uint8"), labels, ["red", "green", "blue"])
    return dataset, Split.holdout(dataset)


def train(folder, recipe=RECIPE):
    dataset, split = make_data()
    return fit_keras(build_keras_model(recipe, 3), recipe, dataset, split, folder=folder)


def test_killed_run_resumes_to_the_bit(tmp_path):
    whole = train(tmp_path / "whole")
    script = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}\n"
        f"import test_keras as t; t.keras_training.CHECKPOINT_SECONDS = 0; t.train({str(tmp_path / 'killed')!r})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
    )
    state, deadline = tmp_path / "killed/checkpoints/state.json", time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists() and not (tmp_path / "killed/predictions.parquet").exists(), (
        "the run ended before it could be killed"
    )
    resumed = train(tmp_path / "killed")
    assert resumed.finished and not state.exists()
    assert resumed.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds"))
    for ours, theirs in zip(resumed.model.get_weights(), whole.model.get_weights()):
        assert np.array_equal(ours, theirs)
    assert np.array_equal(resumed.predictions.probabilities, whole.predictions.probabilities)


def interrupted(monkeypatch, folder, recipe, epoch):
    "A run that fails when `epoch` begins."

    def fail(self, now, logs=None):
        begin(self, now, logs)
        if now == epoch:
            raise KeyboardInterrupt

    begin = keras_training.SeedEpoch.on_epoch_begin
    with monkeypatch.context() as patch:
        patch.setattr(keras_training.SeedEpoch, "on_epoch_begin", fail)
        with pytest.raises(KeyboardInterrupt):
            train(folder, recipe)


def test_resumed_callbacks_keep_counting(tmp_path, monkeypatch):
    "With a learning rate of 0 no epoch is better than the first, whatever the interruption."
    recipe = RECIPE.replace(optimizer="sgd", learning_rate=0.0, augment=(), epochs=9, patience=4)
    interrupted(monkeypatch, tmp_path / "run", recipe, epoch=3)
    run = train(tmp_path / "run", recipe)
    assert list(run.history.epoch) == [0, 1, 2, 3, 4] and run.best_epoch == 0


def test_plateau_divides_the_learning_rate_also_after_resuming(tmp_path, monkeypatch):
    recipe = RECIPE.replace(backbone="baseline_cnn", optimizer="sgd", learning_rate=1e-12, augment=(), epochs=7)
    monkeypatch.setattr(keras.callbacks.ReduceLROnPlateau, "_is_improvement", lambda self, value, best: np.isinf(best))
    whole = train(tmp_path / "whole", recipe)
    assert np.allclose(whole.history.learning_rate, [1e-12] * 4 + [1e-13] * 3, rtol=1e-4)
    interrupted(monkeypatch, tmp_path / "parts", recipe, epoch=5)
    assert list(train(tmp_path / "parts", recipe).history.learning_rate) == list(whole.history.learning_rate)


def test_best_weights_are_those_of_the_best_epoch(tmp_path):
    run = train(tmp_path / "run", RECIPE.replace(learning_rate=0.02, epochs=8))
    losses = -np.log(run.predictions.probabilities[np.arange(len(run.predictions)), run.predictions.y_true])
    assert losses.mean() == pytest.approx(run.history.validation_loss[run.best_epoch], abs=1e-4)


def test_predictions_keep_the_order_whatever_the_batches():
    dataset, _ = make_data()
    model, images, rows = build_keras_model(RECIPE, 3), dataset.images(24), np.random.default_rng(1).permutation(90)
    one_by_one = predict_keras(model, images, rows, batch_size=1)
    for batch_size in (7, 64, 90):
        assert np.allclose(predict_keras(model, images, rows, batch_size), one_by_one, atol=1e-6)
    assert np.allclose(one_by_one.sum(1), 1)


def test_weighted_loss_of_rare_classes(tmp_path):
    "Inverse frequencies: with equal class sizes every weight is the number of classes."
    plain, weighted = (
        train(
            tmp_path / name,
            RECIPE.replace(
                class_weights=name, optimizer="sgd", learning_rate=0.0, epochs=1, augment=(), backbone="baseline_cnn"
            ),
        )
        for name in ("none", "inverse")
    )
    assert weighted.history.objective[0] == pytest.approx(3 * plain.history.objective[0], rel=1e-4)
    assert weighted.history.train_loss[0] == pytest.approx(plain.history.train_loss[0], rel=1e-6)
    assert weighted.history.validation_loss[0] == pytest.approx(plain.history.validation_loss[0], rel=1e-6)


def test_exploding_loss_names_the_images(tmp_path):
    dataset, split = make_data()
    model = build_keras_model(RECIPE, 3)
    model.get_layer("scores").bias.assign([np.inf, 0, 0])
    with pytest.raises(FloatingPointError, match=r"the loss became nan in epoch 0; the batch: 0000\d\d, "):
        fit_keras(model, RECIPE, dataset, split, folder=tmp_path / "run")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"framework": "torch"}, "this recipe is for torch"),
        ({"precision": "bf16"}, "precision: the Keras part"),
        ({"weight_decay": 0.1}, "weight_decay: Keras has no L2"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, changes, message):
    dataset, split = make_data()
    with pytest.raises(ValueError, match=message):
        fit_keras(build_keras_model(RECIPE, 3), RECIPE.replace(**changes), dataset, split, folder=tmp_path / "run")


def test_frozen_backbone_from_a_file(tmp_path):
    if not MOBILENET.exists():
        pytest.skip("needs the MobileNetV2 weights in shared/weights/keras, which lie beside the repository, not in it")
    recipe = Recipe(
        framework="keras",
        backbone="keras:MobileNetV2",
        weights=str(MOBILENET),
        head=("dense 16", "batch norm"),
        freeze="backbone",
        image_size=96,
        epochs=1,
        batch_size=16,
    )
    dataset, split = make_data()
    model = build_keras_model(recipe, 3)
    backbone = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    before = backbone.get_weights()
    published = keras.applications.MobileNetV2(
        include_top=False, weights=str(MOBILENET), input_shape=(96, 96, 3), pooling="avg"
    ).get_weights()
    for ours, theirs in zip(before, published):
        assert np.array_equal(ours, theirs)
    run = fit_keras(model, recipe, dataset, split, folder=tmp_path / "run")
    for ours, theirs in zip(before, backbone.get_weights()):
        assert np.array_equal(ours, theirs)
    assert run.info["weights"] == MOBILENET.name and run.info["sha256"] == file_digest(MOBILENET)


def test_preprocessing_is_inside_the_model():
    "A frozen MobileNetV2 must see -1 to 1 when it is given 0 to 1."
    recipe = Recipe(framework="keras", backbone="keras:MobileNetV2", image_size=32)
    model = build_keras_model(recipe, 2)
    backbone = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    images = np.random.default_rng(0).random((2, 32, 32, 3), "float32")
    expected = model.layers[-1](backbone(images * 2 - 1, training=False))
    assert np.allclose(model(images, training=False), expected, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1},
        {"sampling": "balanced", "focal_gamma": 2.0},
        {"optimizer": "lion", "learning_rate": 1e-4},
        {"grad_accum_steps": 2, "head_l2": 1e-3},
        {"preprocess": ("grayscale",), "augment": ("color 0.2", "erase 0.3")},
    ],
    ids=["mixed", "rare classes", "lion", "steps", "images"],
)
def test_the_recipe_fields_train_in_keras_too(tmp_path, changes):
    run = train(tmp_path / "run", RECIPE.replace(schedule="constant", epochs=2, **changes))
    assert run.finished and np.isfinite(run.history.train_loss).all()


def test_the_schedule_is_that_of_torch(tmp_path):
    from course_ml.training import lr_factor

    recipe = RECIPE.replace(schedule="cosine", warmup_epochs=1.0, learning_rate=0.01)
    rates = train(tmp_path / "run", recipe).history.learning_rate
    np.testing.assert_allclose(
        rates, [0.01 * lr_factor(epoch, "cosine", 6, warmup_epochs=1.0) for epoch in range(6)], rtol=1e-5
    )


@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_accumulated_steps_follow_the_schedule_of_torch(tmp_path, monkeypatch, accumulated):
    from course_ml.training import lr_factor

    rates, update = [], keras.optimizers.SGD.update_step

    def note(self, gradient, variable, learning_rate):
        rates.append((float(self._iterations), float(learning_rate)))
        return update(self, gradient, variable, learning_rate)

    monkeypatch.setattr(keras.optimizers.SGD, "update_step", note)
    recipe = RECIPE.replace(schedule="cosine", warmup_epochs=1.0, optimizer="sgd", learning_rate=0.01, epochs=3,
                            batch_size=8, grad_accum_steps=accumulated)
    split = make_data()[1]
    batches = count_batches(len(split.rows("train")), 8, accumulated)
    model = build_keras_model(recipe, 3)
    keras_training.compile_keras(model, recipe, batches)
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    for _ in range(3 * batches):
        optimizer.apply([np.zeros(weight.shape, "float32") for weight in model.trainable_variables])
    steps = batches // accumulated
    expected = [0.01 * lr_factor(step / steps, "cosine", 3, 0.01, 1.0) for step in range(3 * steps)]
    np.testing.assert_allclose([rate for _, rate in sorted(set(rates))], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_weight_decay_spares_what_torch_spares(name):
    recipe = RECIPE.replace(backbone="small_image_cnn", optimizer=name, weight_decay=0.5, learning_rate=0.1,
                            schedule="constant")
    model = build_keras_model(recipe, 3)
    keras_training.compile_keras(model, recipe, 4)
    for weight in model.trainable_variables: weight.assign(np.ones(weight.shape))
    model.optimizer.build(model.trainable_variables)
    model.optimizer.apply([np.zeros(weight.shape, "float32") for weight in model.trainable_variables])
    left = {len(weight.shape) > 1: float(np.mean(weight)) for weight in model.trainable_variables}
    assert left == pytest.approx({True: 0.95, False: 1.0})


def test_a_first_epoch_without_a_loss_is_neither_kept_nor_stops_the_training(tmp_path, monkeypatch):
    end = keras_training.ProgressCallback.on_epoch_end

    def lose(self, epoch, logs=None):
        if epoch in lost: logs["val_cross_entropy"] = float("nan")
        end(self, epoch, logs)

    monkeypatch.setattr(keras_training.ProgressCallback, "on_epoch_end", lose)
    recipe, lost = RECIPE.replace(patience=5, epochs=5, learning_rate=1e-4, augment=()), {0}
    for monitor in ("loss", "accuracy"):
        run = train(tmp_path / monitor, recipe.replace(monitor=monitor))
        scores = run.history[f"validation_{monitor}"]
        assert np.isnan(run.history.validation_accuracy[0]) and len(scores) == 5
        assert run.best_epoch == (scores.idxmin() if monitor == "loss" else scores.idxmax())
        probabilities = run.predictions.probabilities[np.arange(len(run.predictions)), run.predictions.y_true]
        assert -np.log(probabilities).mean() == pytest.approx(run.history.validation_loss[run.best_epoch], abs=1e-4)
    lost = set(range(5))
    with pytest.raises(FloatingPointError, match="not a number in any epoch"):
        train(tmp_path / "never", recipe)


def test_training_images_are_scored_as_validation_images_are(tmp_path):
    run = train(tmp_path / "run", RECIPE.replace(label_smoothing=0.2, class_weights="inverse", epochs=2))
    dataset, split = make_data()
    rows = training_sample(split.rows("train"), split.rows("validation"))
    probabilities = predict_keras(run.model, run.inputs, rows)
    loss = -np.log(probabilities[np.arange(len(rows)), dataset.labels[rows]]).mean()
    assert run.history.train_loss[run.best_epoch] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_focal_loss_has_a_slope_at_certainty(gamma):
    tensorflow = pytest.importorskip("tensorflow")
    logits = tensorflow.Variable([[40.0, -40.0], [0.0, 0.0]])
    truth = np.eye(2, dtype="float32")[[0, 0]]
    with tensorflow.GradientTape() as tape:
        loss = keras_loss(focal_gamma=gamma)(truth, tensorflow.convert_to_tensor(logits))
    assert np.isfinite(tape.gradient(loss, logits)).all()


def test_focal_loss_and_penalty_are_those_of_torch():
    import torch

    from course_ml.training import weighted_loss

    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(20, 3)).astype("float32"), np.arange(20) % 3
    model, loss = build_keras_model(RECIPE.replace(focal_gamma=2.0, head_l2=0.01), 3), keras_loss(focal_gamma=2.0)
    ours = weighted_loss(torch.from_numpy(logits), torch.from_numpy(labels), torch.ones(3), focal_gamma=2.0).item()
    assert float(np.mean(loss(np.eye(3, dtype="float32")[labels], logits))) == pytest.approx(ours, rel=1e-4)
    squares = sum(
        (np.asarray(layer.kernel) ** 2).sum() for layer in model.layers if isinstance(layer, keras.layers.Dense)
    )
    assert float(sum(model.losses)) == pytest.approx(0.01 * squares, rel=1e-4)


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"ema_decay": 0.9}, "ema_decay"),
        ({"layer_decay": 0.5}, "layer_decay"),
        ({"metadata": "phylum"}, "metadata"),
        ({"optimizer": "ranger"}, "optimizer"),
        ({"schedule": "one-cycle"}, "schedule"),
        ({"freeze": "staged 1"}, "freeze"),
        ({"precision": "bf16"}, "precision"),
        ({"weight_decay": 0.1}, "weight_decay"),
    ],
)
def test_what_keras_can_not_do_is_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        RECIPE.replace(**changes)


def zeros(model):
    model.set_weights([weight * 0 for weight in model.get_weights()])
    return model


MUTATIONS = {
    "a field of the recipe": lambda model, data, split: keras_key(
        model, RECIPE.replace(learning_rate=2e-3), data, split
    ),
    "starting weights of zeros": lambda model, data, split: keras_key(zeros(model), RECIPE, data, split),
    "another split": lambda model, data, split: keras_key(model, RECIPE, data, Split.holdout(data, seed=1)),
    "other images": lambda model, data, split: keras_key(model, RECIPE, make_data(60)[0], split),
    "another fold": lambda model, data, split: keras_key(model, RECIPE, data, split, fold=1),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_what_decides_a_run_is_in_its_key(mutation):
    data, split = make_data()
    key = keras_key(build_keras_model(RECIPE, 3), RECIPE, data, split)
    assert key.differences(keras_key(build_keras_model(RECIPE, 3), RECIPE, data, split)) == []
    assert key.differences(mutation(build_keras_model(RECIPE, 3), data, split))


def own_model(**changes):
    options = {"activation": "relu", "rate": 0.1, "strides": 1, "trainable": True, "factor": 2} | changes

    class Scale(keras.layers.Layer):
        def call(self, values):
            return values * options["factor"]

    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 16, 3))
    layer = keras.layers.Conv2D(4, 3, options["strides"], "same", activation=options["activation"])
    layer.trainable = options["trainable"]
    features = keras.layers.GlobalAveragePooling2D()(Scale()(layer(inputs)))
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Dropout(options["rate"])(features)))


@pytest.mark.parametrize("change", [{"activation": "tanh"}, {"rate": 0.5}, {"strides": 2}, {"trainable": False},
                                    {"factor": 3}], ids=str)
def test_how_an_own_model_is_built_is_in_the_key_and_its_names_are_not(change):
    data, split = make_data()
    key = keras_key(own_model(), RECIPE, data, split)
    assert key.differences(keras_key(own_model(), RECIPE, data, split)) == []
    assert [line.split(":")[0] for line in key.differences(keras_key(own_model(**change), RECIPE, data, split))] == [
        "start"]


def test_a_model_that_was_trained_further_predicts_with_the_weights_of_the_run(tmp_path):
    data, split = make_data()
    model = build_keras_model(RECIPE, 3)
    run = fit_keras(model, RECIPE.replace(epochs=1), data, split, folder=tmp_path / "run")
    expected = predict_keras(model, run.inputs, split.rows("test"))
    fit_keras(model, RECIPE.replace(epochs=1, learning_rate=0.1), data, split, folder=tmp_path / "next")
    later = model.get_weights()
    assert np.array_equal(evaluate_test(run, data, split).probabilities, expected)
    assert all(map(np.array_equal, later, model.get_weights()))


def test_the_test_set_is_predicted_by_keras_itself(tmp_path):
    run, (data, split) = train(tmp_path / "run", RECIPE.replace(epochs=1)), make_data()
    preds = evaluate_test(run, data, split)
    assert np.array_equal(preds.probabilities, predict_keras(run.model, run.inputs, split.rows("test")))
    assert np.allclose(predict_images(run, data, split.rows("test")), preds.probabilities, atol=1e-6)
    with pytest.raises(ValueError, match="the model was trained on"):
        evaluate_test(run, data, Split.holdout(data, seed=1))
