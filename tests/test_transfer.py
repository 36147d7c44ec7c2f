"""Backbones from every source, the right preprocessing, and a cache that returns the right features."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from course_ml.backbones import FAMILIES, PACKAGED, timm_backbone, torchvision_blocks
from course_ml.config import Recipe
from course_ml.data import Dataset, Split
from course_ml.experiment import load_model, train_recipe
from course_ml.features import frozen_features
from course_ml.fitting import Training, build_loader, fit, training_key
from course_ml.runs import Run, weights_hash
from course_ml.training import Batches, parameter_groups, predict
from course_ml.transfer import TransferModel, build_model

WEIGHTS = Path(__file__).resolve().parents[2] / "shared" / "weights"
real_weights = pytest.mark.skipif(
    not WEIGHTS.exists(), reason=f"the ImageNet weights are not beside the project ({WEIGHTS.name}/)"
)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_ML_HOME", str(tmp_path / "cache"))


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return Dataset.from_arrays("noise", rng.integers(0, 256, (70, 32, 32, 3), dtype="uint8"), np.arange(70) % 2)


FROZEN = Recipe(
    backbone="resnet10t",
    weights="packaged",
    freeze="backbone",
    image_size=32,
    head=("dense 16", "dropout 0.5"),
    epochs=2,
)


@pytest.mark.parametrize(
    "backbone",
    [
        "torchvision:resnet18",
        "torchvision:mobilenet_v2",
        "torchvision:densenet121",
        "torchvision:convnext_tiny",
        "torchvision:swin_t",
        "torchvision:squeezenet1_1",
        "resnet10t",
        "mobilenetv2_100",
        "vit_tiny_patch16_224",
    ],
)
def test_every_kind_of_backbone_gets_a_head(backbone):
    model = build_model(Recipe(backbone=backbone, image_size=224, head=("dense 8",)), classes=5)
    assert model.eval()(torch.zeros(2, 3, 224, 224)).shape == (2, 5)


def test_the_head_of_the_nature10_study_has_its_published_parameters():
    model = build_model(
        Recipe(
            backbone="torchvision:resnet50",
            image_size=64,
            freeze="backbone",
            head=("dropout 0.5", "dense 128", "dropout 0.3"),
        ),
        classes=10,
    )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 263_562


def test_a_frozen_backbone_changes_in_no_bit(images, tmp_path):
    model = build_model(FROZEN.replace(augment=("flip",)), 2)
    before = weights_hash(model.backbone)
    fit(model, FROZEN.replace(augment=("flip",)), images, Split.holdout(images), folder=tmp_path / "run")
    assert weights_hash(model.backbone) == before


def test_fine_tuning_changes_the_backbone(images, tmp_path):
    recipe = FROZEN.replace(freeze="none")
    model = build_model(recipe, 2)
    before = weights_hash(model.backbone)
    fit(model, recipe, images, Split.holdout(images), folder=tmp_path / "run")
    assert weights_hash(model.backbone) != before


@pytest.mark.parametrize("batch_size", [32, 20, 70])
def test_the_cached_way_equals_the_uncached_bit_for_bit(images, tmp_path, batch_size):
    recipe = FROZEN.replace(batch_size=batch_size)
    split = Split.holdout(images)
    cached = train_recipe(recipe, images, split, folder=tmp_path / "cached")
    model = build_model(recipe, 2)
    uncached = fit(model, recipe, images, split, folder=tmp_path / "uncached")
    assert weights_hash(cached.model) == weights_hash(model.head)
    assert np.array_equal(cached.predictions.probabilities, uncached.predictions.probabilities)
    assert np.allclose(
        predict(load_model(cached, 2), images.images(32), split.rows("validation")),
        cached.predictions.probabilities,
        atol=1e-7,
    )


def test_only_what_changed_is_computed_again(images, monkeypatch):
    computed, original = [], TransferModel._features_of
    monkeypatch.setattr(
        TransferModel, "_features_of", lambda self, part: (computed.append(len(part)), original(self, part))[1]
    )

    def newly_computed(model, dataset, recipe):
        computed.clear()
        features = frozen_features(model, dataset, recipe.image_size, recipe.resize, recipe.preprocess)
        return sum(computed), features

    model = build_model(FROZEN, 2)
    n, first = newly_computed(model, images, FROZEN)
    assert n == 70
    assert newly_computed(model, images, FROZEN)[0] == 0
    n, half = newly_computed(model, images.take(range(69, 30, -1)), FROZEN)
    assert n == 0 and np.array_equal(half, first[69:30:-1])
    assert newly_computed(build_model(FROZEN.replace(head=("dense 4",), seed=5), 2), images, FROZEN)[0] == 0
    array = images.source.array.copy()
    array[3] = 255 - array[3]
    assert newly_computed(model, Dataset.from_arrays("x", array, images.labels), FROZEN)[0] == 1
    assert newly_computed(model, images, FROZEN.replace(image_size=48))[0] == 70
    assert newly_computed(model, images, FROZEN.replace(preprocess=("grayscale",)))[0] == 70
    with torch.no_grad():
        next(model.backbone.parameters())[0] += 1e-3
    assert newly_computed(model, images, FROZEN)[0] == 70


def test_duplicates_of_an_image_are_computed_once(images, monkeypatch):
    model = build_model(FROZEN, 2)
    array = np.concatenate([images.source.array[:10]] * 3)
    features = frozen_features(model, Dataset.from_arrays("copies", array, np.arange(30) % 2), 32)
    assert np.array_equal(features[:10], features[10:20]) and np.array_equal(features[:10], features[20:])


def test_normalisation_is_that_of_the_weights():
    assert build_model(Recipe(backbone="mobilenetv2_100"), 2).info["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert build_model(Recipe(backbone="tf_mobilenetv3_small_100"), 2).info["mean"] == pytest.approx([0.5, 0.5, 0.5])
    assert build_model(Recipe(backbone="resnet10t", weights="packaged"), 2).info["mean"] == pytest.approx(
        [0.5, 0.5, 0.5]
    )


def test_a_header_beats_the_name(tmp_path):
    state = load_file(PACKAGED["resnet10t"])
    save_file(state, tmp_path / "own.safetensors", metadata={"mean": "[0.1, 0.2, 0.3]", "std": "[1, 1, 1]"})
    info = build_model(Recipe(backbone="resnet10t", weights=str(tmp_path / "own.safetensors")), 2).info
    assert info["mean"] == [0.1, 0.2, 0.3] and info["file"] == "own.safetensors" and len(info["sha256"]) == 64


@pytest.mark.parametrize(
    "recipe, message",
    [
        ({"backbone": "resnet10t", "weights": "missing.pth"}, "there is no file missing.pth"),
        ({"backbone": "mobilenetv2_100", "weights": "packaged"}, "only for resnet10t"),
        ({"backbone": "torchvision:resnet49"}, "torchvision has no"),
        ({"backbone": "resnet10tt"}, "did you mean 'resnet10t'"),
        ({"backbone": "keras:MobileNetV2"}, "no torch network"),
        ({"backbone": "baseline_cnn", "weights": "packaged"}, "starts at random"),
        ({"backbone": "vit_tiny_patch16_224", "image_size": 64}, "image_size"),
    ],
)
def test_what_can_not_be_built_says_why(recipe, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_model(Recipe(**recipe), 3)


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for backbone in ("resnet10t", "torchvision:resnet18"):
        with pytest.raises(ValueError, match="other.safetensors does not fit"):
            build_model(Recipe(backbone=backbone, weights=str(tmp_path / "other.safetensors")), 3)


@pytest.mark.parametrize("name", ["notes.txt", "broken.pth", "broken.safetensors", "list.pth"])
def test_files_that_are_no_weights_are_refused_by_name(name, tmp_path):
    (tmp_path / name).write_text("hello")
    if name == "list.pth":
        torch.save([1, 2], tmp_path / name)
    for backbone in ("resnet10t", "torchvision:resnet18"):
        with pytest.raises(ValueError, match=f"^weights: .*{name} is no file of weights: "):
            build_model(Recipe(backbone=backbone, weights=str(tmp_path / name)), 3)


def test_a_folder_is_no_file_of_weights(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(FileNotFoundError, match="^weights: there is no file"):
        build_model(Recipe(backbone="resnet10t", weights=str(tmp_path / "folder.pth")), 3)


def test_an_unknown_network_is_answered_in_a_few_lines():
    for backbone in ("", "nonsense", "torchvision:nonsense"):
        with pytest.raises(ValueError, match="^backbone: .* has no") as error:
            build_model(Recipe(backbone=backbone), 3)
        assert len(str(error.value)) < 2000 and "none" not in str(error.value)


def test_a_head_is_not_put_on_another_backbone(images, tmp_path, monkeypatch):
    run = train_recipe(FROZEN, images, Split.holdout(images), folder=tmp_path / "run")
    state = load_file(PACKAGED["resnet10t"])
    state["conv1.0.weight"] = state["conv1.0.weight"] + 1
    save_file(state, tmp_path / "changed.safetensors", metadata={"mean": "0.5, 0.5, 0.5", "std": "0.5, 0.5, 0.5"})
    monkeypatch.setitem(PACKAGED, "resnet10t", tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match="have changed since this run"):
        load_model(run, 2)


@real_weights
@pytest.mark.parametrize("name", ["mobilenetv2_100", "tf_mobilenetv3_large_minimal_100", "tf_mobilenetv3_small_100"])
def test_real_weights_see_what_is_in_a_photograph(name):
    import timm
    from PIL import Image
    from sklearn.datasets import load_sample_image

    file = WEIGHTS / f"{name}.safetensors"
    backbone = timm_backbone(name, str(file))
    full = timm.create_model(name, checkpoint_path=str(file)).eval()
    image = Image.fromarray(load_sample_image("china.jpg")).resize((224, 224), Image.Resampling.BICUBIC)
    batch = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
    model = TransferModel(backbone, full.get_classifier()).eval()
    with torch.no_grad():
        probabilities = model(batch).softmax(1)[0]
    assert {663, 698} & set(probabilities.topk(5).indices.tolist())  # monastery, palace


@real_weights
def test_torchvision_and_timm_read_one_network_alike():
    file = WEIGHTS / "torchvision" / "squeezenet1_1.safetensors"
    model = build_model(Recipe(backbone="torchvision:squeezenet1_1", weights=str(file), image_size=96), 4)
    assert model.info["sha256"] == "c64ee0f7613d1e1522b079ed86cc4d874b8c3822c26dd1f1f33f4d910c85ae75"


def test_every_block_is_listed_once_in_order():
    for name in ("resnet10t", "mobilenetv2_100", "vit_tiny_patch16_224", "torchvision:resnet18"):
        recipe = Recipe(backbone=name, image_size=224 if "vit" in name else 64)
        model = build_model(recipe, 3)
        blocks = model.blocks()
        listed = [id(weight) for block in blocks for weight in block]
        assert len(listed) == len(set(listed)) == len(list(model.parameters())), name
        assert [id(weight) for weight in blocks[-1]] == [id(weight) for weight in model.head.parameters()]


BLOCKS = {  # the first weight of each block
    "resnet50": ["conv1", "layer1", "layer2", "layer3", "layer4"],
    "efficientnet_b0": [f"features.{n}" for n in range(9)],
    "mobilenet_v2": [f"features.{n}" for n in range(19)],
    "mobilenet_v3_small": [f"features.{n}" for n in range(13)],
    "vgg16": ["features.0", "features.5", "features.10", "features.17", "features.24"],
    "densenet121": ["features.conv0", *(f"features.denseblock{n}" for n in range(1, 5))],
    "convnext_tiny": [f"features.{n}" for n in range(8)],
    "vit_b_16": ["class_token", *(f"encoder.layers.encoder_layer_{n}" for n in range(12))],
    "swin_t": [f"features.{n}" for n in range(8)],
    "shufflenet_v2_x1_0": ["conv1", "stage2", "stage3", "stage4"],
    "mnasnet1_0": ["layers.0", *(f"layers.{n}" for n in range(8, 14))],
    "squeezenet1_1": ["features.0", "features.3", "features.6", "features.9"],
    "maxvit_t": ["stem", *(f"blocks.{n}" for n in range(4))],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_torchvision_networks_have_real_blocks(name):
    "From bottom to top, every weight but those of the last layers in one block."
    import torchvision

    with torch.device("meta"):
        network = torchvision.models.get_model(name)
    blocks, last = torchvision_blocks(network), FAMILIES[type(network).__name__].last
    listed = [weight for block in blocks for weight in block]
    assert listed == [weight for weight, _ in network.named_parameters() if not weight.startswith(f"{last}.")]
    for block, first in zip(blocks, BLOCKS[name], strict=True):
        assert f"{block[0]}.".startswith(f"{first}."), block[0]
    assert len(blocks) > 3


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_of_unknown_structure_are_refused_by_name(name):
    import torchvision

    with torch.device("meta"):
        network = torchvision.models.get_model(name, init_weights=False)
    with pytest.raises(ValueError, match=f"torchvision's {type(network).__name__} are not known"):
        torchvision_blocks(network)


def test_layer_decay_of_a_torchvision_network_falls_block_by_block():
    model = build_model(Recipe(backbone="torchvision:resnet18", image_size=64), 3)
    rates = [group["lr"] for group in parameter_groups(model, 0.1, layer_decay=0.5)]
    assert rates == pytest.approx([0.1 * 0.5**depth for depth in range(6)])


def test_staged_unfreezing_of_a_torchvision_network_moves_its_upper_blocks(images, tmp_path):
    recipe = Recipe(backbone="torchvision:resnet18", image_size=32, epochs=2, freeze="staged 1")
    model = build_model(recipe, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, recipe, images, Split.holdout(images), folder=tmp_path / "run")
    state = load_file(tmp_path / "run" / "last.safetensors")
    changed = {
        name.split(".")[2]
        for name, value in state.items()
        if name.startswith("backbone") and not torch.equal(value, before[name])
    }
    assert changed == {"layer4"}


@pytest.mark.parametrize(
    "backbone",
    ["resnet10t", "mobilenetv2_100", "vit_tiny_patch16_224", "torchvision:densenet121", "torchvision:swin_t"],
)
def test_a_network_has_the_same_name_in_every_process(backbone):
    "Its `repr`, which is part of the name, holds no address."
    assert " at 0x" not in repr(build_model(Recipe(backbone=backbone, image_size=224), 3))


def test_features_are_not_of_other_code(images, monkeypatch, tmp_path):
    "A changed forward pass, in a copy of the package, finds no features that the old one computed."
    from course_ml import provenance

    computed, original = [], TransferModel.frozen_features
    monkeypatch.setattr(
        TransferModel, "frozen_features", lambda self, batch: (computed.append(len(batch)), original(self, batch))[1]
    )
    model, package = build_model(FROZEN, 2), tmp_path / "course_ml"
    frozen_features(model, images, 32)
    shutil.copytree(provenance.package_folder(), package, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    monkeypatch.setattr(provenance, "package_folder", lambda: package)
    computed.clear()
    frozen_features(model, images, 32)
    assert not computed
    file = package / "transfer.py"
    file.write_text(file.read_text().replace("- self.mean) / self.std)[:len(part)]", "- self.mean))[:len(part)]"))
    frozen_features(model, images, 32)
    assert sum(computed) == 70


def test_features_leave_the_model_as_it_was(images):
    model = build_model(FROZEN.replace(freeze="none"), 2).train()
    before = weights_hash(model)
    frozen_features(model, images, 32)
    assert (
        model.training and all(weight.requires_grad for weight in model.parameters()) and weights_hash(model) == before
    )


def test_staged_unfreezing_moves_only_what_is_unfrozen(images, tmp_path):
    "The lowest block must be untouched, batch statistics included, until its turn comes."
    recipe = Recipe(
        backbone="resnet10t", weights="packaged", image_size=32, epochs=2, freeze="staged 1", learning_rate=1e-3
    )
    before = {name: value.clone() for name, value in build_model(recipe, 2).state_dict().items()}
    after = (
        fit(build_model(recipe, 2), recipe, images, Split.holdout(images), folder=tmp_path / "run").folder
        / "last.safetensors"
    )
    changed = {name.split(".")[1] for name, value in load_file(after).items() if not torch.equal(value, before[name])}
    assert changed & {"conv1", "bn1", "layer1", "layer2", "layer3"} == set()
    assert "layer4" in changed


def test_a_schedule_that_unfreezes_is_resumed_to_the_bit(images, tmp_path):
    recipe = Recipe(
        backbone="resnet10t", weights="packaged", image_size=32, epochs=3, freeze="head first 1", layer_decay=0.5
    )
    split = Split.holdout(images)
    whole = fit(build_model(recipe, 2), recipe, images, split, folder=tmp_path / "whole")
    model, train, resumed = build_model(recipe, 2), split.rows("train"), Run(tmp_path / "resumed")
    with resumed.claimed(training_key(model, recipe, images, split)):
        state = Training(model, recipe, images.labels[train], 2, 2, images.items.id.to_numpy(object))
        loader = build_loader(Batches(images.images(32), images.labels, 2))
        for epoch in range(2):
            loader.sampler.items = state.begin_epoch(train, images.labels)
            state.train_epoch(loader)
            state.finish_epoch(whole.history.loc[epoch].to_dict())
        state.save(resumed.folder / "checkpoints")
    resumed = fit(build_model(recipe, 2), recipe, images, split, folder=resumed.folder)
    assert (resumed.folder / "last.safetensors").read_bytes() == (whole.folder / "last.safetensors").read_bytes()
