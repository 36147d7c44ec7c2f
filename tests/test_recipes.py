"The named recipes: the size that is published, one step of training each, and the command line."

import gc
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from course_ml.command_line import main
from course_ml.config import Dense, Dropout, Flip, HeadOnly, Recipe, Rotation, TrainAll, Zoom, read_changes
from course_ml.recipes import (
    LEAVES_FINE_TUNING,
    RECIPES,
    STUDIES,
    count_parameters,
    named_recipe,
    recipe_table,
)
from course_ml.transfer import build_model

KERAS = importlib.util.find_spec("tensorflow") is not None
needs_keras = pytest.mark.skipif(not KERAS, reason="needs TensorFlow: pip install 'course_ml[keras]'")
OF_TORCH = [name for name, recipe in RECIPES.items() if recipe.framework == "torch"]
OF_KERAS = [name for name, recipe in RECIPES.items() if recipe.framework == "keras"]

# With one linear layer of 1,000 classes, as published: in the papers' tables rounded, e.g. 5.3 million for
# EfficientNet-B0 (Tan and Le 2019), 350 million for ConvNeXt-XL (Liu et al. 2022); to the last digit in the
# documentation of timm and torchvision.
PUBLISHED = {
    "leaves_efficientnet_b4": 19_341_616,
    "leaves_resnet50d": 25_576_264,
    "leaves_resnet200d": 64_693_064,
    "cactus_resnet50": 25_557_032,
    "cactus_efficientnet_b0": 5_288_548,
    "nature10_resnet50": 25_557_032,
    "blood_mobilenetv3_small": 2_542_856,
    "blood_efficientnetv2_b3": 14_358_406,
    "blood_convnext_xlarge": 350_196_968,
    "rare_efficientnet_b0": 5_288_548,
    "rare_mobilenetv2": 3_504_872,
    "rare_resnet50": 25_557_032,
    "rare_densenet121": 7_978_856,
    "rare_vgg16": 138_357_544,
    "rare_vision_transformer": 22_050_664,
    "rare_swin": 28_288_354,
    # Keras counts running means and variances too, and its ResNet-50 has biases in its convolutions
    "nature10_resnet50_keras": 25_636_712,
    "blood_efficientnetv2_b3_keras": 14_467_622,
    "blood_convnext_xlarge_keras": 350_196_968,
    "rare_efficientnet_b0_keras": 5_330_571,
    "rare_mobilenetv2_keras": 3_538_984,
    "rare_resnet50_keras": 25_636_712,
    "rare_densenet121_keras": 8_062_504,
    # without their top layers, which are more than one linear layer: 939,120 and 14,714,688
    "blood_mobilenetv3_small_keras": 939_120 + 577 * 1000,
    "rare_vgg16_keras": 14_714_688 + 513 * 1000,
}
# Convolutions and dense layers at the study's own size and number of classes: the first two as the study printed them
THREE_BLOCKS = 896 + 18_496 + 73_856 + (26 * 26 * 128 + 1) * 128 + 129 * 202
CNNS = {"nature10_model_1": 11_850_058, "nature10_model_2": 23_680_714, "rare_three_block_cnn": THREE_BLOCKS}
SMALL_IMAGE = (
    6 + 896 + 64 + 18_496 + 128 + 73_856 + 256 + 295_168 + 512 + 257 * 1024 + 1025 * 1024 + 1025 * 2
)  # batch norms and convolutions in turn, dense layers, the scores
CNNS |= {f"{name}_keras": count for name, count in CNNS.items()} | {"cactus_small_image": SMALL_IMAGE}
SMALLEST = {"rare_vision_transformer": 224, "rare_swin": 224}  # built for one size


def by_framework(names):
    return [
        pytest.param(name, marks=needs_keras) if RECIPES[name].framework == "keras" else name
        for name in names
    ]


def test_every_recipe_is_counted_below():
    assert set(PUBLISHED) | set(CNNS) == set(RECIPES)


@pytest.mark.parametrize("name", by_framework(PUBLISHED))
def test_size_is_the_published_one(name):
    assert count_parameters(RECIPES[name].replace(head=(), freeze="none"), 1000)[0] == PUBLISHED[name]


@pytest.mark.parametrize("name", by_framework(CNNS))
def test_size_of_a_cnn(name):
    count = CNNS[name]
    assert count_parameters(RECIPES[name], STUDIES[name.split("_")[0]]) == (count, count)


@needs_keras
def test_transfer_of_nature10_has_the_counts_of_the_study():
    total, trainable = count_parameters(RECIPES["nature10_resnet50_keras"], 10)
    assert (total - trainable, trainable) == (23_587_712, 263_562)
    assert count_parameters(RECIPES["nature10_resnet50"], 10)[1] == 263_562


@needs_keras
def test_counting_leaves_nothing_for_the_next_keras_model():
    from keras.src.backend.common import global_state

    count_parameters(RECIPES["blood_convnext_xlarge_keras"], 8)
    assert not global_state.get_global_attribute("uninitialized_variables")


@pytest.mark.parametrize("name", OF_TORCH)
def test_one_step_of_training(name):
    "What the recipe lets learn in its first epoch learns, the rest stays, and the loss is finite."
    recipe = RECIPES[name].replace(weights="none", image_size=SMALLEST.get(name, 32))
    model, random = build_model(recipe, 3), torch.Generator().manual_seed(0)
    head = list((model.head if hasattr(model, "head") else model).parameters())
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, before = torch.optim.SGD(learning, lr=0.1), [weight.detach().clone() for weight in head]
    loss = torch.nn.functional.cross_entropy(
        model.train()(torch.rand(4, 3, recipe.image_size, recipe.image_size, generator=random)),
        torch.tensor([0, 1, 2, 0]),
    )
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss) and any(not torch.equal(old, new) for old, new in zip(before, head))
    assert all(weight.grad is not None for weight in learning)
    if recipe.freeze != TrainAll():
        assert len(learning) == len(head)
    del model, learning, head, optimizer, loss
    gc.collect()


@needs_keras
@pytest.mark.parametrize("name", OF_KERAS)
def test_one_step_of_training_in_keras(name):
    from course_ml.keras_training import build_keras_model, compile_keras, keras

    recipe = RECIPES[name].replace(weights="none", image_size=32)
    model, random = build_keras_model(recipe, 3), np.random.default_rng(0)
    compile_keras(model, recipe, 1)
    model.run_eagerly = (
        "ConvNeXt" not in recipe.backbone
    )  # quicker for a single step, but not with 350 million weights
    before = [weight.numpy() for weight in model.trainable_weights[-2:]]
    loss, *_ = model.train_on_batch(
        random.random((4, 32, 32, 3), "float32"), np.eye(3, dtype="float32")[[0, 1, 2, 0]]
    )
    assert np.isfinite(loss) and any(
        not np.array_equal(old, new) for old, new in zip(before, model.trainable_weights[-2:])
    )
    if recipe.freeze != TrainAll():
        assert len(model.trainable_weights) < 12
    del model
    keras.backend.clear_session()
    gc.collect()


def test_settings_of_leaves_and_cactus():
    b4, resnet200d = RECIPES["leaves_efficientnet_b4"], RECIPES["leaves_resnet200d"]
    assert (b4.image_size, b4.batch_size, b4.learning_rate, b4.mixup, b4.cutmix) == (380, 16, 1e-3, 0.2, 0.1)
    assert (resnet200d.image_size, resnet200d.batch_size, resnet200d.mixup, resnet200d.label_smoothing) == (
        512,
        8,
        0,
        0.1,
    )
    assert b4.ema_decay and resnet200d.ema_decay and not RECIPES["leaves_resnet50d"].ema_decay
    cactus = [RECIPES[name] for name in ("cactus_resnet50", "cactus_efficientnet_b0")]
    assert {(r.epochs, r.learning_rate, r.class_weights, r.head) for r in cactus} == {
        (500, 5e-4, "normalized", cactus[0].head)
    }


def test_settings_the_other_studies_tell():
    model_2, resnet50 = RECIPES["nature10_model_2"], RECIPES["nature10_resnet50"]
    assert (model_2.image_size, model_2.augment, model_2.epochs, model_2.batch_size, model_2.optimizer) == (
        160,
        (Flip(), Rotation(20), Zoom(0.2)),
        20,
        32,
        "adam",
    )
    assert (resnet50.image_size, resnet50.freeze, resnet50.head, resnet50.learning_rate) == (
        224,
        HeadOnly(),
        (Dropout(0.5), Dense(128), Dropout(0.3)),
        1e-4,
    )
    assert (
        RECIPES["blood_convnext_xlarge"].class_weights == "inverse"
        and RECIPES["blood_convnext_xlarge"].image_size == 96
    )
    assert (
        RECIPES["rare_efficientnet_b0"].freeze == TrainAll()
        and RECIPES["rare_mobilenetv2"].freeze == HeadOnly()
    )
    assert {r.weights for r in RECIPES.values() if "cnn" not in r.backbone} == {"hub"} and len(
        {r.hash for r in RECIPES.values()}
    ) == len(RECIPES)


def test_fine_tuning_of_the_leaves():
    recipe = named_recipe("leaves_efficientnet_b4", **LEAVES_FINE_TUNING)
    assert (recipe.learning_rate, recipe.mixup, recipe.cutmix, recipe.label_smoothing) == (5e-5, 0, 0, 0.05)


def test_table_has_a_row_for_each():
    table = recipe_table(OF_TORCH).set_index("name")
    assert (
        list(table.index) == OF_TORCH
        and (table.trainable <= table.parameters).all()
        and (table.trainable > 0).all()
    )
    assert table.loc["leaves_resnet200d", ["input", "epochs × batch", "command"]].tolist() == [
        "512×512",
        "25 × 8",
        "course-ml train leaves_resnet200d --data PATH",
    ]


@pytest.mark.parametrize(
    "texts, message",
    [
        (["epochs"], "is not FIELD=VALUE"),
        (["epochs="], "is not FIELD=VALUE"),
        (["epochs=1", "epochs=2"], "epochs is set twice"),
        (["augment=[flip"], "is no YAML"),
    ],
)
def test_changes_that_cannot_be_read(texts, message):
    with pytest.raises(ValueError, match=message):
        read_changes(texts)


def test_changes_survive_their_yaml():
    for field, value in {
        "learning_rate": 1e-5,
        "head": ("dropout 0.5", "dense 128"),
        "freeze": "staged 3",
        "epochs": 3,
    }.items():
        assert named_recipe(
            "leaves_resnet50d",
            **read_changes([f"{field}={list(value) if isinstance(value, tuple) else value}"]),
        ) == named_recipe("leaves_resnet50d", **{field: value})


# The command line


@pytest.fixture
def colors(tmp_path, monkeypatch):
    "The current folder has 60 small images of two colors."
    random, labels = np.random.default_rng(0), np.arange(60) % 2
    images = random.integers(0, 100, (60, 24, 24, 3))
    images[labels == 1, :, :, 0] += 100
    np.savez(tmp_path / "colors.npz", images=images.astype("uint8"), labels=labels)
    monkeypatch.setenv("COURSE_ML_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COURSE_ML_PROGRESS", "0")
    monkeypatch.chdir(tmp_path)


def course_ml(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "course_ml.command_line", *arguments], capture_output=True, text=True
    )


SMALL = ("--set", "image_size=24", "--set", "epochs=3")


def test_train_says_where_the_run_is_and_how_good(colors, tmp_path):
    done = course_ml(
        "train", "nature10_model_1", "--data", "colors.npz", *SMALL, "--set", "learning_rate=1e-3"
    )
    assert done.returncode == 0, done.stderr
    *_, split, run, accuracy = done.stdout.splitlines()
    assert split == "Split: 70% train, 15% validation, 15% test, seed 0"
    folder = Path(run.removeprefix("Run: "))
    assert folder.is_relative_to(tmp_path / "home") and (folder / "predictions.parquet").exists()
    assert (
        accuracy.startswith("Validation accuracy: 1.000 (95 % interval 0.")
        and "to 1.000; 9 images, holdout, seed 0)" in accuracy
    )
    assert Recipe.from_yaml((folder / "recipe.yml").read_text()) == named_recipe(
        "nature10_model_1", image_size=24, epochs=3
    )


def test_train_with_a_mistyped_name_ends_with_2():
    done = course_ml("train", "nature10_modle_1", "--data", "digits")
    assert (
        done.returncode == 2
        and "did you mean 'nature10_model_1'" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_train_validates_on_a_fold(colors, capsys):
    assert main(["train", "nature10_model_1", "--data", "colors.npz", *SMALL, "--fold", "2/3"]) == 0
    assert "20 images, 2/3, seed 0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--set", "epoch=3"), "a recipe has no field 'epoch'; did you mean 'epochs'"),
        (("--set", "epochs=many"), "epochs must be a whole number of at least 1, not 'many'"),
        (("--set", "epochs"), "is not FIELD=VALUE"),
        (("--data", "color.npz"), "there is no file or folder 'color.npz', and no built-in set"),
        (("--fold", "3/3"), "'3/3' is not FOLD/FOLDS"),
        (("--fold", "0/1"), "k must be at least 2"),
        (("--set", "image_size=4"), "Use larger images"),
        (("--set", "weights=nowhere.pth", "--set", "backbone=resnet10t"), "there is no file nowhere.pth"),
    ],
)
def test_train_says_what_is_wrong(colors, capsys, arguments, message):
    assert main(["train", "nature10_model_1", "--data", "colors.npz", *arguments]) == 2
    assert message in capsys.readouterr().err
