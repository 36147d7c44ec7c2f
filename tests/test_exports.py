"Exported data sets: as many files as images, names that every system keeps, and nothing lost."

import os
import re
import tempfile
import unicodedata
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings, strategies
from PIL import Image
from torchvision.datasets import ImageFolder

from course_ml.data import Dataset, Split
from course_ml.decoding import UnreadableImage
from course_ml.exports import export_csv, export_image_folder, export_npz, safe_names
from course_ml.image_sources import FolderImages
from course_ml.readers import read_dataset

letters = strategies.characters(exclude_characters="\0\r\n", exclude_categories=["Cs"])
names = strategies.lists(strategies.text(letters, min_size=1, max_size=8), min_size=1, max_size=12, unique=True)
tricky = ["C+", "C#", "c#", "Cat", "cat", "CAT", "a/b", "a:b", "a_b", "a", "a.png", "A.png", "con", "NUL.txt", "..",
          "\u00e9", "e\u0301"]


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def noise(n, size=4):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype="uint8")


@given(names)
@example(tricky)
@example(["x" * 300 + "1", "x" * 300 + "2"])
@example([" ", ".", "-", "\u2028", "\udc80"])
def test_safe_names_differ_on_every_system(names):
    safe = safe_names(names)
    assert len({unicodedata.normalize("NFC", name).casefold() for name in safe}) == len(names)
    for name in safe:
        assert name == name.strip(" ") and not name.startswith((".", "-")) and not name.endswith(".")
        assert name and not re.search(r'[\x00-\x1f<>:"/\\|?*]', name) and len(name.encode()) < 150
        assert name.split(".")[0].lower() not in {"con", "prn", "aux", "nul", "com1", "lpt9"}


@settings(deadline=None, max_examples=40)
@given(names, strategies.data())
@example(tricky, None)
def test_exports_have_a_file_for_each_image_and_give_back_ids_and_classes(names, data):
    labels = [names[0]] * len(names) if data is None else data.draw(strategies.lists(
        strategies.sampled_from(names), min_size=len(names), max_size=len(names)))
    dataset = Dataset.from_arrays("set", noise(len(names)), labels, ids=names)
    split = Split(names, ["train", "test"] * (len(names) // 2) + ["train"] * (len(names) % 2), names)
    with tempfile.TemporaryDirectory() as place:
        for folder in (export_image_folder(dataset, split, f"{place}/folders"), export_csv(dataset, f"{place}/table")):
            table = pd.read_csv(folder / "labels.csv", dtype=str, keep_default_na=False)
            assert files_below(folder) == {*table.file, "labels.csv"}
            assert len({file.casefold() for file in table.file}) == len(names)
            assert list(table.id) == names and list(table.label) == labels
            for file, image in zip(table.file, dataset.source.array):
                assert np.array_equal(np.asarray(Image.open(folder / file)), image)


def test_classes_that_look_alike_stay_apart(tmp_path):
    classes = ["C+", "C#", "Cat", "cat", "a/b", "a:b"]
    dataset = Dataset.from_arrays("set", noise(30), classes * 5)
    split = Split.holdout(dataset, .6, .2, .2)
    folder = export_image_folder(dataset, split, tmp_path / "folders")
    for name in ("train", "validation", "test"):
        exported = ImageFolder(folder / name)
        assert len(exported.classes) == 6 and len(exported) == len(split.rows(name))
    again = read_dataset(folder)
    assert sorted(again.classes) == sorted(classes) and sorted(again.items.split) == sorted(split.splits)


@pytest.fixture
def mixed(tmp_path):
    "Files of several formats; two with one stem, one without a suffix in its id."
    root = tmp_path / "images"
    root.mkdir()
    files = ["0.jpg", "0.png", "1.GIF", "2.webp", "3.JPEG", "4.png"]
    for file, image in zip(files, noise(6, 8)):
        Image.fromarray(image).save(root / file)
    items = pd.DataFrame({"id": [*files[:5], "4"], "location": files, "label": 0, "group": ["a"] * 3 + ["b"] * 3})
    return Dataset("mixed", items, ["one"], FolderImages(root))


def test_files_are_copied_where_other_programs_read_them(mixed, tmp_path):
    split = Split(list(mixed.items.id), ["train"] * 6, list(mixed.items.group))
    folder = export_image_folder(mixed, split, tmp_path / "out")
    exported = folder / "train" / "one"
    assert sorted(os.listdir(exported)) == ["0.jpg", "0.png", "1.GIF.png", "2.webp", "3.JPEG", "4.png"]
    assert len(ImageFolder(folder / "train")) == 6
    for name in ("0.jpg", "2.webp", "3.JPEG"):
        assert (exported / name).read_bytes() == mixed.source.content(name)
    assert list(pd.read_csv(folder / "labels.csv").group) == list(mixed.items.group)
    assert folder.stat().st_mode & 0o777 == 0o755


def test_arrays_are_read_again(mixed, tmp_path):
    mixed = replace(mixed, items=mixed.items.assign(label=[0, 1] * 3), classes=["one", "two"])
    split = Split(list(mixed.items.id), ["train"] * 3 + ["test"] * 3, list(mixed.items.group))
    mixed = replace(mixed, items=mixed.items.assign(label=[0, 1] * 3), classes=["one", "two"])
    again = read_dataset(export_npz(mixed, tmp_path / "mixed.npz", 8, split))
    assert np.array_equal(again.images(8), mixed.images(8))
    assert again.items[["id", "group", "split"]].values.tolist() == [
        [i, group, name] for i, group, name in zip(split.ids, split.groups, split.splits)]


def test_an_export_is_complete_or_not_there(mixed, tmp_path):
    (mixed.source.root / "1.GIF").write_bytes(b"no image")
    with pytest.raises(UnreadableImage):
        export_csv(mixed, tmp_path / "out" / "table")
    assert os.listdir(tmp_path / "out") == []
    with pytest.raises(FileExistsError, match="give a new folder"):
        export_csv(mixed, tmp_path / "images")
    with pytest.raises(ValueError, match="the split is for 1 images"):
        export_csv(mixed, tmp_path / "new", Split(["0.jpg"], ["train"], ["a"]))
    (tmp_path / "old.npz").touch()
    with pytest.raises(FileExistsError, match="give a new name"):
        export_npz(mixed, tmp_path / "old.npz", 8)


def test_a_split_that_came_with_the_data_is_exported(tmp_path):
    metadata = pd.DataFrame({"split": ["train", "validation", "test"] * 4})
    dataset = Dataset.from_arrays("pets", noise(12), ["cat"] * 6 + ["dog"] * 6, metadata=metadata)
    for path in (export_csv(dataset, tmp_path / "csv"), export_npz(dataset, tmp_path / "pets.npz", 4)):
        assert Split.of(read_dataset(path)).splits == metadata.split.tolist()
