"""Augmentation, preprocessing and mixing against other implementations, and where a file is left half written."""

import os
import random
import signal
import subprocess
import sys
import time
import types
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from PIL import Image
from torchvision.transforms.v2 import functional

from course_ml import transforms
from course_ml.config import (
    AUGMENTATIONS,
    PREPROCESSING,
    CircularMask,
    Crop,
    Erase,
    Flip,
    Grayscale,
    HighPass,
    Recipe,
    Rotation,
    VerticalFlip,
    Zoom,
)
from course_ml.data import Dataset
from course_ml.provenance import cache_folder
from course_ml.transforms import (
    AUGMENTATION_SETS,
    PREPROCESS,
    affine_maps,
    augment_batch,
    blend,
    foreground,
    gray,
    mix_batch,
    move,
    prepare_images,
    preprocess_image,
    rembg_foreground,
    turn_hue,
)

NUMBERS = {
    "degrees": 30,
    "fraction": 0.3,
    "smallest": 0.5,
    "operations": 2,
    "magnitude": 9,
    "probability": 0.9,
}
STEPS = [kind(*(NUMBERS[field.name] for field in fields(kind))) for kind in AUGMENTATIONS]
IMAGES = torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_ML_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COURSE_ML_PROGRESS", "0")


def smooth_images(n, size=48):
    "Images of a few broad patches, as uint8 (n, size, size, 3)."
    coarse = np.random.default_rng(0).integers(0, 256, (n, 5, 5, 3), dtype="uint8")
    return np.stack(
        [np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC)) for c in coarse]
    )


def make_dataset(n=12):
    return Dataset.from_arrays("patches", smooth_images(n), np.arange(n) % 3)


# Augmentation


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_every_step_changes_something(step):
    changed = augment_batch(IMAGES, (step,), seed=1)
    assert not torch.equal(changed, IMAGES) and changed.shape == IMAGES.shape


@settings(deadline=None, max_examples=60)
@given(
    augment=strategies.lists(strategies.sampled_from(STEPS), max_size=4),
    seed=strategies.integers(0, 2**31 - 1),
    n=strategies.integers(1, 6),
)
def test_a_seed_decides_everything_and_nothing_else_is_touched(augment, seed, n):
    def global_states():
        return torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    images, before = IMAGES[:n].clone(), global_states()
    changed = augment_batch(images, tuple(augment), seed)
    assert global_states() == before and torch.equal(images, IMAGES[:n])
    assert (
        changed.dtype == torch.float32
        and changed.shape == images.shape
        and 0 <= changed.min()
        and changed.max() <= 1
    )
    torch.rand(3)
    assert torch.equal(augment_batch(images, tuple(augment), seed), changed)


def test_other_seeds_give_other_images_and_images_differ_from_each_other():
    same = IMAGES[:1].repeat(8, 1, 1, 1)
    for step in STEPS:
        batches = [augment_batch(same, (step,), seed) for seed in (1, 2)]
        assert not torch.equal(*batches), step
        assert len({image.numpy().tobytes() for image in batches[0]}) > 1, step


def test_the_worker_process_gives_the_same_batch():
    script = (
        "import torch; from course_ml.config import *; from course_ml.transforms import *; "
        "x = torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(0)); "
        f"print(augment_batch(x, {tuple(STEPS)!r}, 5).double().sum().item())"
    )
    preds = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert float(preds) == augment_batch(IMAGES, tuple(STEPS), 5).double().sum().item()


@pytest.mark.parametrize("wrong", ["flip", Grayscale(), 5])
def test_what_is_no_step_is_refused(wrong):
    with pytest.raises(TypeError, match="is no change of colors"):
        augment_batch(IMAGES, (wrong,), 0)


@pytest.mark.parametrize("name", AUGMENTATION_SETS)
def test_every_named_set_is_a_recipe(name):
    augment = Recipe(augment=[str(step) for step in AUGMENTATION_SETS[name]]).augment
    assert augment == AUGMENTATION_SETS[name] and augment_batch(IMAGES, augment, 0).shape == IMAGES.shape


@pytest.mark.parametrize("step, axis", [(Flip(), -1), (VerticalFlip(), -2)])
def test_flips_are_mirror_images_half_the_time(step, axis):
    changed = augment_batch(IMAGES[:1].repeat(200, 1, 1, 1), (step,), 0)
    mirrored = (changed - IMAGES[0].flip(axis)).abs().amax((1, 2, 3)) < 1e-4
    kept = (changed - IMAGES[0]).abs().amax((1, 2, 3)) < 1e-4
    assert (mirrored ^ kept).all() and 70 < mirrored.sum() < 130


def test_turns_are_those_of_torchvision_away_from_the_border():
    images = torch.from_numpy(smooth_images(1)).permute(0, 3, 1, 2).float() / 255
    for turn in affine_maps(Rotation(90), 5):
        angle = np.degrees(np.arctan2(turn[1, 0].item(), turn[0, 0].item()))
        expected = functional.rotate(images, angle, interpolation="bilinear")
        assert (expected - move(images, turn[None]))[..., 16:32, 16:32].abs().max() < 1e-4


def test_a_turn_stays_within_the_angle_asked_for():
    image = torch.zeros(1, 3, 65, 65)
    image[:, :, 32, 40:60] = 1  # a line to the right
    turned = augment_batch(image.repeat(200, 1, 1, 1), (Rotation(30),), 0)[:, 0]
    rows, columns = np.mgrid[-32:33, -32:33]
    angles = [np.degrees(np.arctan2((rows * t).sum(), (columns * t).sum())) for t in turned.numpy()]
    assert 25 < max(map(abs, angles)) <= 31 and abs(np.mean(angles)) < 5


def test_a_crop_has_the_area_and_shape_asked_for_and_lies_inside():
    torch.manual_seed(0)
    maps = affine_maps(Crop(0.5), 2000)
    width, height, center = maps[:, 0, 0], maps[:, 1, 1], maps[:, :2, 2]
    inside = (width < 1) & (height < 1)
    area, ratio = (width * height)[inside], (width / height)[inside]
    assert (
        0.5 <= area.min()
        and (width * height).max() <= 1
        and 0.8 - 1e-4 <= ratio.min()
        and ratio.max() <= 1.2 + 1e-4
    )
    assert (center[:, 0].abs() + width).max() <= 1 + 1e-6 and (center[:, 1].abs() + height).max() <= 1 + 1e-6


def test_a_crop_shows_what_torchvision_cuts_out():
    images = torch.from_numpy(smooth_images(1)).permute(0, 3, 1, 2).float() / 255
    box = torch.tensor(
        [[[0.5, 0, 0.25], [0, 0.75, -0.25], [0, 0, 1]]]
    )  # columns 18 to 42, rows 0 to 36 of 48
    expected = functional.resized_crop(images, 0, 18, 36, 24, [48, 48], antialias=False)
    assert (move(images, box) - expected)[..., 2:-2, 2:-2].abs().max() < 1e-4


def test_movements_are_done_in_their_order():
    torch.manual_seed(0)
    first, second = affine_maps(Zoom(0.2), 6), affine_maps(Rotation(10), 6)
    images = torch.from_numpy(smooth_images(6)).permute(0, 3, 1, 2).float() / 255
    assert (move(images, first @ second) - move(move(images, first), second))[
        ..., 12:36, 12:36
    ].abs().max() < 0.02


@settings(deadline=None, max_examples=40)
@given(
    factor=strategies.floats(0, 2),
    turns=strategies.floats(-0.5, 0.5),
    seed=strategies.integers(0, 1000),
    gray_level=strategies.booleans(),
)
def test_colors_are_those_of_torchvision(factor, turns, seed, gray_level):
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    if gray_level:
        images = images[:, :1].repeat(1, 3, 1, 1)
    factors = torch.full((2,), factor)
    torch.testing.assert_close(
        blend(images, 0.0, factors), functional.adjust_brightness(images, factor), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        blend(images, gray(images).mean((1, 2, 3), keepdim=True), factors),
        functional.adjust_contrast(images, factor),
        atol=1e-5,
        rtol=0,
    )
    torch.testing.assert_close(
        blend(images, gray(images), factors), functional.adjust_saturation(images, factor), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        turn_hue(images, torch.full((2,), turns)), functional.adjust_hue(images, turns), atol=2e-5, rtol=0
    )


def test_erasing_paints_rectangles_as_often_as_asked():
    changed = augment_batch(torch.ones(400, 3, 16, 16), (Erase(0.25),), 0)
    assert 70 < (changed.amin((1, 2, 3)) == 0).sum() < 130


# Preprocessing


@pytest.mark.parametrize("kind", PREPROCESSING)
@pytest.mark.parametrize("size", [4, 8, 33, 96])
def test_every_preprocessing_changes_something_and_keeps_shape_and_type(kind, size):
    image = smooth_images(1, size)[0].copy()
    given = image.copy()
    changed = preprocess_image(image, (kind(),))
    assert changed.shape == (size, size, 3) and changed.dtype == np.uint8
    assert np.array_equal(image, given) and np.array_equal(changed, preprocess_image(image, (kind(),)))
    assert size < 33 or not np.array_equal(changed, image)


@pytest.mark.parametrize("kind", PREPROCESSING)
@pytest.mark.parametrize("value", [0, 130, 255])
def test_an_image_of_one_color_is_no_trouble(kind, value):
    assert preprocess_image(np.full((32, 32, 3), value, "uint8"), (kind(),)).shape == (32, 32, 3)


def test_otsu_finds_the_best_split_of_all():
    values = np.concatenate(
        [np.random.default_rng(0).normal(0, 1, 300), np.random.default_rng(1).normal(6, 2, 100)]
    )

    def within(threshold):
        return sum(
            part.size * part.var() for part in (values[values <= threshold], values[values > threshold])
        )

    assert within(transforms.otsu_threshold(values)) <= 1.01 * min(map(within, np.sort(values)[:-1]))


@pytest.mark.parametrize("colors", [((200, 40, 40), (60, 90, 60)), ((30, 60, 30), (230, 230, 230))])
def test_the_foreground_is_the_disc(colors):
    across = np.linspace(-1, 1, 80)
    disc = np.hypot(across[:, None] - 0.1, across + 0.2) < 0.5
    noise = np.random.default_rng(0).normal(0, 10, (80, 80, 3))
    image = (np.where(disc[..., None], *colors) + noise).clip(0, 255).astype("uint8")
    mask = foreground(image)
    assert (mask & disc).sum() / (mask | disc).sum() > 0.95


def test_rembg_is_asked_for_by_name_and_used_where_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(ImportError, match=r"pip install 'course_ml\[rembg\]'"):
        rembg_foreground(smooth_images(1)[0])

    def remove(image, only_mask):
        return Image.fromarray(np.where(np.asarray(image)[..., 0] > 100, 255, 0).astype("uint8"))

    monkeypatch.setitem(sys.modules, "rembg", types.SimpleNamespace(remove=remove))
    image = smooth_images(1)[0]
    assert np.array_equal(rembg_foreground(image), image[..., 0] > 100)


# The cache


def test_prepared_images_are_computed_once(monkeypatch):
    dataset, steps = make_dataset(), (Grayscale(),)
    first = prepare_images(dataset, 32, "crop", steps)
    assert first.shape == (12, 32, 32, 3)
    assert np.array_equal(first[5], preprocess_image(np.asarray(dataset.images(32)[5]), steps))
    monkeypatch.setitem(PREPROCESS, Grayscale, lambda image: pytest.fail("computed again"))
    assert np.array_equal(prepare_images(dataset, 32, "crop", steps), first)
    assert prepare_images(replace(dataset, name="other name"), 32, "crop", steps).filename == first.filename


def test_other_content_is_another_file():
    dataset, steps = make_dataset(), (Grayscale(), CircularMask())
    wanted = [
        (32, "crop", steps),
        (32, "crop", steps[::-1]),
        (32, "crop", steps[:1]),
        (24, "crop", steps),
        (32, "squash", steps),
    ]
    names = [prepare_images(dataset, *options).filename for options in wanted]
    names.append(prepare_images(dataset.take(range(6)), 32, "crop", steps).filename)
    assert len(set(names)) == 6
    assert prepare_images(dataset, 32, "crop").filename == dataset.images(32).filename


def test_a_failure_leaves_no_file(monkeypatch):
    dataset = make_dataset()
    dataset.images(32)

    def fail(image):
        raise RuntimeError("in the middle")

    monkeypatch.setitem(PREPROCESS, HighPass, fail)
    with pytest.raises(RuntimeError):
        prepare_images(dataset, 32, "crop", (HighPass(),))
    assert len(list((cache_folder() / "images").glob("[!.]*.npy"))) == 1


def test_a_killed_process_leaves_nothing_that_is_used(tmp_path):
    script = f"""
import sys, time
sys.path[:0] = [{str(Path(__file__).parent)!r}]
import test_transforms as t
original = t.transforms.grayscale
def slow(image):
    time.sleep(.2)
    return original(image)
t.PREPROCESS[t.Grayscale] = slow
t.prepare_images(t.make_dataset(200), 32, "crop", (t.Grayscale(),))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    folder, deadline = cache_folder() / "images", time.monotonic() + 120
    while (
        not (folder.exists() and len(list(folder.glob(".*.npy"))) and len(list(folder.glob("[!.]*.npy"))))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert len(list(folder.glob("[!.]*.npy"))) == 1, "only the decoded images are whole"
    dataset = make_dataset(200)
    images = prepare_images(dataset, 32, "crop", (Grayscale(),))
    assert np.array_equal(images[199], preprocess_image(np.asarray(dataset.images(32)[199]), (Grayscale(),)))


# Mixing


@settings(deadline=None, max_examples=60)
@given(
    n=strategies.integers(1, 9),
    mixup=strategies.sampled_from([0.0, 0.2, 1.0]),
    cutmix=strategies.sampled_from([0.0, 0.1, 1.0]),
    seed=strategies.integers(0, 2**31 - 1),
)
def test_mixed_images_and_targets_follow_their_formula(n, mixup, cutmix, seed):
    images, labels = torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(n)), torch.arange(n) % 9
    given, state = images.clone(), np.random.get_state()[1].copy()
    mixed, targets = mix_batch(images, labels, 9, mixup, cutmix, seed)
    again = mix_batch(images, labels, 9, mixup, cutmix, seed)
    assert torch.equal(mixed, again[0]) and torch.equal(targets, again[1])
    assert np.array_equal(np.random.get_state()[1], state)
    assert torch.equal(images, given) and targets.dtype == torch.float32 and targets.shape == (n, 9)
    torch.testing.assert_close(targets.sum(1), torch.ones(n))

    whole_targets = torch.nn.functional.one_hot(labels, 9).float()
    even = n // 2 * 2
    assert torch.equal(mixed[even:], images[even:])
    torch.testing.assert_close(targets[even:], whole_targets[even:])
    if not mixup and not cutmix or not even:
        return
    differing = images[:even] - images[:even].flip(0)
    share = (((mixed[:even] - images[:even].flip(0)) * differing).sum() / differing.square().sum()).item()
    whole = (mixed[0] == images[0]).all(0)
    if (whole | (mixed[0] == images[even - 1]).all(0)).all():
        share = whole.float().mean().item()  # CutMix: the area that is left
    else:
        expected = share * images[:even] + (1 - share) * images[:even].flip(0)
        torch.testing.assert_close(mixed[:even], expected, atol=1e-4, rtol=0)
    expected = share * whole_targets[:even] + (1 - share) * whole_targets[:even].flip(0)
    torch.testing.assert_close(targets[:even], expected, atol=1e-3, rtol=0)


def test_both_kinds_of_mixing_come_when_both_are_asked_for():
    images, labels = torch.rand(4, 3, 12, 12), torch.arange(4)

    def is_cut(seed):
        mixed, _ = mix_batch(images, labels, 4, 1.0, 1.0, seed)
        return bool(((mixed == images) | (mixed == images.flip(0))).all())

    assert 5 < sum(map(is_cut, range(40))) < 35
