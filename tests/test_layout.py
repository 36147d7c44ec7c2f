"""Folders and archives as people have them: classes and splits are read as they are meant, and nothing vanishes."""

import io
import os
import tarfile
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

from course_ml.data import Split
from course_ml.layout import LAST_FOLDER, UNLABELED, decide_layout
from course_ml.listing import list_files
from course_ml.readers import read_dataset, read_unlabelled


def png(number=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number * 7 % 256, 99)).save(file, "PNG")
    return file.getvalue()


def paths_of(counts):
    "Paths of so many images in each folder, e.g. {'train/cat': 3}."
    return [f"{folder}/{i}.png".lstrip("/") for folder, count in counts.items() for i in range(count)]


def write(root, counts):
    "Write so many images into each folder; a folder with none is empty."
    for folder in counts:
        (Path(root) / folder).mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths_of(counts)):
        (Path(root) / path).write_bytes(png(number))
    return Path(root)


def counts_of(dataset):
    "The number of images by class, or by split and class."
    names = [dataset.classes[label] for label in dataset.labels]
    keys = [f"{split}/{name}" for split, name in zip(dataset.items.split, names)] if "split" in dataset.items else names
    return {key: keys.count(key) for key in sorted(set(keys))}


def told(dataset):
    return " | ".join(dataset.reading.decisions + dataset.reading.remarks)


# What folders mean: folders -> classes (or split/class), number of images without labels, number not used

SPLITS = {"train/cat": 3, "train/dog": 3, "test/cat": 2, "test/dog": 2}
LAYOUTS = {
    "flat test": ({"train/cat": 3, "train/dog": 3, "test": 4}, {"cat": 3, "dog": 3}, 4, 0),
    "flat test next to classes": ({"cat": 3, "dog": 3, "test": 4}, {"cat": 3, "dog": 3}, 4, 0),
    "flat test in a folder": ({"a/train/cat": 3, "a/train/dog": 3, "a/test/images": 4}, {"cat": 3, "dog": 3}, 4, 0),
    "test of unknown": ({"train/cat": 3, "train/dog": 3, "test/unknown": 4}, {"cat": 3, "dog": 3}, 4, 0),
    "brain tumors": ({"Training/glioma": 3, "Training/notumor": 3, "Testing/glioma": 2, "Testing/notumor": 2},
                     {"test/glioma": 2, "test/notumor": 2, "train/glioma": 3, "train/notumor": 3}, 0, 0),
    "train and test": (SPLITS, {"test/cat": 2, "test/dog": 2, "train/cat": 3, "train/dog": 3}, 0, 0),
    "wrapper in each split": ({"seg_train/seg_train/sea": 3, "seg_train/seg_train/ice": 3, "seg_test/seg_test/sea": 2,
                               "seg_pred/seg_pred": 4}, {"test/sea": 2, "train/ice": 3, "train/sea": 3}, 0, 4),
    "one class in the test": ({"train/cat": 3, "train/dog": 3, "test/cat": 2},
                              {"test/cat": 2, "train/cat": 3, "train/dog": 3}, 0, 0),
    "class, then split": ({"cat/Train": 3, "cat/Test": 2, "dog/Train": 3, "dog/Test": 2, "dog": 1},
                          {"test/cat": 2, "test/dog": 2, "train/cat": 3, "train/dog": 3}, 0, 1),
    "a class without split": ({"cat/train": 3, "cat/test": 2, "dog/train": 3, "dog/test": 2, "dog/old": 1, "owl": 2},
                              {"test/cat": 2, "test/dog": 2, "train/cat": 3, "train/dog": 3}, 0, 3),
    "wrappers": ({"data/pets/images/cat": 3, "data/pets/images/dog": 3, "data": 1}, {"cat": 3, "dog": 3}, 0, 1),
    "only train": ({"train/cat": 3, "train/dog": 3}, {"cat": 3, "dog": 3}, 0, 0),
    "a class called train": ({"train/steam": 3, "train/electric": 3, "bus": 3, "plane": 3},
                             {"bus": 3, "plane": 3, "train": 6}, 0, 0),
    "a class called train, flat test": ({"train/steam": 3, "bus": 3, "plane": 3, "test": 4},
                                        {"bus": 3, "plane": 3, "train": 3}, 4, 0),
    "a class called train in splits": ({"train/train": 3, "train/bus": 3, "test/train": 2, "test/bus": 2},
                                       {"test/bus": 2, "test/train": 2, "train/bus": 3, "train/train": 3}, 0, 0),
    "a class called test": ({"test": 3, "control": 3}, {"control": 3, "test": 3}, 0, 0),
    "a class called valid": ({"valid": 3, "invalid": 3}, {"invalid": 3, "valid": 3}, 0, 0),
    "tests of two kinds": ({"blood test": 3, "urine test": 3}, {"blood test": 3, "urine test": 3}, 0, 0),
    "two levels": ({"Aves/Parus": 3, "Aves/Turdus": 3, "Insecta/Apis": 3}, {"Aves": 6, "Insecta": 3}, 0, 0),
    "a second copy": ({"cells/sick": 3, "cells/well": 3, "cells/cells/sick": 3, "cells/cells/well": 3},
                      {"sick": 3, "well": 3}, 0, 6),
    "a second copy of splits": ({f"x/{folder}": n for folder, n in SPLITS.items()} | {"x/x/train/cat": 3},
                                {"test/cat": 2, "test/dog": 2, "train/cat": 3, "train/dog": 3}, 0, 3),
    "a test set next to the classes": ({"cat": 3, "dog": 3, "test/cat": 2, "test/dog": 2},
                                       {"test/cat": 2, "test/dog": 2, "train/cat": 3, "train/dog": 3}, 0, 0),
    "other folders": ({f"fruits/{folder}": n for folder, n in SPLITS.items()} | {"fruits/test-many": 3, "papers": 1},
                      {"test/cat": 2, "test/dog": 2, "train/cat": 3, "train/dog": 3}, 0, 4),
    "flat images": ({"train/cat": 3, "train/dog": 3, "": 2}, {"cat": 3, "dog": 3}, 0, 2),
}


@pytest.mark.parametrize("counts, expected, unlabeled, unused", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path, counts, expected, unlabeled, unused):
    dataset = read_dataset(write(tmp_path / "set", counts))
    assert counts_of(dataset) == expected
    reasons = list(dataset.skipped.reason)
    assert (reasons.count(UNLABELED), len(reasons) - reasons.count(UNLABELED)) == (unlabeled, unused)
    assert len(dataset) + len(dataset.skipped) == sum(counts.values())
    assert ("unlabeled test set" in told(dataset)) == bool(unlabeled) and ("not used" in told(dataset)) == bool(unused)


@pytest.mark.parametrize("train, validation, test", [
    ("train", "val", "test"), ("TRAIN", "Valid", "Testing"), ("training_set", "validation set", "test_set"),
    ("TrainImages", "dev", "eval"), ("train2017", "val2017", "test2017"), ("pets-train", "pets-dev", "pets-test")])
@pytest.mark.parametrize("form", ["{split}/{name}", "{name}/{split}", "all/{split}/{name}", "{split}/x/{name}"])
def test_the_usual_names_of_splits(train, validation, test, form):
    names = {"train": train, "validation": validation, "test": test}
    paths = [f"{form.format(split=names[split], name=name)}/{i}.png"
             for split in names for name in ("cat", "dog") for i in range(2)]
    layout = decide_layout(paths)
    assert layout.images.groupby(["split", "label"]).size().to_dict() == {
        (split, name): 2 for split in names for name in ("cat", "dog")}


def test_how_splits_were_read_is_shown(tmp_path):
    dataset = read_dataset(write(tmp_path / "set", {"Training/cat": 3, "Training/dog": 3, "Testing/cat": 2}))
    assert "splits by folder: train (Training/, 6 images), test (Testing/, 2 images)" in dataset.reading.decisions


def test_a_class_in_one_split_only_is_shown(tmp_path):
    counts = {"train/cat": 3, "train/dog": 3, "train/owl": 3, "test/cat": 2, "test/dog": 2, "test/bat": 2}
    counts |= {"val/cat": 2, "val/dog": 2}
    dataset = read_dataset(write(tmp_path / "set", counts))
    assert dataset.classes == ["bat", "cat", "dog", "owl"]
    assert Split.of(dataset).remarks(dataset) == [
        "train has no image of 'bat'", "validation has no image of 'bat', 'owl'", "test has no image of 'owl'"]


def test_an_empty_class_folder_is_named(tmp_path):
    folder = write(tmp_path / "set", {"cat": 3, "dog": 3, "fox": 0, "owl": 0})
    (folder / "fox" / ".DS_Store").touch()
    (folder / "owl" / "notes.txt").touch()
    assert "no image in fox/, owl/" in read_dataset(folder).reading.remarks


def test_two_levels_are_shown_and_the_second_can_be_chosen(tmp_path):
    counts = {f"{split}/{name}": 2 for split in ("train", "val") for name in ("Aves/Parus", "Aves/Turdus", "Insecta/Apis")}
    folder = write(tmp_path / "set", counts)
    assert read_dataset(folder).classes == ["Aves", "Insecta"]
    assert f"label_pattern={LAST_FOLDER!r}" in told(read_dataset(folder))
    species = read_dataset(folder, label_pattern=LAST_FOLDER)
    assert species.classes == ["Apis", "Parus", "Turdus"] and set(species.items.split) == {"train", "validation"}


def test_levels_that_may_be_mistaken_are_remarked(tmp_path):
    folder = write(tmp_path / "set", {"color/cat": 2, "color/dog": 2, "gray/cat": 2, "gray/dog": 2})
    assert "the folders color, gray all have the same folders cat, dog" in read_dataset(folder).reading.remarks[0]
    assert "'train' is read as a class" in told(read_dataset(write(tmp_path / "two", {"train/steam": 3, "bus": 3})))


@pytest.mark.parametrize("counts", [{"wbc/band": 3, "wbc/blast": 3, "other": 3}, {"cat/a": 2, "cat/b": 2, "dog": 3}])
def test_folders_of_different_depth_are_remarked(tmp_path, counts):
    dataset = read_dataset(write(tmp_path / "set", counts))
    deep = [folder.split("/") for folder in counts if "/" in folder]
    name, inside = deep[0][0], [folder for _, folder in deep]
    assert f"the folder {name} has its images in the folders {', '.join(inside)}" in "".join(dataset.reading.remarks)
    assert read_dataset(tmp_path / "set" / name).classes == inside


def test_splits_in_the_names_of_images_are_remarked(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i, split in enumerate(["train", "train", "train", "test"]):
            (tmp_path / name / f"{split}_{i}.png").write_bytes(png(i))
    assert "the names of the images begin with test, train, which are not used" in told(read_dataset(tmp_path))
    (tmp_path / "cat/other.png").write_bytes(png())
    assert not read_dataset(tmp_path).reading.remarks


@pytest.mark.parametrize("name, is_split", [
    ("train_test_split.txt", True), ("lists/train_val_list.txt", True), ("split_a.json", True), ("Train.mat", True),
    ("classes.txt", False), ("training.log", False), ("constraints.txt", False), ("test.csv", False),
])
def test_files_that_may_have_a_split_are_remarked(tmp_path, name, is_split):
    folder = write(tmp_path / "set", {"images/cat": 3, "images/dog": 3, "lists": 0})
    (folder / name).write_text("1 0\n2 1\n")
    assert (f"LOOK AT {name}: by the name it has a split" in told(read_dataset(folder))) == is_split
    folder = write(tmp_path / "given", SPLITS | {"lists": 0})
    (folder / name).write_text("1 0\n2 1\n")
    assert "LOOK AT" not in told(read_dataset(folder))


def test_a_split_by_numbers_is_read_where_it_has_each_image(tmp_path):
    paths = paths_of({"001.cat": 4, "002.dog": 4})
    write(tmp_path, {"images/001.cat": 4, "images/002.dog": 4})
    numbered = list(enumerate(paths, 1))
    (tmp_path / "images.txt").write_text("".join(f"{i} {path}\n" for i, path in numbered))
    (tmp_path / "image_class_labels.txt").write_text("".join(f"{i} {1 + (i > 4)}\n" for i, _ in numbered))
    (tmp_path / "classes.txt").write_text("1 001.cat\n2 002.dog\n")
    marks = [f"{i} {int(i % 4 > 0)}\n" for i, _ in numbered]
    (tmp_path / "train_test_split.txt").write_text("".join(marks))
    dataset = read_dataset(tmp_path)
    assert counts_of(dataset) == {"test/001.cat": 1, "test/002.dog": 1, "train/001.cat": 3, "train/002.dog": 3}
    in_test = dataset.items.location[dataset.items.split == "test"]
    assert list(in_test) == ["images/001.cat/3.png", "images/002.dog/3.png"]
    assert "split: the lists images.txt, train_test_split.txt" in told(dataset)
    (tmp_path / "train_test_split.txt").write_text("".join(marks[1:]))
    dataset = read_dataset(tmp_path)
    assert "split" not in dataset.items and "LOOK AT train_test_split.txt" in told(dataset)


@pytest.mark.parametrize("test, is_read", [
    (["5.png", "6.png"], True), (["6.png"], False), (["1.png", "5.png", "6.png"], False)])
def test_lists_of_images_beside_a_table_are_splits(tmp_path, test, is_read):
    write(tmp_path, {"images": 7})
    rows = [f"{i}.png,{'cat' if i % 2 else 'dog'},p{i}" for i in range(7)]
    (tmp_path / "Data_Entry.csv").write_text("\n".join(["Image Index,label,Patient ID", *rows]))
    (tmp_path / "train_val_list.txt").write_text("".join(f"{i}.png\n" for i in range(5)))
    (tmp_path / "test_list.txt").write_text("\n".join(test))
    dataset = read_dataset(tmp_path)
    assert ("split" in dataset.items) == is_read and len(dataset) == 7
    if is_read: assert list(dataset.items.split) == ["train"] * 5 + ["test"] * 2
    else: assert "LOOK AT train_val_list.txt" in told(dataset)


# Names


def test_two_spellings_of_a_letter_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "érable") for form in ("NFC", "NFD"))
    folder = write(tmp_path / "set", {f"train/{composed}": 3, "train/pin": 3, f"test/{decomposed}": 2, "test/pin": 2})
    dataset = read_dataset(folder)
    assert dataset.classes == ["pin", composed] and dataset.images(8).shape == (10, 8, 8, 3)


def test_files_whose_names_differ_only_in_spelling_are_both_read(tmp_path):
    folder = write(tmp_path / "set", {"cat": 2, "dog": 2})
    for form in ("NFC", "NFD"):
        (folder / "cat" / unicodedata.normalize(form, "é.png")).write_bytes(png())
    dataset = read_dataset(folder)
    assert counts_of(dataset) == {"cat": 4, "dog": 2} and dataset.items.id.is_unique


def test_backslashes_are_slashes(tmp_path):
    folder = write(tmp_path / "set", {"dog": 2})
    for i in range(2):
        (folder / f"cat\\{i}.png").write_bytes(png(i))
    dataset = read_dataset(folder)
    assert dataset.classes == ["cat", "dog"] and dataset.images(8).shape == (4, 8, 8, 3)


def test_names_that_are_not_unicode_are_refused_by_name(tmp_path):
    folder = write(tmp_path / "set", {"cat": 2, "dog": 2})
    latin = os.fsencode(folder) + b"/ch\xeane"
    os.mkdir(latin)
    with open(latin + b"/1.png", "wb") as file:
        file.write(png())
    dataset = read_dataset(folder)
    assert dataset.skipped.values.tolist() == [["chêne/1.png", "its name is not in UTF-8; rename it"]]
    assert "its name is not in UTF-8" in dataset.reading.remarks[0]


def test_class_names_are_compared_without_spaces_and_alike_ones_are_remarked(tmp_path):
    dataset = read_dataset(write(tmp_path / "set", {"train/cat": 2, "train/Dog": 2, "test/cat ": 2, "test/dog": 2}))
    assert dataset.classes == ["Dog", "cat", "dog"]
    assert "the classes 'Dog', 'dog' differ only in capitals; they are kept apart" in dataset.reading.remarks


def test_a_class_with_a_comma_can_be_left_out(tmp_path):
    folder = write(tmp_path / "set", {"cat": 3, "dog": 3, "owl, barn": 1, "7": 2})
    dataset = read_dataset(folder, leave_out="owl, barn,7")
    assert dataset.classes == ["cat", "dog"] and len(dataset.skipped) == 3
    with pytest.raises(ValueError, match="there is no class 'barn'; the classes are 7, cat, dog, 'owl, barn'"):
        read_dataset(folder, leave_out="barn")


def test_numbers_are_names(tmp_path):
    dataset = read_dataset(write(tmp_path / "2024", {"7": 2, "12": 2, "x": 2}))
    assert dataset.name == "2024" and dataset.classes == ["7", "12", "x"]
    assert "3 classes by folder: 7, 12, x" in dataset.reading.decisions


# Patterns


@pytest.mark.parametrize("pattern, expected", [
    (r"^([a-z]+)", {"cat": 3, "dog": 3}), (r"^(\w+?)\.", {"cat": 3, "dog": 3}),
    (r"^\w(?P<label>[ao])", {"a": 3, "o": 3}), (r"([ao])(?P<label>[a-z])", {"g": 3, "t": 3})])
def test_classes_in_names(tmp_path, pattern, expected):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in [f"{name}.{i}.jpg" for name in ("cat", "dog") for i in range(3)] + ["9-9.jpg"]:
        (folder / name).write_bytes(png())
    dataset = read_dataset(folder, label_pattern=pattern)
    assert counts_of(dataset) == expected
    assert dataset.skipped.values.tolist() == [["9-9.jpg", f"label_pattern {pattern!r} finds no class in its name"]]


def test_flat_splits_with_classes_in_names(tmp_path):
    folder = write(tmp_path / "set", {"train": 0, "test1": 3})
    for name in [f"{name}.{i}.jpg" for name in ("cat", "dog") for i in range(3)]:
        (folder / "train" / name).write_bytes(png())
    dataset = read_dataset(folder, label_pattern=r"^([a-z]+)\.")
    assert counts_of(dataset) == {"cat": 3, "dog": 3} and list(dataset.skipped.reason) == [UNLABELED] * 3
    assert len(read_unlabelled(folder, ["cat", "dog"], label_pattern=r"^([a-z]+)\.")) == 3
    with pytest.raises(ValueError, match=r"names begin with the classes \(cat, dog\), give label_pattern="):
        read_dataset(folder / "train")


@pytest.mark.parametrize("options, message", [
    ({"label_pattern": "^(cat"}, r"label_pattern '\^\(cat' is no regular expression"),
    ({"label_pattern": "cat"}, "label_pattern 'cat' has no group"),
    ({"label_pattern": "(horse)"}, r"label_pattern '\(horse\)' fits none of 6 images"),
    ({"label_pattern": "(.)", "label_column": "dx"}, "label_column='dx' cannot be used: a label_pattern is given"),
    ({"group_column": "patient"}, "group_column='patient' cannot be used: no table"),
    ({"leave_out": "horse"}, "there is no class 'horse'"),
    ({"leave_out": "dog"}, "all images have the class 'cat'; a data set needs two classes")])
def test_options_that_cannot_be_used_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        read_dataset(write(tmp_path / "set", {"cat": 3, "dog": 3}), **options)


@pytest.mark.parametrize("counts, message", [
    ({"cat": 3}, "all images have the class 'cat'"), ({"": 3}, "no images in class folders"),
    ({"train": 3, "test": 3}, "no images in class folders"), ({"cat": 0, "dog": 0}, "no files at all")])
def test_one_class_is_no_data_set(tmp_path, counts, message):
    with pytest.raises(ValueError, match=message):
        read_dataset(write(tmp_path / "set", counts))


# Links and junk


def test_links_are_followed(tmp_path):
    write(tmp_path / "store", {"a": 3, "b": 2, "one": 1})
    folder = write(tmp_path / "set", {"cat": 2})
    (folder / "dog").symlink_to(tmp_path / "store" / "a", target_is_directory=True)
    (folder / "owl").symlink_to(Path("..") / "store" / "b", target_is_directory=True)
    (folder / "cat" / "linked.png").symlink_to(tmp_path / "store" / "one" / "0.png")
    (folder / "cat" / "gone.png").symlink_to("/nowhere/at/all.png")
    dataset = read_dataset(folder)
    assert counts_of(dataset) == {"cat": 3, "dog": 3, "owl": 2} and dataset.images(8).shape == (8, 8, 8, 3)
    assert dataset.skipped.values.tolist() == [["cat/gone.png", "a broken link"]]


def test_circles_of_links_are_refused(tmp_path):
    folder = write(tmp_path / "set", {"cat": 2, "dog": 2})
    (folder / "dog" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "cat" / "self").symlink_to(folder / "cat", target_is_directory=True)
    (folder / "cat" / "itself").symlink_to("itself")
    other = write(tmp_path / "other", {"owl": 2})
    (other / "back").symlink_to(folder, target_is_directory=True)
    (folder / "birds").symlink_to(other, target_is_directory=True)
    circle = "a link to a folder that it is in"
    assert dict(list_files(folder).set_aside) == {
        "birds/back": circle, "cat/itself": "a broken link", "cat/self": circle, "dog/up": circle}


def test_what_cannot_be_opened_is_listed(tmp_path):
    folder = write(tmp_path / "set", {"cat": 2, "dog": 2})
    os.mkfifo(folder / "cat" / "pipe.png")
    assert list_files(folder).set_aside == [("cat/pipe.png", "neither a file nor a folder")]


JUNK = [".DS_Store", "cat/Thumbs.db", "cat/._0.png", "@eaDir/0.png", "cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
        ".ipynb_checkpoints/0-checkpoint.png", "desktop.ini", "__MACOSX/cat/._0.png", "README.md", "LICENSE",
        "dog/Icon\r", ".git/objects/1.png"]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_junk_decides_nothing(tmp_path, kind):
    files = {**{path: png(i) for i, path in enumerate(paths_of({"pets/cat": 3, "pets/dog": 3}))},
             **dict.fromkeys(JUNK, b"junk")}
    dataset = read_dataset(pack(tmp_path, kind, files))
    assert counts_of(dataset) == {"cat": 3, "dog": 3} and sorted(dataset.skipped.id) == sorted(JUNK)


# Archives


def pack(folder, kind, files):
    "Write files into a folder, a zip or a tar; a name that ends in a slash is an empty folder."
    path = folder / {"folder": "pets", "zip": "pets.zip", "tar": "pets.tar", "tar.gz": "pets.tar.gz"}[kind]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    elif kind == "folder":
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz"])
@pytest.mark.parametrize("prefix", ["", "pets/", "./"])
def test_an_archive_is_read_like_its_folder(tmp_path, kind, prefix):
    files = {prefix + path: png(i) for i, path in enumerate(paths_of(SPLITS))}
    path = pack(tmp_path, kind, files)
    dataset = read_dataset(path)
    assert counts_of(dataset) == {"test/cat": 2, "test/dog": 2, "train/cat": 3, "train/dog": 3}
    assert dataset.name == "pets" and dataset.images(8).shape == (10, 8, 8, 3)
    assert list(dataset.items.id) == sorted(name.removeprefix("./") for name in files)


def test_an_archive_is_known_by_its_content(tmp_path):
    path = pack(tmp_path, "zip", {path: png(i) for i, path in enumerate(paths_of({"cat": 3, "dog": 3}))})
    for name in ("PETS.ZIP", "download", "pets.tar"):
        path = path.rename(tmp_path / name)
        assert counts_of(read_dataset(path)) == {"cat": 3, "dog": 3}


def test_an_archive_alone_in_a_folder_is_read(tmp_path):
    files = {path: png(i) for i, path in enumerate(paths_of({"cat": 3, "dog": 3}))}
    pack(tmp_path, "zip", files)
    (tmp_path / "notes.txt").touch()
    dataset = read_dataset(tmp_path)
    assert counts_of(dataset) == {"cat": 3, "dog": 3} and "read from pets.zip" in told(dataset)
    assert dataset.skipped.values.tolist() == [["notes.txt", "next to the archive that is read"]]
    pack(tmp_path, "tar", files)
    with pytest.raises(ValueError, match=r"2 archives \(pets.tar, pets.zip\); give the path of one"):
        read_dataset(tmp_path)


def write_zip(path, counts, first=0):
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(paths_of(counts), first): archive.writestr(name, png(number))


@pytest.mark.parametrize("inside", [("", ""), ("train/", "test/")])
def test_archives_of_splits_are_read_as_splits(tmp_path, inside):
    write_zip(tmp_path / "train.zip", {f"{inside[0]}cat": 3, f"{inside[0]}dog": 3})
    write_zip(tmp_path / "Test.zip", {f"{inside[1]}cat": 2, f"{inside[1]}dog": 2}, 6)
    (tmp_path / "notes.pdf").touch()
    dataset = read_dataset(tmp_path)
    assert counts_of(dataset) == {"test/cat": 2, "test/dog": 2, "train/cat": 3, "train/dog": 3}
    assert "read from the archives Test.zip, train.zip, each as if it were a folder" in told(dataset)
    assert dataset.skipped.values.tolist() == [["notes.pdf", "next to the archives that are read"]]
    assert len({image.tobytes() for image in dataset.images(8)}) == 10


def test_an_archive_without_labels_is_the_unlabeled_test_set(tmp_path):
    write_zip(tmp_path / "train.zip", {"cat": 3, "dog": 3})
    write_zip(tmp_path / "test.zip", {"test": 4})
    dataset = read_dataset(tmp_path)
    assert counts_of(dataset) == {"cat": 3, "dog": 3} and "4 images without labels" in told(dataset)
    assert len(read_unlabelled(tmp_path, dataset.classes)) == 4


def test_classes_in_names_of_images_in_archives_of_splits(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for number, name in enumerate(("cat.0.png", "cat.1.png", "dog.0.png", "dog.1.png")):
            archive.writestr(name, png(number))
    write_zip(tmp_path / "test1.zip", {"test1": 3})
    with pytest.raises(ValueError, match="label_pattern="): read_dataset(tmp_path)
    dataset = read_dataset(tmp_path, label_pattern="^([a-z]+)[.]")
    assert counts_of(dataset) == {"cat": 2, "dog": 2} and "3 images without labels" in told(dataset)


def test_a_damaged_archive_of_a_split_is_named(tmp_path):
    write_zip(tmp_path / "train.zip", {"cat": 3, "dog": 3})
    (tmp_path / "test.zip").write_bytes(b"PK and no more")
    with pytest.raises(ValueError, match="test.zip"): read_dataset(tmp_path)


def test_empty_class_folders_in_archives_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for path in paths_of({"cat": 2, "dog": 2}):
            archive.writestr(path, png())
        archive.mkdir("fox")
    with tarfile.open(tmp_path / "pets.tar", "w") as archive:
        archive.add(write(tmp_path / "pets", {"cat": 2, "dog": 2, "fox": 0}), ".")
    for name in ("pets.zip", "pets.tar"):
        assert read_dataset(tmp_path / name).reading.remarks == ("no image in fox/",)


def test_archives_in_archives_are_named(tmp_path):
    inner = pack(tmp_path, "zip", {path: png() for path in paths_of({"cat": 3, "dog": 3})}).read_bytes()
    (tmp_path / "outer").mkdir()
    outer = pack(tmp_path / "outer", "zip", {"inner.zip": inner})
    with pytest.raises(ValueError, match=r"pets.zip: no images .*inner.zip.*unpack"):
        read_dataset(outer)
    both = pack(tmp_path / "outer", "tar", {"more.zip": inner, **{path: png() for path in paths_of({"a": 2, "b": 2})}})
    assert [path for path, reason in read_dataset(both).skipped.values if "unpack" in reason] == ["more.zip"]


def test_several_top_folders_of_an_archive_are_named(tmp_path):
    path = pack(tmp_path, "zip", {path: png() for path in paths_of({**SPLITS, "extra/cat": 2, "old/cat": 1})})
    dataset = read_dataset(path)
    assert len(dataset) == 10 and "3 files not used, not in the folder of a split" in told(dataset)
    assert "extra/cat/0.png" in told(dataset)


@pytest.mark.parametrize("name", ["notes.pdf", "photo.jpg"])
def test_other_files_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(png())
    with pytest.raises(ValueError, match=f"{name} is none of"):
        read_dataset(tmp_path / name)


# Other programs read sane layouts in the same way


def read_by_torchvision(folder):
    theirs = ImageFolder(folder)
    return theirs.classes, dict(Counter(theirs.classes[label] for label in theirs.targets))


def read_by_keras(folder):
    from keras.utils import image_dataset_from_directory  # it loads TensorFlow

    theirs = image_dataset_from_directory(folder, image_size=(8, 8), verbose=False)
    return theirs.class_names, dict(Counter(Path(path).relative_to(folder).parts[0] for path in theirs.file_paths))


def load_imagefolder(folder):
    "Read a folder with Hugging Face's imagefolder, without its hub: one table a split."
    import datasets  # slow to load

    with patch.object(datasets.config, "HF_HUB_OFFLINE", True):
        return datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(folder.parent / "cache"))


def read_by_hugging_face(folder):
    "The classes, and the number of images by class, or by split and class; images without a class are left out."
    splits = {split: table for split, table in load_imagefolder(folder).items() if "label" in table.features}
    names = {split: [table.features["label"].int2str(label) for label in table["label"] if label is not None]
             for split, table in splits.items()}
    keys = [f"{split}/{name}" if len(splits) > 1 else name for split in names for name in names[split]]
    return next((table.features["label"].names for table in splits.values()), []), dict(Counter(keys))


@pytest.mark.parametrize("counts", [
    {"cat": 3, "dog": 2, "owl": 4}, {"n02": 2, "n01": 3, "n03": 2}, {"Zebra": 2, "ant": 3}, {"2": 2, "10": 3},
    {"érable": 2, "black cat": 3, "100% [bird]": 2}], ids=" ".join)
def test_other_programs_agree_on_class_folders(tmp_path, counts):
    folder, first = write(tmp_path / "set", counts), min(counts)
    (folder / first / "0.png").rename(folder / first / "0.PNG")
    for junk in (".DS_Store", "notes.txt", f"{first}/Thumbs.db"):
        (folder / junk).touch()
    theirs = read_by_torchvision(folder)
    assert theirs == read_by_keras(folder) == read_by_hugging_face(folder) == (sorted(counts), counts)
    dataset = read_dataset(folder)
    assert counts_of(dataset) == counts
    numbers = all(name.isdecimal() for name in counts)  # they sort 10 before 2; this course, 2 before 10
    assert dataset.classes == sorted(counts, key=int if numbers else None)


@pytest.mark.parametrize("counts", [SPLITS, {**SPLITS, "validation/cat": 1, "validation/dog": 2},
                                    {**SPLITS, "val/cat": 2, "val/dog": 1}], ids=["test", "validation", "val"])
def test_other_programs_agree_on_each_split(tmp_path, counts):
    folder = write(tmp_path / "set", counts)
    dataset = read_dataset(folder)
    assert read_by_hugging_face(folder) == (dataset.classes, counts_of(dataset))
    for name, items in dataset.items.groupby(dataset.items.id.str.split("/").str[0]):
        theirs = ImageFolder(folder / name)
        assert theirs.classes == dataset.classes and theirs.targets == list(items.label)
        assert [str(Path(path).relative_to(folder)) for path, _ in theirs.samples] == list(items.id)
        assert read_by_keras(folder / name) == read_by_torchvision(folder / name)


DEPTH = "images in folders of different depth have no class there"
UNKNOWN = "a test folder without classes is a class there"
SPLIT = "a class with the name of a split is a split there"
DIFFERENT = {
    "flat test": DEPTH, "flat test next to classes": DEPTH, "class, then split": DEPTH, "wrappers": DEPTH,
    "a class called train, flat test": DEPTH, "a second copy": DEPTH, "a second copy of splits": DEPTH,
    "other folders": DEPTH, "a class without split": DEPTH,
    "flat test in a folder": UNKNOWN, "test of unknown": UNKNOWN,
    "brain tumors": "splits in capitals are merged there",
    "a class called train": SPLIT, "a class called train in splits": SPLIT, "a class called test": SPLIT,
    "a class called valid": SPLIT, "two levels": "the last folder is the class there",
    "a test set next to the classes": "only the test set is read there"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hugging_face_agrees_or_differs_for_a_known_reason(tmp_path, layout):
    folder = write(tmp_path / "set", LAYOUTS[layout][0])
    dataset = read_dataset(folder)
    agrees = read_by_hugging_face(folder) == (dataset.classes, counts_of(dataset))
    assert agrees == (layout not in DIFFERENT), DIFFERENT.get(layout)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_hugging_face_agrees_on_a_table(tmp_path, suffix):
    folder = write(tmp_path / "set", {"train": 4, "test": 2})
    for split, count in {"train": 4, "test": 2}.items():
        table = pd.DataFrame({"file_name": [f"{i}.png" for i in range(count)], "label": ["cat", "dog"] * (count // 2)})
        path = folder / split / f"metadata.{suffix}"
        table.to_csv(path, index=False) if suffix == "csv" else table.to_json(path, orient="records", lines=True)
    theirs = Counter(f"{split}/{name}" for split, table in load_imagefolder(folder).items() for name in table["label"])
    assert counts_of(read_dataset(folder)) == theirs == {"train/cat": 2, "train/dog": 2, "test/cat": 1, "test/dog": 1}


# Images without labels


def test_the_images_of_a_test_folder_are_read(tmp_path):
    folder = write(tmp_path / "set", {"train/cat": 3, "train/dog": 3, "test": 4})
    assert list(read_unlabelled(folder, ["cat", "dog"]).items.id) == [f"test/{i}.png" for i in range(4)]
    assert list(read_unlabelled(folder / "test", ["cat", "dog"]).items.id) == [f"{i}.png" for i in range(4)]
    with pytest.raises(ValueError, match="no test set without"):
        read_unlabelled(folder / "train", ["cat", "dog"])


# Any folders

names = st.sampled_from(["cat", "dog", "Train", "training_set", "val", "TEST", "images", "a_train", "a_test", "pets"])
trees = st.lists(st.lists(names, max_size=5).map("/".join), min_size=1, max_size=25)


@settings(deadline=None)
@given(trees, st.sampled_from(["", "([0-9])", LAST_FOLDER]), st.randoms())
def test_every_path_has_one_place(folders, pattern, random):
    paths = sorted({f"{folder}/{i}.{'png' if i % 5 else 'txt'}".lstrip("/") for i, folder in enumerate(folders)})
    layout = decide_layout(paths, pattern)
    placed = [*layout.images.path, *layout.unlabeled, *(path for path, _ in layout.unused)]
    assert sorted(placed) == paths and all(reason for _, reason in layout.unused)
    assert layout.images.label.all() and set(layout.images.split) <= {"", "train", "validation", "test"}
    assert layout.images.split.nunique() != 1 or set(layout.images.split) == {""}
    shuffled = decide_layout(random.sample(paths, len(paths)), pattern)
    assert shuffled.images.sort_values("path").values.tolist() == layout.images.sort_values("path").values.tolist()


@settings(deadline=None)
@given(trees, st.lists(names, min_size=1, max_size=3).map("/".join))
def test_folders_around_everything_change_nothing(folders, around):
    paths = [f"{folder}/{i}.png".lstrip("/") for i, folder in enumerate(folders)]
    layout, inside = decide_layout(paths), decide_layout([f"{around}/{path}" for path in paths])
    if layout.images.label.nunique() > 1:
        assert inside.images.drop(columns="path").equals(layout.images.drop(columns="path"))
        assert inside.unlabeled == [f"{around}/{path}" for path in layout.unlabeled]


@settings(deadline=None)
@given(st.sets(st.text("abcdeftrains -_", min_size=1, max_size=6).filter(str.strip), min_size=2), st.data())
def test_splits_of_any_classes_are_splits(classes, data):
    names = [data.draw(st.sampled_from(words)) for words in
             (["train", "Training", "TRAIN"], ["val", "valid", "Validation"], ["test", "Testing", "test_set"])]
    paths = [f"{split}/{name}/0.png" for split in names for name in sorted(classes)]
    layout = decide_layout(paths)
    assert len(layout.images) == len(paths) and set(layout.images.label) == {name.strip() for name in classes}
    assert list(layout.images.split) == [name for name in ("train", "validation", "test") for _ in classes]


# Groups in the names of files: they are offered, and taken only on request

NAMES_WITH_GROUPS = {
    "a word with a number": ("{c}/patient{g}_{i}.png", r"(patient[ _-]?[0-9]+)", "patient1"),
    "in capitals": ("{c}/x_Subject-{g}.{i}.png", r"(Subject[ _-]?[0-9]+)", "Subject-1"),
    "a folder in the class": ("{c}/Patient {g}/{i}.png", r"(Patient[ _-]?[0-9]+)[^/]*/", "Patient 1"),
    "a folder around the class": ("{c}/{c}/session_{g}/{i}.png", r"(session[ _-]?[0-9]+)[^/]*/", "session_1"),
    "Market-1501": ("{c}/000{g}_c1s1_{i:06d}_00.png", "^([A-Za-z]*[0-9]+[A-Za-z]*)[_-]", "0001"),
    "a letter and a number": ("{c}/p{g}-{i}.png", "^([A-Za-z]*[0-9]+[A-Za-z]*)[_-]", "p1"),
    "copies by Roboflow": ("{c}/IMG_{g}_jpg.rf.{i:032x}.jpg", r"^(.+)\.rf\.", "IMG_1_jpg"),
}


def with_names(folder, pattern, count=12):
    "Images of two classes; `g` is the number of the group, which has images of both."
    for i in range(count):
        path = Path(folder) / pattern.format(c=("cat", "dog")[i % 2], g=i // 4, i=i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return Path(folder)


@pytest.mark.parametrize("names, pattern, group", NAMES_WITH_GROUPS.values(), ids=NAMES_WITH_GROUPS)
def test_groups_in_names_are_offered(tmp_path, names, pattern, group):
    folder = with_names(tmp_path / "set", names)
    dataset = read_dataset(folder)
    assert dataset.items.group.nunique() == 12 and f"give group_pattern={pattern!r}" in told(dataset)
    dataset = read_dataset(folder, group_pattern=pattern)
    assert dataset.items.group.nunique() == 3 and (dataset.items.group == group).sum() == 4
    assert f"3 groups by group_pattern {pattern!r}" in told(dataset) and "LOOK AT" not in told(dataset)
    split = Split.of(dataset, k=3)
    assert all(len(set(own)) == 1 for _, own in pd.Series(split.splits).groupby(dataset.items.group.to_numpy()))


@pytest.mark.parametrize("names", ["{c}/{i}.png", "{c}/IMG_{i}.png", "{c}/{c}_{i}.png", "{c}/{i}_front.png", "{c}/a1_{i}.png",
                                   "{c}/patient{i}.png", "{c}/{c}1_{i}.png", "{c}/showcase1_{i}.png"])
def test_names_without_groups_are_not_offered(tmp_path, names):
    assert "group_pattern" not in told(read_dataset(with_names(tmp_path / "set", names)))


@pytest.mark.parametrize("options, message", [
    ({"group_pattern": "(horse)"}, r"group_pattern '\(horse\)' fits none of 12 images, e.g. cat/patient0_0.png"),
    ({"group_pattern": "^(cat"}, r"group_pattern '\^\(cat' is no regular expression"),
    ({"group_pattern": "cat"}, "group_pattern 'cat' has no group; put the part of the name that is the group"),
])
def test_group_patterns_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        read_dataset(with_names(tmp_path / "set", "{c}/patient{g}_{i}.png"), **options)


def test_group_pattern_that_fits_some_images(tmp_path):
    folder = with_names(tmp_path / "set", "{c}/patient{g}_{i}.png")
    (folder / "cat/other.png").write_bytes(png(99))
    dataset = read_dataset(folder, group_pattern=r"(?P<group>patient\d)")
    assert dataset.items.group.nunique() == 4
    assert "finds no group for 1 image, e.g. cat/other.png; each of these is a group of its own" in told(dataset)


def test_group_pattern_with_a_table(tmp_path):
    folder = with_names(tmp_path / "set", "{c}/patient{g}_{i}.png")
    rows = [f"{path.name},{'ab'[i % 2]},x{i // 3}" for i, path in enumerate(sorted(folder.rglob("*.png")))]
    (folder / "labels.csv").write_text("\n".join(["file,label,plant_id", *rows]))
    assert read_dataset(folder, group_pattern=r"(patient\d)").items.group.nunique() == 3
    with pytest.raises(ValueError, match="group_column='plant_id' cannot be used: a group_pattern is given"):
        read_dataset(folder, group_pattern=r"(patient\d)", group_column="plant_id")


def test_names_with_commas_are_quoted_and_unused_tables_named_once(tmp_path):
    folder = write(tmp_path / "set", {"cat": 3, "owl, barn": 3})
    (folder / "classes.csv").write_text("kind,name\nfurry,cat\nfeathered,owl\n")
    text = told(read_dataset(folder))
    assert "2 classes by folder: cat, 'owl, barn'" in text and text.count("classes.csv") == 1
