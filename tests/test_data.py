"""Folders as people have them, and splits of any shape."""
import io
import zipfile
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies
from PIL import Image
from torchvision.datasets import ImageFolder

from course_ml.decoding import UnreadableImage
from course_ml.data import Dataset, Split, assign_groups, near_pairs
from course_ml.predictions import Predictions
from course_ml.readers import export_image_folder, read_dataset


def make_image(seed, size=(40, 30), mode="RGB"):
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, *channels), dtype="uint8")
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def trouble(tmp_path):
    "Two classes of ten images; a JPEG cut off, a text named .png, an empty file, a class of one, one image under two labels."
    folder = tmp_path / "images"
    for c, name in enumerate(("birds", "fish")):
        (folder / name).mkdir(parents=True)
        for i in range(10): make_image(100 * c + i).save(folder / name / f"{i}.jpg", quality=95)
    (folder / "birds" / "cut.jpg").write_bytes((folder / "birds" / "3.jpg").read_bytes()[:-400])
    (folder / "birds" / "text.png").write_text("not an image")
    (folder / "fish" / "empty.webp").touch()
    (folder / "fish" / "twin.jpg").write_bytes((folder / "birds" / "0.jpg").read_bytes())
    (folder / "snails").mkdir()
    make_image(999).save(folder / "snails" / "only.png")
    return folder


def test_check_says_exactly_what_is_there(trouble):
    found = read_dataset(trouble).check()
    reasons = found.quarantine.set_index("id").reason
    assert set(reasons.index) == {"birds/cut.jpg", "birds/text.png", "fish/empty.webp"}
    assert reasons["birds/cut.jpg"].startswith("damaged") and "not an image" in reasons["birds/text.png"] and "empty" in reasons["fish/empty.webp"]
    exact = found.duplicates[found.duplicates.kind == "exact"]
    assert exact[["id", "other", "same_label"]].values.tolist() == [["birds/0.jpg", "fish/twin.jpg", False]]
    assert found.counts.set_index("class").images.to_dict() == {"birds": 12, "fish": 12, "snails": 1}


def test_unreadable_images_are_named_and_never_replaced(trouble):
    dataset = read_dataset(trouble)
    with pytest.raises(UnreadableImage, match="birds/cut.jpg"): dataset.images(32)
    clean = dataset.without(dataset.check().quarantine)
    assert len(clean.images(32)) == len(clean) == 22 and len(clean.skipped) == 3


def test_a_class_of_one_is_refused_with_its_name(trouble):
    dataset = read_dataset(trouble)
    dataset = dataset.without(dataset.check().quarantine)
    with pytest.raises(ValueError, match="'snails' has 1"): Split.holdout(dataset)
    assert Split.holdout(dataset.drop_classes(["snails"])).counts(dataset.drop_classes(["snails"])).shape == (2, 3)


def test_both_copies_land_in_one_part(trouble):
    dataset = read_dataset(trouble)
    check = dataset.check()
    dataset = dataset.without(check.quarantine).drop_classes(["snails"]).grouped(check.duplicates[check.duplicates.kind == "exact"])
    for seed in range(20):
        part = dict(zip(dataset.items.id, Split.holdout(dataset, seed=seed).splits))
        assert part["birds/0.jpg"] == part["fish/twin.jpg"]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_formats_and_modes(tmp_path, suffix, mode):
    image = make_image(5, mode="RGB" if mode == "P" else mode)
    if mode == "P": image = image.quantize(64)
    if suffix in ("jpg", "webp") and mode in ("RGBA", "P"): image = image.convert("RGB")
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        image.save(tmp_path / "set" / name / f"x.{suffix}")
    images = read_dataset(tmp_path / "set").images(24)
    assert images.shape == (2, 24, 24, 3) and images.std() > 10


def test_sixteen_bits_keep_their_image(tmp_path):
    ramp = (np.linspace(0, 65535, 64 * 64).reshape(64, 64)).astype("uint16")
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.fromarray(ramp).save(tmp_path / "set" / name / "ramp.png")
    gray = read_dataset(tmp_path / "set").images(64)[0, ..., 0].astype(float)
    assert np.corrcoef(gray.ravel(), ramp.ravel())[0, 1] > .9999 and gray.max() == 255 and gray.min() == 0


def test_phone_orientation_is_applied(tmp_path):
    image, exif = Image.new("RGB", (20, 10), "red"), Image.Exif()
    exif[0x0112] = 6
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        image.save(tmp_path / "set" / name / "turned.jpg", exif=exif)
    sizes = read_dataset(tmp_path / "set").check().sizes
    assert (sizes.width[0], sizes.height[0]) == (10, 20)


def make_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in members.items():
            file = io.BytesIO()
            image.save(file, "PNG")
            archive.writestr(name, file.getvalue())


def test_the_same_images_by_folder_zip_csv_and_npz_have_the_same_pixels(tmp_path):
    images = {f"{c}/{i}.png": make_image(50 * "ab".index(c) + i, (32, 32)) for c in "ab" for i in range(4)}
    for name, image in images.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "folder" / name)
    make_zip(tmp_path / "archive.zip", {f"root/{n}": i for n, i in images.items()})
    table = pd.DataFrame({"file": list(images), "label": [n[0] for n in images]})
    (tmp_path / "table").mkdir()
    table.to_csv(tmp_path / "table" / "train.csv", index=False)
    make_zip(tmp_path / "table" / "train.zip", {f"train/{n}": i for n, i in images.items()})
    np.savez(tmp_path / "arrays.npz", images=np.stack([np.asarray(i) for i in images.values()]), labels=np.array([n[0] for n in images]))
    sets = [read_dataset(tmp_path / p) for p in ("folder", "archive.zip", "table", "table/train.csv", "arrays.npz")]
    for dataset in sets:
        assert dataset.classes == ["a", "b"] and list(dataset.labels) == [0] * 4 + [1] * 4
        assert np.array_equal(dataset.images(32), sets[0].images(32))


@pytest.mark.parametrize("content, message", [
    ("photo,label\na.png,x", "no column for the image"),
    ("file,color,shape\na.png,x,y", "no column for the label"),
    ("file,label\nnowhere.png,x", "none of the files"),
    ("file,label\na.png,x\na.png,y", "stands in more than one row"),
])
def test_tables_that_can_not_be_read_say_why(tmp_path, content, message):
    make_image(1).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ValueError, match=message): read_dataset(tmp_path / "t.csv")


def test_exported_folders_are_read_by_torchvision(trouble, tmp_path):
    dataset = read_dataset(trouble)
    dataset = dataset.without(dataset.check().quarantine).drop_classes(["snails"])
    split = Split.holdout(dataset, seed=2)
    export_image_folder(dataset, split, tmp_path / "out")
    for part in ("train", "validation", "test"):
        assert ImageFolder(tmp_path / "out" / part).classes == ["birds", "fish"]
        assert len(ImageFolder(tmp_path / "out" / part)) == len(split.rows(part))
    with pytest.raises(FileExistsError): export_image_folder(dataset, split, tmp_path / "out")


cases = strategies.lists(strategies.tuples(strategies.integers(0, 3), strategies.integers(0, 40)), min_size=1, max_size=200)


@settings(deadline=None)
@given(cases, strategies.integers(2, 5), strategies.integers(0, 5))
def test_groups_are_never_split(rows, parts, seed):
    labels, groups = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    part = assign_groups(labels, groups, [1 / parts] * parts, seed)
    assert pd.Series(part).groupby(groups).nunique().max() == 1


@settings(deadline=None)
@given(strategies.lists(strategies.integers(3, 60), min_size=2, max_size=6), strategies.integers(0, 100))
def test_without_groups_the_split_is_stratified_to_one_image(counts, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    part = assign_groups(labels, np.arange(len(labels)), [.7, .15, .15], seed)
    table = pd.crosstab(part, labels).reindex(range(3), fill_value=0).to_numpy()
    assert abs(table - np.outer([.7, .15, .15], counts)).max() <= 1.01


def test_80_20_of_the_nature10_study():
    labels = np.repeat(np.arange(10), [1000] * 2 + [1010] + [1000] * 7)
    part = assign_groups(labels, np.arange(10_010), [.8, .2], 0)
    assert np.bincount(labels[part == 1]).tolist() == [200, 200, 202] + [200] * 7


@given(strategies.lists(strategies.integers(0, 2**64 - 1), min_size=2, max_size=40), strategies.integers(0, 20))
def test_near_pairs_equal_the_plain_double_loop(values, distance):
    bits = np.array(values, dtype="uint64")
    expected = [(i, j) for i in range(len(values)) for j in range(i + 1, len(values)) if (values[i] ^ values[j]).bit_count() <= distance]
    assert sorted(map(tuple, near_pairs(bits, distance, block=7)[:, :2].tolist())) == expected


def test_a_damaged_cache_of_another_data_set_is_never_used(tmp_path):
    first = Dataset.from_arrays("a", np.zeros((2, 8, 8, 3), "uint8"), [0, 1])
    second = replace(first, source=type(first.source)(np.ones((2, 8, 8, 3), "uint8")))
    assert first.images(4).max() == 0 and second.images(4).min() == 1


def test_predictions_survive_class_names_of_all_kinds(tmp_path):
    preds = Predictions.make(["x"], [1], [[.25, .75]], ["id", "fold, “quoted”"], data_fingerprint="f")
    preds.save(tmp_path / "p.parquet")
    assert Predictions.load(tmp_path / "p.parquet").table.equals(preds.table)
