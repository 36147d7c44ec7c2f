"""Recipes: every range and contradiction, round trips for any recipe, and one hash however a recipe was written."""

import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, reject, settings, strategies

from course_ml import config
from course_ml.baselines import CNNS
from course_ml.config import (
    AUGMENTATIONS,
    CHOICES,
    CNN_NAMES,
    CONTRADICTIONS,
    FREEZING,
    HEAD_LAYERS,
    LAYERS,
    PARTS,
    PREPROCESSING,
    RANGES,
    RENAMED,
    BatchNorm,
    Dense,
    Dropout,
    Flip,
    HeadFirst,
    HeadOnly,
    Recipe,
    Rotation,
    TrainAll,
    Unfreeze,
    parse_spec,
    parse_specs,
    read_changes,
)
from course_ml.recipes import RECIPES

KINDS = (*AUGMENTATIONS, *PREPROCESSING, *LAYERS, *FREEZING)


def numbers_of(limits):
    "Any number that a range allows."
    high = min(limits.high, 1e6) - (1e-9 if limits.below else 0)
    if limits.whole:
        return strategies.integers(int(limits.low), int(high))
    return strategies.floats(limits.low, high)


def parts_of(kinds):
    "Any part of the kinds."

    def build(kind):
        return strategies.builds(kind, *(numbers_of(f.metadata["range"]) for f in dataclasses.fields(kind)))

    return strategies.one_of([build(kind) for kind in kinds])


# Parts and specs


@settings(deadline=None, max_examples=300)
@given(step=parts_of(KINDS))
def test_a_spec_gives_its_part_back(step):
    kinds = next(kinds for kinds in (AUGMENTATIONS, PREPROCESSING, LAYERS, FREEZING) if type(step) in kinds)
    again = parse_spec(str(step), kinds, "field")
    assert again == step and hash(again) == hash(step) and str(again) == str(step)
    assert parse_spec(step, kinds, "field") is step


@pytest.mark.parametrize(
    "spec, kinds, message",
    [
        (
            "dens 128",
            HEAD_LAYERS,
            "field: 'dens 128' is none of 'dense UNITS', 'dropout RATE', 'batch norm'; did you mean 'dense 128'?",
        ),
        ("rotation", AUGMENTATIONS, "did you mean 'rotation DEGREES'?"),
        (
            "rotation 9999",
            AUGMENTATIONS,
            "field: 'rotation 9999': degrees must be a number from 0 to 180, not 9999",
        ),
        ("erase 7", AUGMENTATIONS, "field: 'erase 7': probability must be a number from 0 to 1, not 7"),
        ("colors 0.2", AUGMENTATIONS, "did you mean 'color 0.2'?"),
        ("flip 2", AUGMENTATIONS, "did you mean 'flip'?"),
        ("random augment 2", AUGMENTATIONS, "did you mean 'random augment OPERATIONS MAGNITUDE'?"),
        ("random augment 1.5 9", AUGMENTATIONS, "operations must be a whole number from 1 to 14, not 1.5"),
        ("zoom 1", AUGMENTATIONS, "fraction must be a number from 0 to 0.9"),
        ("crop 0", AUGMENTATIONS, "smallest must be a number from 0.01 to 1"),
        ("gray scale", PREPROCESSING, "did you mean 'grayscale'?"),
        ("sepia", PREPROCESSING, "is none of 'grayscale'"),
        ("dropout 1", LAYERS, "rate must be a number from 0 to below 1, not 1"),
        ("conv 0", LAYERS, "filters must be a whole number of at least 1"),
        ("conv 3.5", LAYERS, "filters must be a whole number"),
        ("conv32", LAYERS, "is none of 'conv FILTERS'"),
        ("", LAYERS, "is none of"),
        ("staged -3", FREEZING, "field: 'staged -3': every must be a whole number of at least 1, not -3"),
        ("head first", FREEZING, "did you mean 'head first EPOCHS'?"),
        (5, LAYERS, "field: 5 is none of"),
        (None, LAYERS, "field: None is none of"),
        (Rotation(20), LAYERS, "is none of 'conv FILTERS'"),
        ("dropout nan", LAYERS, "is none of"),
    ],
)
def test_wrong_specs_are_refused(spec, kinds, message):
    with pytest.raises(ValueError) as error:
        parse_spec(spec, kinds, "field")
    assert message in str(error.value) and str(error.value).startswith("field: ")


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_out_of_range_are_refused(kind):
    fields = dataclasses.fields(kind)
    fine = [field.metadata["range"].low for field in fields]
    for position, field in enumerate(fields):
        limits = field.metadata["range"]
        above, between = [limits.high + 1] if limits.high < 1e9 else [], [1.5] if limits.whole else []
        for wrong in (limits.low - 1, float("nan"), float("inf"), True, "1", None, *above, *between):
            with pytest.raises(ValueError, match=f"^{field.name} must be a"):
                kind(*fine[:position], wrong, *fine[position + 1 :])


def test_blocks_learn_from_the_head_downwards():
    for freeze in (TrainAll(), HeadOnly(), HeadFirst(3), Unfreeze(2)):
        counts = [freeze.trainable_blocks(epoch, 5) for epoch in range(20)]
        assert counts == sorted(counts) and 1 <= counts[0] and counts[-1] <= 5
    assert [Unfreeze(3).trainable_blocks(epoch, 9) for epoch in (0, 2, 3, 5, 6)] == [1, 1, 2, 2, 3]


# Fields

FINE = {"weights": "none", "metadata": "", "backbone": "baseline_cnn", "compile": False, "chosen_on": ""}


@pytest.mark.parametrize("field", RANGES)
def test_ranges_of_fields(field):
    limits = RANGES[field]
    wrong = [limits.low - 1, float("nan"), float("inf"), float("-inf"), True, "many", None, [1]]
    if limits.high < 1e12:
        wrong.append(limits.high + 1)
    if limits.below:
        wrong.append(limits.high)
    wrong.append(limits.low + 0.5 if limits.whole else -1e-9)
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{field} must be a"):
            Recipe(**{field: value})


@pytest.mark.parametrize("field", CHOICES)
def test_choices_of_fields(field):
    for wrong in ("", "nothing", None, 1, True, (CHOICES[field][0],)):
        with pytest.raises(ValueError, match=f"^{field} must be one of {CHOICES[field][0]}, "):
            Recipe(**{field: wrong})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer": "adamm"}, "did you mean 'adam'"),
        ({"class_weights": "normalize"}, "did you mean 'normalized'"),
        ({"augment": 5}, "augment must be a list of any of 'flip'"),
        ({"augment": "flip"}, "augment must be a list"),
        ({"head": None}, "head must be a list"),
        ({"head": ("conv 32",)}, "head: 'conv 32' is none of 'dense UNITS'"),
        ({"head": (Flip(),)}, "head: Flip"),
        ({"backbone": None}, "backbone must be a string"),
        ({"weights": 3}, "weights must be a string"),
        ({"metadata": True}, "metadata must be a string"),
        ({"compile": 1}, "compile must be True or False"),
        ({"freeze": None}, "freeze: None is none of 'none'"),
    ],
)
def test_other_fields(changes, message):
    with pytest.raises(ValueError) as error:
        Recipe(**changes)
    assert message in str(error.value)


def test_every_field_is_checked_in_one_way():
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert fields == {*RANGES, *CHOICES, *PARTS, *FINE, "freeze"}
    assert set(RENAMED.values()) <= fields and not set(RENAMED) & fields


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_old_names_are_answered_with_the_new_ones(old, new):
    for make in (
        lambda: Recipe(**{old: 1}),
        lambda: Recipe().replace(**{old: 1}),
        lambda: Recipe.from_yaml(f"{old}: 1"),
    ):
        with pytest.raises(ValueError, match=f"no field '{old}'; it is called '{new}'"):
            make()


# Contradictions: each row has one, and is fine without its last change

KERAS = {"framework": "keras"}
FROZEN = {"backbone": "resnet50", "freeze": "backbone"}
WRONG = [
    (0, {}, {"backbone": "keras:ResNet50"}),
    (0, {}, {"backbone": "hub:resnet50"}),
    (1, KERAS, {"backbone": "resnet50"}),
    (1, KERAS, {"backbone": "torchvision:resnet50"}),
    (2, {"backbone": "resnet50"}, {"weights": "hubb"}),
    (2, {"backbone": "resnet50"}, {"weights": ""}),
    (3, {}, {"weights": "packaged"}),
    (3, {}, {"weights": "hub"}),
    (3, {}, {"weights": "own/file.pth"}),
    (4, {"backbone": "resnet50"}, {"weights": "own.h5"}),
    (5, {}, {"freeze": "backbone"}),
    (5, {}, {"freeze": "staged 3"}),
    (6, {}, {"layer_decay": 0.5}),
    (7, FROZEN, {"layer_decay": 0.5}),
    (8, {"backbone": "resnet50"}, {"metadata": "habitat"}),
    (8, FROZEN, {"metadata": "habitat", "augment": ["flip"]}),
    (8, FROZEN, {"metadata": "habitat", "mixup": 0.2}),
    (8, FROZEN, {"metadata": "habitat", "cutmix": 0.2}),
    (9, {}, {"min_lr": 1e-5}),
    (9, {"schedule": "one-cycle"}, {"min_lr": 1e-5}),
    (10, {"schedule": "cosine"}, {"min_lr": 1.0}),
    (11, {"schedule": "cosine"}, {"learning_rate": 0.0}),
    (11, {"schedule": "one-cycle"}, {"learning_rate": 0.0}),
    (12, {"schedule": "plateau"}, {"warmup_epochs": 1}),
    (12, {"schedule": "one-cycle"}, {"warmup_epochs": 1}),
    (13, {"epochs": 2}, {"warmup_epochs": 3}),
    (14, {"backbone": "resnet50", "epochs": 2}, {"freeze": "head first 2"}),
    (14, {"backbone": "resnet50", "epochs": 2}, {"freeze": "staged 2"}),
    (15, KERAS | {"backbone": "keras:ResNet50"}, {"weights": "packaged"}),
    (16, KERAS | {"backbone": "keras:ResNet50"}, {"weights": "own.pth"}),
    (17, KERAS, {"ema_decay": 0.9}),
    (18, KERAS | {"backbone": "keras:ResNet50"}, {"layer_decay": 0.5}),
    (19, KERAS | {"backbone": "keras:ResNet50", "freeze": "backbone"}, {"metadata": "habitat"}),
    (20, KERAS | {"schedule": "cosine"}, {"min_lr": 1e-5}),
    (21, KERAS, {"compile": True}),
    (22, KERAS, {"precision": "bf16"}),
    (22, KERAS, {"precision": "auto"}),
    (23, KERAS | {"backbone": "keras:ResNet50"}, {"freeze": "staged 3"}),
    (24, KERAS, {"augment": ["flip", "trivial augment"]}),
    (25, KERAS, {"optimizer": "ranger"}),
    (26, KERAS, {"schedule": "one-cycle"}),
    (27, KERAS, {"weight_decay": 0.1}),
    (27, KERAS | {"optimizer": "sgd"}, {"weight_decay": 0.1}),
    (28, KERAS | {"label_smoothing": 0.1}, {"focal_gamma": 2.0}),
    (29, {"batch_size": 1}, {"mixup": 0.2}),
    (29, {"batch_size": 1}, {"cutmix": 0.2}),
    (30, {"batch_size": 1}, {"head": ["dense 8", "batch norm"]}),
    (31, {"schedule": "plateau"}, {"patience": 3}),
    (32, FROZEN, {"metadata": "label"}),
]


@pytest.mark.parametrize("number, before, change", WRONG)
def test_contradictions_are_refused_by_name(number, before, change):
    fine, contradiction = Recipe(**before), CONTRADICTIONS[number]
    with pytest.raises(ValueError, match=f"^{contradiction.fields[0]}: "):
        fine.replace(**change)
    broken = object.__new__(Recipe)
    vars(broken).update(
        vars(fine)
        | {name: config._parse_field(name, value, vars(Recipe())[name]) for name, value in change.items()}
    )
    first = next(position for position, one in enumerate(CONTRADICTIONS) if one.found(broken))
    assert first == number, "another row of the table found it"


def test_every_contradiction_is_tested():
    assert {number for number, *_ in WRONG} == set(range(len(CONTRADICTIONS)))
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert all(set(contradiction.fields) <= fields for contradiction in CONTRADICTIONS)


@pytest.mark.parametrize(
    "weights", ["own.safetensors", "folder/weights", "~/x.pth", "C:\\own.pt", "../a.b/c"]
)
def test_paths_of_weights_are_taken(weights):
    assert Recipe(backbone="resnet50", weights=weights).weights == weights


def test_names_of_the_small_networks_are_those_of_lesson_02():
    assert tuple(CNNS) == CNN_NAMES


def test_what_meets_machine_and_data():
    Recipe(precision="fp16").check_machine("cuda")
    Recipe(precision="bf16").check_machine("cpu")
    for device in ("cpu", "mps"):
        with pytest.raises(ValueError, match="precision: fp16 needs a GPU"):
            Recipe(precision="fp16").check_machine(device)
    recipe = Recipe(backbone="resnet10t", freeze="backbone", metadata="habitat")
    recipe.check_data(["id", "habitat"])
    Recipe().check_data([])
    with pytest.raises(ValueError, match="metadata: the data set has no column 'habitat'; it has id, label"):
        recipe.check_data(["id", "label"])


# Round trips


def recipes():
    "Any recipe without a contradiction."
    coupled = ("min_lr", "warmup_epochs", "layer_decay")  # whose values depend on others
    values = {name: numbers_of(limits) for name, limits in RANGES.items() if name not in coupled}
    values |= {
        name: strategies.sampled_from(choices) for name, choices in CHOICES.items() if name != "framework"
    }
    values |= {
        name: strategies.lists(parts_of(kinds), max_size=4).map(tuple) for name, kinds in PARTS.items()
    }
    values |= {
        "learning_rate": strategies.floats(1e-9, 10),
        "compile": strategies.booleans(),
        "backbone": strategies.sampled_from([*CNN_NAMES, "resnet50"]),
    }
    return strategies.fixed_dictionaries({}, optional=values).map(made_or_rejected)


def made_or_rejected(fields):
    "Make a recipe; have hypothesis look for another one where the fields contradict each other."
    try:
        return Recipe(**fields)
    except ValueError:
        reject()


@settings(deadline=None, max_examples=150)
@given(recipe=recipes())
def test_any_recipe_survives_its_yaml_however_it_is_written(recipe):
    for again in (
        Recipe.from_yaml(recipe.to_yaml()),
        Recipe(**recipe.to_dict()),
        recipe.replace(),
        pickle.loads(pickle.dumps(recipe)),
    ):
        assert again == recipe and hash(again) == hash(recipe)
        assert again.hash == recipe.hash and again.to_yaml() == recipe.to_yaml()
    changes = read_changes(
        [f"{name}={value}" for name, value in recipe.to_dict().items() if isinstance(value, (int, float))]
    )
    assert recipe.replace(**changes) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_survive_their_yaml(name):
    assert Recipe.from_yaml(RECIPES[name].to_yaml()) == RECIPES[name]
    assert Recipe.from_yaml(RECIPES[name].to_yaml()).hash == RECIPES[name].hash


@pytest.mark.parametrize(
    "one, other",
    [
        ({"epochs": 5, "weight_decay": 0}, {"epochs": np.int64(5), "weight_decay": 0.0}),
        ({"learning_rate": np.float64(0.01)}, {"learning_rate": 0.01}),
        ({"weight_decay": -0.0}, {"weight_decay": 0.0}),
        ({"augment": ["rotation 20"]}, {"augment": (Rotation(20),)}),
        ({"augment": ["rotation 20.0"]}, {"augment": (Rotation(20.0),)}),
        ({"augment": [" crop   .8"]}, {"augment": ["crop 0.8"]}),
        ({"head": ["dense 8", "dropout .5", "batch norm"]}, {"head": (Dense(8), Dropout(0.5), BatchNorm())}),
        (
            {"backbone": "resnet50", "freeze": "staged 3"},
            {"backbone": "resnet50", "freeze": Unfreeze(every=3)},
        ),
        ({"freeze": "none"}, {"freeze": TrainAll()}),
    ],
)
def test_the_hash_does_not_depend_on_how_a_recipe_was_written(one, other):
    one, other = Recipe(**one), Recipe(**other)
    assert one == other and one.hash == other.hash and one.to_yaml() == other.to_yaml()


def test_every_field_is_in_the_hash():
    plain = Recipe(backbone="resnet50", schedule="cosine")
    other = {
        "framework": "keras",
        "backbone": "resnet18",
        "weights": "hub",
        "head": ["dense 8"],
        "metadata": "place",
        "freeze": "staged 2",
        "resize": "squash",
        "preprocess": ["grayscale"],
        "augment": ["flip"],
        "sampling": "balanced",
        "class_weights": "inverse",
        "optimizer": "sgd",
        "schedule": "plateau",
        "monitor": "accuracy",
        "keep_epoch": "last",
        "chosen_on": "0123456789abcdef",
        "precision": "bf16",
        "compile": True,
        **{name: 3 if limits.whole else 0.5 for name, limits in RANGES.items()},
    }
    hashes = [plain.hash]
    for field in dataclasses.fields(Recipe):
        changed = object.__new__(Recipe)
        vars(changed).update(
            vars(plain) | {field.name: config._parse_field(field.name, other[field.name], field.default)}
        )
        hashes.append(changed.hash)
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    "text, message",
    [
        ("- epochs", "has lines FIELD: VALUE"),
        ("just words", "has lines FIELD: VALUE"),
        ("epoch: 3", "did you mean 'epochs'"),
        ("3: 4", "no field '3'"),
        ("epochs: 3\nepochs: 4", "epochs is given twice"),
        ("augment: [flip", "this is no YAML"),
        ("\t", "this is no YAML"),
        ("? [epochs]\n: 3", "this is no YAML"),
        ("epochs: !!python/name:os.system", "this is no YAML"),
    ],
)
def test_other_yaml_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_yaml(text)


@pytest.mark.parametrize("name", ["2019", "1e3", "yes", "null", "a: b", "- a"])
def test_a_string_that_looks_like_something_else_survives_its_yaml(name):
    recipe = Recipe(backbone="resnet50", freeze="backbone", metadata=name)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_an_empty_file_is_the_default():
    assert Recipe.from_yaml("") == Recipe()


def test_it_loads_without_the_frameworks():
    heavy = {"torch", "keras", "tensorflow", "numpy", "pandas", "sklearn", "matplotlib"}
    code = f"import sys, course_ml.config; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_lists_of_specs():
    assert parse_specs([], LAYERS, "head") == () and parse_specs(("dense 1", Dense(2)), LAYERS, "head") == (
        Dense(1),
        Dense(2),
    )
