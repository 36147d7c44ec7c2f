"""Tables and arrays as people have them: each kind of input is read as it is meant, or refused with the reason."""

import hashlib
import io
import json
import pickle
import re
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import openpyxl
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from course_ml.arrays import dataset_from_arrays, find_arrays
from course_ml.listing import list_files
from course_ml.readers import read_dataset
from course_ml.reading import ReadOptions
from course_ml.table_files import read_table
from course_ml.tables import dataset_from_table, find_tables, unlabelled_from_table


def png(number=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number * 7 % 256, 99)).save(file, "PNG")
    return file.getvalue()


def write(folder, files):
    "Write files: bytes or text as they are, None for an image."
    for number, (name, content) in enumerate(files.items()):
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = png(number) if content is None else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(folder)


def images(pattern, count):
    return {pattern.format(i): None for i in range(count)}


def csv(header, pattern, count=12, labels=("cat", "dog"), separator=","):
    "A table whose rows are made from their number `i` and a label `c`, which takes turns."
    rows = [pattern.format(i=i, c=labels[i % len(labels)]) for i in range(count)]
    return "\n".join([header, *rows]).replace(",", separator)


def read(path, files=None, **options):
    "Read a folder or an archive whose table decides."
    if files: write(path, files)
    dataset = read_dataset(path, name="example", **options)
    assert "table " in decisions(dataset) and " by folder: " not in decisions(dataset)
    return dataset


def labels_of(dataset):
    return [dataset.classes[label] for label in dataset.labels]


def remarks(dataset):
    return "\n".join(dataset.reading.remarks)


def decisions(dataset):
    return "\n".join(dataset.reading.decisions)


def skipped(dataset):
    return dict(zip(dataset.skipped.id, dataset.skipped.reason))


# Labels


@pytest.mark.parametrize("yes, no", [("1", "0"), ("1.0", "0.0"), ("True", "False")])
def test_one_hot(tmp_path, yes, no):
    rows = ["image_id,healthy,rust,scab", f"T_0,{yes},{no},{no}", f"T_1,{no},{yes},{no}", f"T_2,{no},{no},{no}",
            f"T_3,{no},{yes},{yes}", f"T_4,{no},{no},{yes}"]
    submission = "image_id,healthy,rust,scab\nT_5,.25,.25,.25\n"
    files = images("images/T_{}.jpg", 6) | {"train.csv": "\n".join(rows), "sample_submission.csv": submission}
    dataset = read(tmp_path, files)
    assert labels_of(dataset) == ["healthy", "rust", "scab"]
    assert skipped(dataset) == {"T_2": "no label", "T_3": "several labels: rust, scab", "images/T_5.jpg": "no row names it",
                                "sample_submission.csv": "not an image by its name"}
    assert "2 rows of 5 not used" in remarks(dataset)


def test_one_hot_with_several_labels_in_most_rows_is_refused(tmp_path):
    files = images("{}.png", 2) | {"train.csv": "image,rust,scab\n0,1,1\n1,1,1\n"}
    with pytest.raises(ValueError, match="several labels of one image"):
        read(tmp_path, files)


def test_the_label_is_not_guessed(tmp_path):
    files = {f"part_{1 + i // 6}/ISIC_{i}.jpg": None for i in range(12)}
    files["metadata.csv"] = "lesion_id,image_id,dx,age\n" + "\n".join(
        f"HAM_{i // 2},ISIC_{i},{['nv', 'mel', 'bkl'][i // 2 % 3]},{30 + i}.0" for i in range(12))
    with pytest.raises(ValueError, match=r"Choose with label_column: dx \(3 values: bkl, mel, nv\)"):
        read(tmp_path, files)
    dataset = read(tmp_path, label_column="DX")
    assert dataset.classes == ["bkl", "mel", "nv"] and len(dataset) == 12
    assert dataset.reading.offered_groups == ("lesion_id",) and "LOOK AT lesion_id" in remarks(dataset)
    assert read(tmp_path, label_column="dx", group_column="lesion_id").items.group.nunique() == 6
    with pytest.raises(ValueError, match="no column 'diagnosis' for label_column; its columns are lesion_id, image_id"):
        read(tmp_path, label_column="diagnosis")


def test_tags_that_stand_in_many_rows_are_several_labels(tmp_path):
    rows = "image_name,tags\n0,haze primary\n1,clear primary\n2,clear haze\n"
    write(tmp_path, images("{}.jpg", 3) | {"train.csv": rows})
    with pytest.raises(ValueError, match="'haze primary' looks like several labels"):
        read(tmp_path)
    write(tmp_path, {"train.csv": rows.replace("tags", "species")})
    assert len(read(tmp_path).classes) == 3


@pytest.mark.parametrize("several", ["scab frog_eye_leaf_spot", "scab rust", "scab,rust", "scab|spot", "a;b", "['a', 'b']"])
def test_several_labels_in_a_cell_are_refused_by_row_or_taken_as_one_class(tmp_path, several):
    rows = pd.DataFrame({"image": ["0.png", "1.png", "2.png"], "labels": ["scab", "rust", several]})
    write(tmp_path, images("train_images/{}.png", 3) | {"train.csv": rows.to_csv(index=False)})
    with pytest.raises(ValueError, match=r"train\.csv, row 4 \(2\.png\): .* looks like several labels.*label_column='labels'"):
        read(tmp_path)
    dataset = read(tmp_path, label_column="labels")
    assert several in dataset.classes and len(dataset) == 3 and "taken as one class" in remarks(dataset)


def test_names_of_two_words_are_one_label(tmp_path):
    labels = ("cat", "black cat", "owl, barn", "C/C++", "Felis catus")
    rows = pd.DataFrame({"file": [f"{i}.png" for i in range(5)], "label": labels})
    dataset = read(tmp_path, images("{}.png", 5) | {"train.csv": rows.to_csv(index=False)})
    assert sorted(dataset.classes) == sorted(labels)


def test_label_cells_are_read_as_they_stand(tmp_path):
    labels = ["cat", "cat ", " cat", "Cat", "NA", "None", "null", "007", "7", "7.0", "1e3", "True", ""]
    rows = "file,label\n" + "\n".join(f"{i}.png,{label}" for i, label in enumerate(labels))
    dataset = read(tmp_path, images("{}.png", 13) | {"labels.csv": rows})
    assert labels_of(dataset) == ["cat", "cat", "cat", "Cat", "NA", "None", "null", "007", "7", "7.0", "1e3", "True"]
    assert skipped(dataset) == {"12.png": "no label"}
    for remark in ("NA is taken as a class (1 row)", "None is taken", "null is taken", "007 and 7 and 7.0 are"):
        assert remark in remarks(dataset)


def test_several_columns_could_be_the_label(tmp_path):
    rows = csv("file,target,category,label", "{i}.png,1,bird,{c}").replace("0.png,1", "0.png,0")
    dataset = read(tmp_path, images("{}.png", 12) | {"labels.csv": rows})
    assert dataset.classes == ["cat", "dog"] and "labels: column label" in decisions(dataset)
    assert "the labels could also be the column category or target" in remarks(dataset)
    assert read(tmp_path, label_column="Target").classes == ["0", "1"]


def test_an_image_in_two_rows(tmp_path):
    rows = "file,label\n0.png,cat\n1.png,dog\n2.png,cat\n0.png,cat\n1.png,cat\n3.png,dog\n"
    dataset = read(tmp_path, images("{}.png", 4) | {"labels.csv": rows})
    assert list(dataset.items.id) == ["0.png", "2.png", "3.png"]
    assert skipped(dataset) == {"0.png": "row 2 names it too", "1.png": "rows 3, 6 give it different labels: dog, cat"}


# Images


@pytest.mark.parametrize("header", ["Image,Id", "filenames,cats", "FILE,Species", "image path,Class Name", "a,b"])
def test_usual_and_other_names_of_columns(tmp_path, header):
    dataset = read(tmp_path, images("train/{:04x}.jpg", 12) | {"train.csv": csv(header, "{i:04x}.jpg,{c}")})
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 12
    image, label = header.split(",")
    assert f"images: column {image}, e.g. 0000.jpg is train/0000.jpg" in decisions(dataset)
    assert f"labels: column {label}" in decisions(dataset)


@pytest.mark.parametrize("stored, named", [
    ("train/IMG_{}.JPG", "IMG_{i}"),
    ("train/IMG_{}.jpeg", "img_{i}.JPG"),
    ("cat/{}.png", r"cat\{i}.png"),
    ("cat/{}.png", "data/pets/cat/{i}.png"),
    ("cat/{}.png", r"C:\Users\me\cat\{i}.png"),
    ("images/deep/er/{}.png", "{i}.png"),
    ("images/deep/{}.png", "./deep/{i}.png"),
    ("images/{}.png", "https://example.org/files/{i}.png"),
    ("train_images/{}.png", " {i} "),
    (unicodedata.normalize("NFD", "érable/{}.png"), unicodedata.normalize("NFC", "érable/{i}.png")),
])
def test_names_of_images(tmp_path, stored, named):
    dataset = read(tmp_path, images(stored, 12) | {"train.csv": csv("file,label", named + ",{c}")})
    assert list(dataset.items.location) == [stored.format(i) for i in range(12)]
    assert not len(dataset.skipped) and len(dataset.digests) == 12


def test_images_in_folders_of_classes_and_in_several_folders(tmp_path):
    files = {f"images/{'cat' if i % 2 else 'dog'}/{i}.png": None for i in range(12)}
    dataset = read(tmp_path, files | {"train.csv": csv("file,label", "{i}.png,{c}")})
    assert len(dataset) == 12


def test_of_two_images_of_one_name_the_one_of_the_table_is_meant(tmp_path):
    files = images("train/{}.png", 3) | images("test/{}.png", 4) | {"train.csv": csv("id,label", "{i},{c}", 3)}
    dataset = read(tmp_path, files)
    assert list(dataset.items.location) == ["train/0.png", "train/1.png", "train/2.png"]
    assert skipped(dataset) == {f"test/{i}.png": "no row names it" for i in range(4)}
    assert "4 images not used, as no row of train.csv names them" in remarks(dataset)


def test_images_are_not_their_masks(tmp_path):
    files = images("images/{}.jpg", 3) | images("masks/{}.png", 3) | {"labels.csv": csv("id,label", "{i},{c}", 3)}
    assert list(read(tmp_path, files).items.location) == ["images/0.jpg", "images/1.jpg", "images/2.jpg"]


def test_of_two_equally_near_images_none_is_taken(tmp_path):
    files = images("a/{}.png", 4) | images("b/{}.png", 2) | {"labels.csv": csv("id,label", "{i},{c}", 4)}
    dataset = read(tmp_path, files)
    assert list(dataset.items.location) == ["a/2.png", "a/3.png"]
    assert skipped(dataset)["0"] == "several files have this name: a/0.png, b/0.png"


def test_a_missing_image_is_not_replaced_by_one_of_another_folder(tmp_path):
    files = {"cat/0.png": None, "cat/1.png": None, "dog/2.png": None}
    dataset = read(tmp_path, files | {"labels.csv": "file,label\ncat/0.png,cat\ncat/1.png,tiger\ncat/2.png,dog\n"})
    assert skipped(dataset) == {"cat/2.png": "file not found", "dog/2.png": "no row names it"}


def test_a_row_number_is_not_the_image(tmp_path):
    rows = "id,photo,label\n" + "\n".join(f"{i},{(i + 1) % 6}.png,{'ab'[i % 2]}" for i in range(6))
    dataset = read(tmp_path, images("{}.png", 6) | {"labels.csv": rows})
    assert list(dataset.items.location) == ["1.png", "2.png", "3.png", "4.png", "5.png", "0.png"]


def test_a_row_number_that_fits_more_images_than_the_ids_is_not_the_image(tmp_path):
    ids = [(7 * i + 3) % 12 for i in range(12)]
    rows = [f"{row},{99 if row == 5 else i},{'cat' if i % 2 else 'dog'}" for row, i in enumerate(ids)]
    dataset = read(tmp_path, {"labels.csv": "\n".join([",id,label", *rows])} | images("{}.png", 12))
    expected = {f"{i}.png": "cat" if i % 2 else "dog" for row, i in enumerate(ids) if row != 5}
    assert dict(zip(dataset.items.location, labels_of(dataset))) == expected


def test_images_that_no_row_names_are_listed(tmp_path):
    files = images("cat/{}.png", 6) | images("fox/{}.png", 2)
    dataset = read(tmp_path, files | {"train.csv": csv("file,label", "cat/{i}.png,{c}", 6), "notes.md": "x"})
    assert skipped(dataset) == {"fox/0.png": "no row names it", "fox/1.png": "no row names it",
                                "notes.md": "not an image by its name"}


def test_a_table_without_header(tmp_path):
    rows = csv("", "{i}.png,{c}", 6).strip()
    dataset = read(tmp_path, images("{}.png", 6) | {"labels.csv": rows})
    assert len(dataset) == 6 and "no row names the columns" in decisions(dataset)
    rows = "\n".join(f"{i},{'ab'[i % 2]},{i % 3}" for i in range(6))
    with pytest.raises(ValueError, match=r"label_column: column 2 \(2 values: a, b\); column 3 \(3 values"):
        read(tmp_path, {"labels.csv": rows})
    assert read(tmp_path, label_column="column 3").classes == ["0", "1", "2"]


def test_an_archive_with_its_table(tmp_path):
    with zipfile.ZipFile(tmp_path / "kaggle.zip", "w") as archive:
        archive.writestr("train.csv", csv("file,label", "{i}.png,{c}"))
        for i in range(12): archive.writestr(f"images/{i}.png", png(i))
    dataset = read(tmp_path / "kaggle.zip")
    assert len(dataset) == 12 and dataset.images(8).shape == (12, 8, 8, 3)


def test_of_two_archives_the_one_with_the_name_of_the_table_is_meant(tmp_path):
    write(tmp_path, {"train.csv": csv("id,label", "{i},{c}")})
    for split in ("test", "train"):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for i in range(12): archive.writestr(f"{i}.png", png(i))
    assert read(tmp_path).items.location[0] == "train.zip/0.png"


def test_images_in_several_archives(tmp_path):
    write(tmp_path, {"metadata.csv": csv("image,label", "{i},{c}")})
    for part in range(2):
        with zipfile.ZipFile(tmp_path / f"part_{part}.zip", "w") as archive:
            for i in range(6): archive.writestr(f"{6 * part + i}.png", png(i))
    dataset = read(tmp_path)
    assert len(dataset) == 12 and dataset.items.location[6] == "part_1.zip/6.png"
    assert np.array_equal(dataset.images(8)[:6], dataset.images(8)[6:])


def test_images_in_an_archive_beside_the_table(tmp_path):
    write(tmp_path, {"train.csv": csv("file,label", "{i}.png,{c}"), "damaged.zip": b"PK"})
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for i in range(12): archive.writestr(f"photos/{i}.png", png(i))
    dataset = read(tmp_path)
    assert len(dataset) == 12 and "0.png is photos.zip/photos/0.png" in decisions(dataset)


# Which table


@pytest.mark.parametrize("names", [("1", "2"), ("1", "12"), ("7", "8")])
def test_a_table_of_numbered_classes_leaves_it_to_the_folders(tmp_path, names):
    files = images("cat/{}.png", 6) | images("owl/{}.png", 6) | {"owl/12.png": None}
    text = "id,name\n{},cat\n{},owl\n".format(*names)
    dataset = read_dataset(write(tmp_path, files | {"classes.csv": text}))
    assert len(dataset) == 13 and dataset.classes == ["cat", "owl"]
    assert "table classes.csv not used: " in decisions(dataset)


def test_a_table_of_images_in_folders_of_their_own_is_read(tmp_path):
    files = {f"{i}/{i}.png": None for i in range(12)} | {"labels.csv": csv("id,label", "{i},{c}")}
    assert read(tmp_path, files).classes == ["cat", "dog"]


@pytest.mark.parametrize("name", ["{c}/{c}_{i:03d}.png", "{c}/ILSVRC2012_val_{i:08d}.png", "{c}/{c}_{i}.png"])
def test_numbers_of_images_are_not_offered_as_groups(tmp_path, name):
    files = {name.format(c=c, i=i): None for c in ("n01440764", "n01443537") for i in range(8)}
    dataset = read_dataset(write(tmp_path, files))
    assert not dataset.reading.remarks and not dataset.reading.offered_groups


def test_a_table_of_no_images_is_not_used(tmp_path):
    files = images("cat/{}.png", 16) | images("dog/{}.png", 16) | {"classes.csv": "class,latin,count\ncat,Felis,15\ndog,Canis,15\n"}
    tables, reading = find_tables(list_files(write(tmp_path, files)), ReadOptions())
    assert tables == [] and reading.decisions == ("table classes.csv not used: it names none of the images",)
    with pytest.raises(ValueError, match="no table has images and the column dx"):
        find_tables(list_files(tmp_path), ReadOptions(label_column="dx"))


def test_tables_of_the_splits_are_one_data_set(tmp_path):
    files = images("images/{}.png", 9) | {"sample_submission.csv": "file,label\n8.png,cat\n"}
    for i, split in enumerate(("train", "val", "test")):
        files[f"{split}.csv"] = f"file,label\n{2 * i}.png,cat\n{2 * i + 1}.png,dog\n"
    dataset = read(tmp_path, files)
    assert list(dataset.items.split) == ["train"] * 2 + ["validation"] * 2 + ["test"] * 2


def test_tables_of_splits_may_call_their_columns_differently(tmp_path):
    tables = {"train.csv": csv("filename,label", "{i}.png,{c}", 8),
              "test.csv": csv("image,class", "{i}.png,{c}", 12).replace("\n0.png", "\n")}
    dataset = read(tmp_path, tables | images("{}.png", 12))
    assert list(dataset.items.split) == ["train"] * 8 + ["test"] * 4
    assert labels_of(dataset) == ["cat", "dog"] * 6


def test_the_tables_of_a_competition(tmp_path):
    files = images("images/{}.png", 9) | {"train.csv": csv("image,label", "images/{i}.png,{c}", 6),
                                          "test.csv": "image\nimages/7.png\nimages/6.png\nimages/8.png\n"}
    dataset = read(tmp_path, files)
    assert len(dataset) == 6 and "table test.csv not used: it has no column of labels" in decisions(dataset)
    unknown = unlabelled_from_table("test", list_files(tmp_path), "test.csv", dataset.classes, ReadOptions())
    assert list(unknown.items.id) == ["images/7.png", "images/6.png", "images/8.png"]
    write(tmp_path, {"test.csv": "image\nimages/7.png\nimages/60.png\n"})
    with pytest.raises(ValueError, match=r"test\.csv: 1 images were not found, e\.g\. 'images/60\.png'"):
        unlabelled_from_table("test", list_files(tmp_path), "test.csv", dataset.classes, ReadOptions())


def test_metadata_in_the_folders_of_splits(tmp_path):
    files = {}
    for split in ("train", "test"):
        rows = [{"file_name": f"{i}.png", "label": i % 2, "caption": f"caption {i}"} for i in range(4)]
        files |= images(split + "/{}.png", 4) | {f"{split}/metadata.jsonl": "\n".join(map(json.dumps, rows))}
    dataset = read(tmp_path, files)
    assert dataset.classes == ["0", "1"] and list(dataset.items.split) == ["train"] * 4 + ["test"] * 4
    assert list(dataset.items.location) == list(dataset.items.id)  # 0.png is in both folders


def test_lists_of_the_images_of_each_split(tmp_path):
    files = {f"images/{label}/{i}.jpg": None for label in ("cat", "dog") for i in range(6)}
    for split, numbers in (("train", range(4)), ("test", (4, 5))):
        lines = [f"{label}/{i}" for label in ("cat", "dog") for i in numbers]
        files |= {f"meta/{split}.txt": "\n".join(lines), f"meta/{split}.json": json.dumps(
            {label: [line for line in lines if line.startswith(label)] for label in ("cat", "dog")})}
    for ending in ("json", "txt"):
        write(tmp_path, files)
        for split in ("train", "test"): (tmp_path / f"meta/{split}.{ending}").unlink()
        dataset = read(tmp_path)
        assert labels_of(dataset) == ["cat"] * 4 + ["dog"] * 4 + ["cat"] * 2 + ["dog"] * 2
        assert list(dataset.items.split) == ["train"] * 8 + ["test"] * 4


def test_a_table_of_one_split_does_not_replace_the_class_folders_of_others(tmp_path):  # Tiny ImageNet
    rows = [f"val_{i}.png\tn0{i % 2}\t0\t32\t44\t62" for i in range(6)]
    files = images("train/n00/images/{}.png", 4) | images("train/n01/images/{}.png", 4)
    files |= images("val/images/val_{}.png", 6) | {"val/val_annotations.txt": "\n".join(rows)}
    dataset = read_dataset(write(tmp_path, files))
    assert dataset.classes == ["n00", "n01"] and len(dataset) == 8
    assert "table val/val_annotations.txt not used: it is about one split" in remarks(dataset)
    assert "6 files not used, not in a class folder" in remarks(dataset)
    assert len(read_dataset(tmp_path, label_column="column 2")) == 6


def test_tables_without_labels_leave_the_classes_to_folders(tmp_path):  # ImageNet of Kaggle
    files = images("data/train/n00/n00_{}.png", 4) | images("data/train/n01/n01_{}.png", 4)
    files |= images("data/val/v_{}.png", 4)
    train = [f"n0{c}_{i}" for c in (0, 1) for i in range(4)]
    for split, names in (("train", train), ("val", [f"v_{i}" for i in range(4)])):
        rows = [f"{name},n0{i % 2} {i} 2 {i + 20} 40" for i, name in enumerate(names)]
        files[f"{split}_solution.csv"] = "\n".join(["ImageId,PredictionString", *rows])
    dataset = read_dataset(write(tmp_path, files))
    assert dataset.classes == ["n00", "n01"] and len(dataset) == 8
    assert "table train_solution.csv, val_solution.csv not used: not all their images have labels" in remarks(dataset)
    with pytest.raises(ValueError, match="train.csv: no column of labels"):
        read_dataset(write(tmp_path / "flat", images("{}.png", 12) | {
            f"{split}.csv": csv("image,size", "{i}.png,{i}", 12) for split in ("train", "test")}))


def test_an_image_in_two_splits_is_told(tmp_path):
    rows = [f"{i}.png,{'cat' if i % 2 else 'dog'}" for i in range(12)]
    tables = {"train.csv": rows[:8] + rows[:1], "test.csv": rows[6:]}
    files = {name: "\n".join(["file,label", *own]) for name, own in tables.items()} | images("{}.png", 12)
    dataset = read(tmp_path, files)
    reasons = [f"row {i} names it too, for another split" for i in (8, 9)]
    assert list(dataset.skipped.reason) == ["row 2 names it too", *reasons]
    assert "row ... names it too, for another split (2)" in remarks(dataset)


def test_a_table_of_groups_beside_class_folders(tmp_path):
    files = {f"{label}/{i}.jpg": None for label in ("cat", "dog") for i in range(6)}
    rows = "\n".join(f"{name},P{i // 2},{'train' if i % 6 else 'test'}" for i, name in enumerate(files))
    dataset = read(tmp_path, files | {"patients.csv": "file,patient_id,split\n" + rows})
    assert labels_of(dataset) == ["cat"] * 6 + ["dog"] * 6 and set(dataset.items.split) == {"train", "test"}
    assert dataset.reading.offered_groups == ("patient_id",)
    assert "labels: the folder of each image" in decisions(dataset)
    assert read(tmp_path, group_column="patient_id").items.group.nunique() == 6


def test_a_table_with_clear_labels_goes_before_others(tmp_path):
    rows = "image,MEL,NV\n" + "\n".join(f"{i},{i % 2},{1 - i % 2}" for i in range(12))
    metadata = "image,sex,site\n" + "\n".join(f"{i},{'mf'[i % 2]},{'ab'[i % 2]}" for i in range(12))
    dataset = read(tmp_path, images("{}.jpg", 12) | {"Training_GroundTruth.csv": rows, "metadata.csv": metadata})
    assert dataset.classes == ["MEL", "NV"]


def test_a_list_of_numbers_has_no_labels(tmp_path):
    files = images("images/cat/{}.png", 6) | {"images.txt": "\n".join(f"{i + 1} cat/{i}.png" for i in range(6))}
    tables, reading = find_tables(list_files(write(tmp_path, files)), ReadOptions())
    assert tables == [] and reading.decisions == ("table images.txt not used: it has no column of labels",)


def test_several_tables_have_to_be_told_apart(tmp_path):
    rows = csv("file,label", "{i}.png,{c}")
    write(tmp_path, images("{}.png", 12) | {"first.csv": rows, "second.csv": rows})
    with pytest.raises(ValueError, match=r"2 tables that name images and labels: first\.csv, second\.csv"):
        read(tmp_path)
    write(tmp_path, {"labels.csv": csv("file,label", "{i}.png,{c}")})
    assert "table first.csv not used: another table has the labels" in decisions(read(tmp_path))


# Splits and groups


def test_a_split_column_is_used(tmp_path):
    splits = ["Train", "train", "training", "valid", "dev", "TEST", "eval", "test_set", ""]
    rows = "file,label,Set\n" + "\n".join(f"{i}.png,{'ab'[i % 2]},{split}" for i, split in enumerate(splits))
    dataset = read(tmp_path, images("{}.png", 9) | {"labels.csv": rows})
    assert list(dataset.items.split) == ["train"] * 3 + ["validation"] * 2 + ["test"] * 3
    assert skipped(dataset) == {"8.png": "no split"} and "split: column Set" in decisions(dataset)


def test_a_split_with_other_values(tmp_path):
    rows = "file,label,split\n0.png,a,train\n1.png,b,rest\n2.png,a,test\n"
    write(tmp_path, images("{}.png", 4) | {"labels.csv": rows})
    with pytest.raises(ValueError, match=r"labels\.csv, row 3: the column split has 'rest'"):
        read(tmp_path)
    write(tmp_path, {"labels.csv": "file,label,set\n0.png,a,A\n1.png,b,B\n"})
    dataset = read(tmp_path)
    assert "split" not in dataset.items and "the column set is not used as a split: 'A', 'B'" in remarks(dataset)
    with pytest.raises(ValueError, match="column set has 'A', 'B', which are no splits"):
        read(tmp_path, split_column="set")


def test_the_folders_of_the_images_are_their_splits(tmp_path):
    files = images("train/{}.jpg", 6) | images("valid/{}.jpg", 4) | {"metadata.csv": csv("file_name,label", "train/{i}.jpg,{c}", 6)
                                                                     + "\n" + csv("", "valid/{i}.jpg,{c}", 4).strip()}
    dataset = read(tmp_path, files)
    assert list(dataset.items.split) == ["train"] * 6 + ["validation"] * 4
    assert "split: the folders of the images (6 train, 4 validation)" in decisions(dataset)


@pytest.mark.parametrize("column, yes, no", [("is_valid", "validation", "train"), ("is_train", "train", "test"),
                                             ("is_training_image", "train", "test"), ("isTest", "test", "train")])
def test_a_column_that_says_yes_or_no_to_a_split(tmp_path, column, yes, no):
    dataset = read(tmp_path, images("{}.png", 12) | {"labels.csv": csv(f"file,label,{column}", "{i}.png,{c},False")
                                                     .replace("0.png,cat,False", "0.png,cat,True")})
    assert dataset.items.split[0] == yes and dataset.items.split[1] == no


def test_columns_of_yes_and_no_are_read_together(tmp_path):
    rows = [f"{i}.png,{'cat' if i % 2 else 'dog'},{int(i < 6)},{int(6 <= i < 9)},{int(i >= 9)}" for i in range(12)]
    files = {"labels.csv": "\n".join(["file,label,is_train,is_val,is_test", *rows])} | images("{}.png", 12)
    expected = ["train"] * 6 + ["validation"] * 3 + ["test"] * 3
    assert list(read(tmp_path, files).items.split) == expected
    assert list(read(tmp_path, split_column="is_train").items.split) == expected
    write(tmp_path, {"labels.csv": "\n".join(["file,label,is_train,is_val,is_test", *rows, "0.png,cat,1,1,0"])})
    with pytest.raises(ValueError, match="row 14: several of the columns is_train, is_val, is_test say yes"):
        read(tmp_path)


def test_a_column_called_as_a_split_of_yes_and_no(tmp_path):
    write(tmp_path, images("{}.png", 12))
    rows = [f"{i}.png,{'cat' if i % 2 else 'dog'},{i < 9}" for i in range(12)]
    write(tmp_path, {"labels.csv": "\n".join(["file,label,train", *rows])})
    assert list(read(tmp_path).items.split) == ["train"] * 9 + ["test"] * 3
    write(tmp_path, {"labels.csv": "\n".join(["file,label,valid", *rows])})
    dataset = read(tmp_path)
    assert "split" not in dataset.items
    assert "the column valid has yes and no; if it marks a split, give split_column='valid'" in dataset.reading.remarks
    assert list(read(tmp_path, split_column="valid").items.split) == ["validation"] * 9 + ["train"] * 3
    write(tmp_path, {"labels.csv": "file,train,bus\n" + "\n".join(f"{i}.png,{i % 2},{1 - i % 2}" for i in range(12))})
    assert read(tmp_path).classes == ["bus", "train"]


@pytest.mark.parametrize("name, content", [
    ("split.json", json.dumps({split: [f"{c}/{i}.png" for c in ("cat", "dog") for i in numbers]
                               for split, numbers in (("train", (0, 1, 2)), ("test", (3,)))})),
    ("list.txt", "\n".join(f"{c}/{i}.png {'test' if i == 3 else 'train'}" for c in ("cat", "dog") for i in range(4))),
])
def test_names_of_splits_are_no_classes(tmp_path, name, content):
    write(tmp_path, {name: content} | images("cat/{}.png", 4) | images("dog/{}.png", 4))
    dataset = read(tmp_path)
    assert dataset.classes == ["cat", "dog"]
    assert set(dataset.items.location[dataset.items.split == "test"]) == {"cat/3.png", "dog/3.png"}


def test_groups(tmp_path):
    rows = "file,label,class_id,plant_id,patientID,width\n" + "\n".join(
        f"{i}.png,{'ab'[i % 2]},{i % 2},P{i // 4},{i // 2},8" for i in range(8))
    dataset = read(tmp_path, images("{}.png", 8) | {"labels.csv": rows})
    assert dataset.reading.offered_groups == ("plant_id", "patientID") and dataset.items.group.nunique() == 8
    assert read(tmp_path, group_column="plant_id").items.group.nunique() == 2
    assert read(tmp_path, group_column="patientid, plant_id").items.group.nunique() == 2
    write(tmp_path, {"labels.csv": rows.replace("plant_id", "leaf_group")})
    assert read(tmp_path).items.group.nunique() == 2


# Formats


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_what_pandas_writes_is_read_cell_by_cell(rows, encoding):
    frame = pd.DataFrame(rows, columns=["file", "label"])
    cells = read_table(frame.to_csv(index=False).encode(encoding), "x.csv").cells
    assert cells.map(str.strip).values.tolist() == frame.map(str.strip).values.tolist()


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-16-le"])
def test_separators_and_encodings(tmp_path, separator, encoding):
    text = csv("file,label", "{i}.png,{c}", labels=("chêne", "érable"), separator=separator).replace("\n", "\r\n")
    dataset = read(tmp_path, images("{}.png", 12) | {"labels.csv": text.encode(encoding)})
    assert dataset.classes == ["chêne", "érable"]
    assert ("separator" in decisions(dataset)) == (separator != ",")
    assert ("encoding" in decisions(dataset)) == (encoding not in ("utf-8", "utf-8-sig"))


def test_the_same_table_in_every_format(tmp_path):
    frame = pd.DataFrame({"image": ["007", "008", "009"], "label": ["1", "2", "1"], "age": ["3", "", "5"]})
    files = {"a.csv": frame.to_csv(index=False).encode(), "b.tsv": frame.to_csv(index=False, sep="\t").encode(),
             "c.jsonl": frame.to_json(orient="records", lines=True).encode(),
             "d.json": frame.to_json(orient="records").encode(), "e.json": json.dumps(frame.to_dict("list")).encode()}
    for name, write_to in (("f.parquet", frame.to_parquet), ("g.xlsx", lambda file: frame.to_excel(file, index=False))):
        file = io.BytesIO()
        write_to(file)
        files[name] = file.getvalue()
    for name, content in files.items():
        assert read_table(content, name).cells.values.tolist() == frame.values.tolist(), name


def test_excel_shows_numbers_as_they_are_seen():
    book = openpyxl.Workbook()
    book.active.append(["image", "label", "weight"])
    book.active.append([7, 1.0, 1.5])
    book.active["A2"].number_format = "000"
    book.active.title = "leaves"
    book.copy_worksheet(book.active).title = "notes"
    file = io.BytesIO()
    book.save(file)
    table = read_table(file.getvalue(), "x.xlsx")
    assert table.cells.values.tolist() == [["007", "1", "1.5"]] and table.notes == ("worksheet 'leaves' of leaves, notes",)


def test_numbers_of_parquet_keep_their_type():
    file = io.BytesIO()
    columns = {"image": [7, 8], "label": [1.0, 2.5], "patient": pd.Categorical(["a", None]), "ok": [True, False]}
    pd.DataFrame(columns).to_parquet(file)
    assert read_table(file.getvalue(), "x").cells.values.tolist() == [["7", "1.0", "a", "True"], ["8", "2.5", "", "False"]]


def test_coco(tmp_path):
    document = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(5)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [{"image_id": i, "category_id": (3, 9)[i % 2], "bbox": [0, 0, 1, 1]} for i in (0, 1, 2, 3, 3)]}
    dataset = read(tmp_path, images("data/{}.png", 5) | {"annotations/instances.json": json.dumps(document)})
    assert labels_of(dataset) == ["cat", "dog", "cat", "dog"] and skipped(dataset) == {"4.png": "no label"}
    document["annotations"].append({"image_id": 0, "category_id": 9})
    write(tmp_path, {"annotations/instances.json": json.dumps(document)})
    with pytest.raises(ValueError, match=r"\(0\.png\): 'cat\|dog' looks like several labels"):
        read(tmp_path)


@pytest.mark.parametrize("document", [
    {"0.png": "cat", "1.png": "dog"},
    {"labels": [["0.png", "cat"], ["1.png", "dog"]]},
    {"0.png": {"label": "cat"}, "1.png": {"label": "dog"}},
])
def test_other_json(tmp_path, document):
    assert labels_of(read(tmp_path, images("{}.png", 2) | {"dataset.json": json.dumps(document)})) == ["cat", "dog"]


@pytest.mark.parametrize("name, content, message", [
    ("x.csv", b"", "x.csv: the table is empty"),
    ("x.csv", bytes(range(256)), "x.csv: it is not text"),
    ("x.csv", b"file,label\n0.png,cat,dog\n", "x.csv, row 2: 3 cells, but the first row has 2"),
    ("x.csv", b'file,label\n0.png,"cat\n1.png,dog\n' + b"x" * 200_000, "x.csv, after row .*quotation mark"),
    ("x.xlsx", b"file,label", "x.xlsx is no xlsx file by its content"),
    ("x.xlsx", b"PK\3\4 no zip", "x.xlsx: the Excel file cannot be read"),
    ("x.xls", b"\xd0\xcf\x11\xe0", "x.xls: an Excel file of the old kind"),
    ("x.parquet", b"PAR1 no parquet", "x.parquet: damaged Parquet"),
    ("x.json", b'{"a": [1, 2', "x.json: damaged JSON"),
    ("x.json", b"[1, 2]", "x.json: no rows"),
])
def test_what_is_no_table_is_named(name, content, message):
    with pytest.raises(ValueError, match=message):
        read_table(content, name)


# Arrays


def pixels(*shape, kind="uint8"):
    return np.random.default_rng(0).integers(0, 256, shape).astype(kind)


def read_npz(folder, save=np.savez_compressed, options=None, **arrays):
    save(folder / "x.npz", **arrays)
    return dataset_from_arrays("x", folder / "x.npz", options or ReadOptions())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("image, label", [("{}_images", "{}_labels"), ("x_{}", "y_{}"), ("X{}", "Y{}")])
def test_splits_of_an_npz(tmp_path, save, image, label):
    arrays, sizes = {}, {"train": 6, "val": 2, "test": 4}
    for split, n in sizes.items():
        arrays |= {image.format(split): pixels(n, 8, 8, 3), label.format(split): (np.arange(n) % 2)[:, None]}
    dataset = read_npz(tmp_path, save, **arrays)
    assert list(dataset.items.split) == ["train"] * 6 + ["validation"] * 2 + ["test"] * 4
    assert list(dataset.labels) == [0, 1] * 6
    assert np.array_equal(dataset.images(8), np.concatenate([arrays[image.format(split)] for split in sizes]))


@pytest.mark.parametrize("kind", ["uint8", "int64", "float32"])
@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 8, 8, 1), (6, 8, 8, 3), (6, 3, 8, 8)])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_kinds_of_images(tmp_path, kind, shape, save):
    array = pixels(*shape, kind=kind)
    expected = np.moveaxis(array, 1, -1) if shape[1] == 3 else array.reshape(6, 8, 8, -1)
    dataset = read_npz(tmp_path, save, images=array, labels=np.arange(6) % 2)
    assert np.array_equal(dataset.images(8), np.broadcast_to(expected, (6, 8, 8, 3)))


def test_floats_from_0_to_1(tmp_path):
    array = pixels(6, 8, 8)
    dataset = read_npz(tmp_path, images=(array / 255).astype("float32"), labels=np.arange(6) % 2)
    assert np.array_equal(dataset.images(8)[..., 0], array)


@pytest.mark.parametrize("labels, classes", [
    (["cat", "dog"] * 3, ["cat", "dog"]), ([b"cat", b"dog"] * 3, ["cat", "dog"]), ([0., 1.] * 3, ["0", "1"]),
    ([[0, 1], [1, 0]] * 3, ["0", "1"]), ([3, 10] * 3, ["3", "10"]), ([True, False] * 3, ["False", "True"])])
def test_kinds_of_labels(tmp_path, labels, classes):
    assert read_npz(tmp_path, images=pixels(6, 8, 8), labels=np.array(labels)).classes == classes


def test_names_of_classes(tmp_path):
    names = np.array(["fox", "cat", "dog"])
    for labels in ([1, 2, 1], ["cat", "dog", "cat"]):
        dataset = read_npz(tmp_path, images=pixels(3, 8, 8), labels=np.array(labels), classes=names)
        assert dataset.classes == ["fox", "cat", "dog"] and list(dataset.labels) == [1, 2, 1]
    with pytest.raises(ValueError, match="the label of image 1 is 3, but 3 classes have the numbers 0 to 2"):
        read_npz(tmp_path, images=pixels(3, 8, 8), labels=np.array([1, 3, 1]), classes=names)
    with pytest.raises(ValueError, match="the label 'owl' is none of the classes fox, cat, dog"):
        read_npz(tmp_path, images=pixels(3, 8, 8), labels=np.array(["cat", "owl", ""]), classes=names)


def test_other_arrays_are_columns_or_remarked(tmp_path):
    arrays = {"ids": ["k", "l", "m", "n"], "groups": [1, 1, 2, 2], "split": ["train", "test"] * 2, "mean": [0, 0, 0]}
    arrays = {name: np.array(values) for name, values in arrays.items()}
    labels = np.array(["a", "b", "", "a"])
    dataset = read_npz(tmp_path, images=pixels(4, 8, 8), labels=labels, age=np.arange(4), **arrays)
    assert dataset.items[["id", "group", "split", "age"]].values.tolist() == [
        ["k", "1", "train", 0], ["l", "1", "test", 1], ["n", "2", "test", 3]]
    assert skipped(dataset) == {"m": "no label"} and "arrays not used" in remarks(dataset)
    assert "mean (3,)" in remarks(dataset)
    chosen = ReadOptions(image_column="scans", label_column="grade")
    arrays = {"scans": pixels(2, 8, 8), "grade": np.array([2, 3]), "labels": np.array([0, 0])}
    assert read_npz(tmp_path, options=chosen, **arrays).classes == ["2", "3"]


@pytest.mark.parametrize("arrays, message", [
    ({"images": pixels(3, 8, 8)}, "no pair of images and labels among the arrays images"),
    ({"images": pixels(3, 8, 8), "labels": np.arange(2)}, r"labels\.npy: 3 images but \(2,\) labels"),
    ({"images": pixels(3, 64), "labels": np.arange(3)}, r"x\.npz: images have the shape \(3, 64\)"),
    ({"images": pixels(3, 8, 8) / 127.5 - 1, "labels": np.arange(3)}, r"x\.npz: images are float64 from -1"),
    ({"images": np.array([None] * 3), "labels": np.arange(3)}, r"images\.npy contains Python objects"),
    ({"images": pixels(3, 8, 8), "labels": np.array([0, 1, .5])}, "the label of image 2 is 0.5, which is no class"),
    ({"images": pixels(3, 8, 8), "labels": np.array([0, 1, np.nan])}, "the label of image 2 is nan"),
    ({"images": pixels(3, 8, 8), "labels": np.array([[1, 1], [1, 0], [0, 1]])}, r"the labels of image 0 are \[1, 1\]"),
    ({"x_train": pixels(3, 8, 8), "y_train": np.arange(3), "x_test": pixels(3, 9, 9), "y_test": np.arange(3)},
     r"x_test\.npy has images of \(9, 9\), uint8, but x_train of \(8, 8\), uint8"),
])
def test_arrays_that_are_no_data_set_say_why(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        read_npz(tmp_path, **arrays)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_arrays_are_named(tmp_path, save):
    save(tmp_path / "x.npz", images=pixels(200, 8, 8), labels=np.arange(200) % 2)
    content = (tmp_path / "x.npz").read_bytes()
    for damaged in (content[:500], content[:-500], b"<html>", b"", content[:300] + bytes(2000) + content[2300:]):
        (tmp_path / "x.npz").write_bytes(damaged)
        if damaged[300:400] == bytes(100) and save is np.savez:
            continue  # values that were changed in place
        with pytest.raises(ValueError, match=r"x\.npz.*damaged"):
            dataset_from_arrays("x", tmp_path / "x.npz", ReadOptions())


def test_an_npy_file_named_npz(tmp_path):
    np.save(tmp_path / "x.npy", pixels(3, 8, 8))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"x\.npz is an npy file by its content"):
        dataset_from_arrays("x", tmp_path / "x.npz", ReadOptions())


def test_npy_files_in_folders_of_splits(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "images.npy", pixels(4, 8, 8))
        np.save(tmp_path / split / "labels.npy", np.arange(4) % 2)
    dataset = dataset_from_arrays("folders", find_arrays(list_files(tmp_path)), ReadOptions())
    assert list(dataset.items.split) == ["train"] * 4 + ["test"] * 4


@pytest.mark.parametrize("names", [("images", "labels"), ("X", "y"), ("x_train", "y_train")])
def test_npy_pairs(tmp_path, names):
    array = pixels(4, 8, 8, 3)
    np.save(tmp_path / f"{names[0]}.npy", np.asfortranarray(array))
    np.save(tmp_path / f"{names[1]}.npy", np.array([0, 1, 0, 1]))
    for path in (find_arrays(list_files(tmp_path)), tmp_path / f"{names[0]}.npy"):
        dataset = dataset_from_arrays("pair", path, ReadOptions())
        assert np.array_equal(dataset.images(8), array)
    write(tmp_path, {"cat/1.png": None})
    assert find_arrays(list_files(tmp_path)) is None


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_worker_gets_the_place_of_the_images(tmp_path, save):
    array = pixels(400, 16, 16, 3)
    dataset = read_npz(tmp_path, save, images=array, labels=np.arange(400) % 2)
    sent = pickle.dumps(dataset.source)
    assert len(sent) < 2000 < array.nbytes
    assert np.array_equal(np.asarray(pickle.loads(sent).image(399)), array[399])


def noise(count, high=256, kind="uint8"):
    return np.random.default_rng(0).integers(0, high, (count, 8, 8, 3)).astype(kind)


@pytest.mark.parametrize("train, test, told", [
    (noise(12) / 255, noise(6, kind="float64"), "x_train to 1, x_test to 255"),
    (noise(12, kind="uint16"), noise(6, 60_000, "uint16"), "x_train to 255, x_test to more than 255"),
])
def test_splits_that_are_scaled_differently_are_refused(tmp_path, train, test, told):
    labels = {"y_train": np.arange(12) % 2, "y_test": np.arange(6) % 2}
    np.savez(tmp_path / "x.npz", x_train=train, x_test=test, **labels)
    with pytest.raises(ValueError, match=re.escape(f"the splits are scaled differently ({told})")):
        read_dataset(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", x_train=train, x_test=train[:6], **labels)
    assert len(read_dataset(tmp_path / "y.npz")) == 18


def test_groups_in_arrays_are_offered_and_used(tmp_path):
    np.savez(tmp_path / "x.npz", images=noise(12), labels=np.arange(12) % 2 - 1, patients=np.arange(12) // 4)
    dataset = read_dataset(tmp_path / "x.npz")
    assert dataset.reading.offered_groups == ("patients",)
    assert "-1 is taken as a class (6 rows)" in remarks(dataset)
    dataset = read_dataset(tmp_path / "x.npz", group_column="patients")
    assert dataset.items.group.nunique() == 3
    assert "groups: images that share patients" in dataset.reading.decisions


@pytest.mark.parametrize("option", ["group_column", "split_column"])
def test_an_option_for_an_array_that_is_not_there_is_refused(tmp_path, option):
    np.savez(tmp_path / "x.npz", images=noise(12), labels=np.arange(12) % 2)
    with pytest.raises(ValueError, match=f"x.npz has no array 'other' for {option}; its arrays are images, labels"):
        read_dataset(tmp_path / "x.npz", **{option: "other"})


def write_zeros(path, name, shape):
    "Add an array of zeros that takes little room in the archive."
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{name}.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(file, header)
        for _ in range(int(np.prod(shape)) // 2**20):
            file.write(bytes(2**20))


def test_arrays_that_expand_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("course_ml.arrays.MOST_BYTES", 2**22)
    np.savez_compressed(tmp_path / "x.npz", labels=np.arange(12) % 2)
    write_zeros(tmp_path / "x.npz", "images", (12, 2048, 2048))
    with pytest.raises(ValueError, match="x.npz unpacks to 50,331,648 bytes, but .* are accepted"):
        read_dataset(tmp_path / "x.npz")
    np.savez_compressed(tmp_path / "y.npz", images=noise(12))
    write_zeros(tmp_path / "y.npz", "labels", (12, 2**20))
    with pytest.raises(ValueError, match="labels.npy has 12,582,912 bytes, more than the 4,194,304"):
        read_dataset(tmp_path / "y.npz")


def test_images_in_archives_are_hashed_once(tmp_path, monkeypatch):
    "What an archive next to a table remembers of its members counts for the data set as well."
    for part, count in (("one", 2), ("two", 3)):
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as archive:
            for number in range(count):
                archive.writestr(f"{part}{number}.png", png(10 * count + number))
    names = ["two2", "one0", "two0", "one1", "two1"]
    (tmp_path / "train.csv").write_text("file,label\n" + "".join(f"{name}.png,{name[:3]}\n" for name in names))
    first = read_dataset(tmp_path)
    contents = [first.source.content(location) for location in first.items.location]
    assert list(first.digests) == [hashlib.sha256(content).hexdigest()[:32] for content in contents]

    def never(*arguments):
        raise AssertionError("an image is read again")

    monkeypatch.setattr("course_ml.image_sources.ZipImages.content", never)
    assert read_dataset(tmp_path).fingerprint == first.fingerprint


# Encodings that are not UTF-8, and limits

@pytest.mark.parametrize("encoding, said, names", [
    ("gbk", "guessed to be gb18030", ("玫瑰", "向日葵", "郁金香")),
    ("shift_jis", "guessed to be cp932", ("さくら", "ひまわり", "チューリップ")),
    ("cp1251", "guessed to be cp1251", ("кошка", "собака", "лошадь")),
    ("cp1252", "taken for cp1252", ("chêne", "érable", "tilleul")),
    ("cp1252", "taken for cp1252", ("Löwenzahn", "Gänseblümchen", "Buche")),
    ("cp1252", "taken for cp1252", ("Piñón", "año", "té")),
])
def test_encodings(tmp_path, encoding, said, names):
    table = csv("file,label", "{i}.png,{c}", 30, names).encode(encoding)
    dataset = read(tmp_path, images("{}.png", 30) | {"train.csv": table})
    assert set(dataset.classes) == set(names) and f"encoding: not UTF-8, {said}" in decisions(dataset)


@pytest.mark.parametrize("name", ["train.csv", "train.parquet"])
def test_a_table_with_too_many_cells_is_refused(tmp_path, monkeypatch, name):
    files = images("{}.png", 12) | {"train.csv": csv("file,label", "{i}.png,{c}")}
    frame = pd.read_csv(io.StringIO(files["train.csv"]))
    write(tmp_path, files)
    frame.to_parquet(tmp_path / "train.parquet")
    monkeypatch.setattr("course_ml.table_files.MOST_CELLS", 23)
    with pytest.raises(ValueError, match=f"{name}: the table has more than the 23 cells that are accepted"):
        read(tmp_path / name)


def test_a_table_is_read_once(tmp_path, monkeypatch):
    listing = list_files(write(tmp_path, images("{}.png", 12) | {"train.csv": csv("file,label", "{i}.png,{c}")}))
    reads = []
    monkeypatch.setattr("course_ml.tables.read_table", lambda *given: reads.append(given[1]) or read_table(*given))
    tables, _ = find_tables(listing, ReadOptions())
    assert len(dataset_from_table("once", listing, tables, ReadOptions())) == 12 and reads == ["train.csv"]
