"""Folders as people have them, and splits of any shape."""

import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import course_ml
from course_ml import image_cache, image_sources
from course_ml.data import Dataset, Split
from course_ml.decoding import UnreadableImage
from course_ml.image_sources import ArrayImages
from course_ml.readers import read_dataset


def make_image(seed, size=(40, 30), mode="RGB"):
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, *channels), dtype="uint8")
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def trouble(tmp_path):
    "Two classes of ten images; a truncated JPEG, a text file named .png, an empty file, a class of one, two labels."
    folder = tmp_path / "images"
    for c, name in enumerate(("birds", "fish")):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            make_image(100 * c + i).save(folder / name / f"{i}.jpg", quality=95)
    (folder / "birds" / "cut.jpg").write_bytes((folder / "birds" / "3.jpg").read_bytes()[:-400])
    (folder / "birds" / "text.png").write_text("not an image")
    (folder / "fish" / "empty.webp").touch()
    (folder / "fish" / "again.jpg").write_bytes((folder / "birds" / "0.jpg").read_bytes())
    (folder / "snails").mkdir()
    make_image(999).save(folder / "snails" / "only.png")
    return folder


def test_check_says_exactly_what_is_there(trouble):
    found = read_dataset(trouble).check()
    reasons = found.quarantine.set_index("id").reason
    assert set(reasons.index) == {"birds/cut.jpg", "birds/text.png", "fish/empty.webp"}
    assert (
        reasons["birds/cut.jpg"].startswith("damaged")
        and "not an image" in reasons["birds/text.png"]
        and "empty" in reasons["fish/empty.webp"]
    )
    exact = found.duplicates[found.duplicates.kind == "exact"]
    assert exact[["id", "other", "same_label"]].values.tolist() == [["birds/0.jpg", "fish/again.jpg", False]]
    assert found.counts.set_index("class").images.to_dict() == {"birds": 12, "fish": 12, "snails": 1}


def test_unreadable_images_are_named_and_never_replaced(trouble):
    dataset = read_dataset(trouble)
    with pytest.raises(UnreadableImage, match="birds/cut.jpg"):
        dataset.images(32)
    clean = dataset.without(dataset.check().quarantine)
    assert len(clean.images(32)) == len(clean) == 22 and len(clean.skipped) == 3


def test_a_class_of_one_is_refused_with_its_name(trouble):
    dataset = read_dataset(trouble)
    dataset = dataset.without(dataset.check().quarantine)
    with pytest.raises(ValueError, match="'snails' has 1"):
        Split.holdout(dataset)
    assert Split.holdout(dataset.drop_classes(["snails"])).counts(dataset.drop_classes(["snails"])).shape == (2, 3)


def test_both_duplicates_land_in_one_split(trouble):
    dataset = read_dataset(trouble)
    check = dataset.check()
    dataset = (
        dataset.without(check.quarantine)
        .drop_classes(["snails"])
        .grouped(check.duplicates[check.duplicates.kind == "exact"])
    )
    for seed in range(20):
        split = dict(zip(dataset.items.id, Split.holdout(dataset, seed=seed).splits))
        assert split["birds/0.jpg"] == split["fish/again.jpg"]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_formats_and_modes(tmp_path, suffix, mode):
    image = make_image(5, mode="RGB" if mode == "P" else mode)
    if mode == "P":
        image = image.quantize(64)
    if suffix in ("jpg", "webp") and mode in ("RGBA", "P"):
        image = image.convert("RGB")
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
    assert np.corrcoef(gray.ravel(), ramp.ravel())[0, 1] > 0.9999 and gray.max() == 255 and gray.min() == 0


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
    np.savez(
        tmp_path / "arrays.npz",
        images=np.stack([np.asarray(i) for i in images.values()]),
        labels=np.array([n[0] for n in images]),
    )
    sets = [read_dataset(tmp_path / p) for p in ("folder", "archive.zip", "table", "table/train.csv", "arrays.npz")]
    for dataset in sets:
        assert dataset.classes == ["a", "b"] and list(dataset.labels) == [0] * 4 + [1] * 4
        assert np.array_equal(dataset.images(32), sets[0].images(32))


@pytest.mark.parametrize(
    "content, message",
    [
        ("photo,label\na.png,x", "all images have the class 'x'"),
        ("file,color,shape\na.png,x,y", "no column of labels among file, color, shape"),
        ("file,label\nnowhere.png,x", "none of the images was found"),
        ("file,label\na.png,x\na.png,y", "rows 2, 3 give it different labels"),
    ],
)
def test_tables_that_cannot_be_read_say_why(tmp_path, content, message):
    make_image(1).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_dataset(tmp_path / "t.csv")




def test_a_damaged_cache_of_another_data_set_is_never_used(tmp_path):
    first = Dataset.from_arrays("a", np.zeros((2, 8, 8, 3), "uint8"), [0, 1])
    second = replace(first, source=type(first.source)(np.ones((2, 8, 8, 3), "uint8")))
    assert first.images(4).max() == 0 and second.images(4).min() == 1


# Digests and fingerprints


def test_digests_are_computed_once_and_carried(trouble, monkeypatch):
    digested = []
    compute = image_sources.file_digests
    monkeypatch.setattr(image_sources, "file_digests", lambda paths: digested.extend(paths) or compute(paths))
    dataset = read_dataset(trouble)
    check = dataset.check()
    assert len(dataset.fingerprint) == 16 and len(digested) == len(dataset)
    exact = check.duplicates[check.duplicates.kind == "exact"]
    clean = dataset.without(check.quarantine).grouped(exact).drop_classes(["snails"])
    few = clean.take(range(5))
    assert len({dataset.fingerprint, clean.fingerprint, few.fingerprint}) == 3
    assert list(few.digests) == list(clean.digests[:5]) == list(dataset.digests[:5])
    few.images(16), clean.images(16)
    assert len(digested) == len(dataset)


def test_array_digests_are_computed_once_and_carried(monkeypatch):
    read = []
    content = ArrayImages.content
    monkeypatch.setattr(ArrayImages, "content", lambda self, place: read.append(place) or content(self, place))
    dataset = Dataset.from_arrays("noise", np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), "uint8"), range(9))
    assert dataset.take([3, 4]).fingerprint != dataset.take([4, 3]).fingerprint
    assert dataset.fingerprint and dataset.take(range(8)).images(8).shape == (8, 8, 8, 3)
    assert sorted(read) == list(range(9))


def test_a_changed_file_has_another_digest(trouble):
    before = read_dataset(trouble)
    assert (before.digests == before.digests).all()  # the source keeps them: they are not computed again below
    make_image(1234).save(trouble / "birds" / "0.jpg", quality=95)
    after = read_dataset(trouble)
    assert (before.digests != after.digests).sum() == 1 and before.fingerprint != after.fingerprint


def test_the_fingerprint_covers_all_that_the_data_are():
    images = np.random.default_rng(0).integers(0, 256, (4, 2, 8, 3), "uint8")
    made = {
        "images": images,
        "labels": [0, 1, 0, 1],
        "classes": ["a", "b"],
        "ids": list("wxyz"),
        "groups": list("ggzz"),
    }
    changes = [
        {},
        {"images": images.reshape(4, 8, 2, 3)},
        {"images": images ^ 1},
        {"labels": [0, 1, 1, 1]},
        {"classes": ["a", "c"]},
        {"ids": list("wxyq")},
        {"groups": list("gggz")},
    ]
    prints = [Dataset.from_arrays("x", **{**made, **change}).fingerprint for change in changes]
    assert len(set(prints)) == len(changes)
    assert Dataset.from_arrays("another title", **made).fingerprint == prints[0]


def test_a_column_has_a_hash_of_its_own():
    def with_age(*ages, name="age"):
        return Dataset.from_arrays("x", np.zeros((2, 4, 4), "uint8"), [0, 1], metadata=pd.DataFrame({name: ages}))

    first = with_age(1, 2)
    assert first.column_hash("age") == with_age(1, 2).column_hash("age")
    others = [
        with_age(2, 1).column_hash("age"),
        with_age(1.0, 2.0).column_hash("age"),
        with_age("1", "2").column_hash("age"),
        with_age(1, np.nan).column_hash("age"),
        with_age(1, 2, name="years").column_hash("years"),
    ]
    assert len({first.column_hash("age"), *others}) == 6
    assert first.take([1, 0]).column_hash("age") != first.column_hash("age")
    with pytest.raises(KeyError, match="no column 'weight'; there are id, location, label, group, age"):
        first.column_hash("weight")


# The decoded images

KEY = """
import sys
import numpy as np
from course_ml.image_cache import decoded_key
from course_ml.image_sources import ArrayImages
print(decoded_key(ArrayImages(np.zeros((2, 8, 8, 3), "uint8")).digests([0, 1]), {size}, "{resize}", {ranges}).name)
"""


@pytest.fixture(scope="module")
def key_of(tmp_path_factory):
    "The key of decoded images in a copy of the package, after a change to one of its modules."

    def key(module="decoding", old="", new="", size=16, resize="crop", ranges="{}"):
        folder = tmp_path_factory.mktemp("copy")
        shutil.copytree(
            Path(course_ml.__file__).parent, folder / "course_ml", ignore=shutil.ignore_patterns("__pycache__")
        )
        file = folder / "course_ml" / f"{module}.py"
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new, 1), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        command = [sys.executable, "-c", KEY.format(size=size, resize=resize, ranges=ranges)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    return key


def test_what_decides_the_pixels_is_in_the_key_of_decoded_images(key_of):
    same = [
        key_of(),
        key_of(old='    if how == "crop"', new='    # a comment\n    if how == "crop"'),
        key_of(old="Resize an image to a square", new="Make an image square"),
    ]
    others = [
        key_of(old="Image.Resampling.BICUBIC", new="Image.Resampling.NEAREST"),
        key_of(old="* 255 // largest", new="* 256 // largest"),
        key_of(size=17),
        key_of(resize="squash"),
        key_of(ranges="{'TIFF, 16-bit gray': 4095}"),
    ]
    assert len(set(same)) == 1
    assert len({same[0], *others}) == 6


def test_versions_of_the_decoders_are_in_the_key(monkeypatch):
    digests = ArrayImages(np.zeros((2, 8, 8, 3), "uint8")).digests([0, 1])
    keys = [image_cache.decoded_key(digests, 16, "crop", {})]
    version = importlib.metadata.version
    for package in ("pillow", "numpy", "pillow-heif"):
        with monkeypatch.context() as patch:
            other = {package: "0"}
            patch.setattr(importlib.metadata, "version", lambda name, other=other: other.get(name) or version(name))
            keys.append(image_cache.decoded_key(digests, 16, "crop", {}))
    assert len({key.name for key in keys}) == 4
    assert keys[0].differences(keys[1])[0].startswith("package pillow")


DECODE = """
import sys, time
from course_ml import image_cache
from course_ml.readers import read_dataset

decode = image_cache._decode_to
def slow(*arguments):
    print("decoding", flush=True)
    time.sleep(1)
    decode(*arguments)
image_cache._decode_to = slow
sys.stdin.readline()
print(read_dataset(sys.argv[1]).images(16).shape)
"""


def test_two_processes_decode_once(trouble, tmp_path):
    clean = read_dataset(trouble)
    for place in clean.check().quarantine.id:
        (trouble / place).unlink()
    environment = {**os.environ, "COURSE_ML_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", DECODE, str(trouble)]
    both = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = "".join(process.communicate(timeout=300)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert printed.count("decoding") == 1 and printed.count("(22, 16, 16, 3)") == 2


def test_images_that_fail_leave_nothing_behind(trouble, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_ML_HOME", str(tmp_path / "home"))
    with pytest.raises(UnreadableImage, match="3 images cannot be read"):
        read_dataset(trouble).images(16)
    assert not list((tmp_path / "home").rglob("*.npy"))


@pytest.fixture
def numbered():
    "Six small images of two classes."
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype="uint8")
    return Dataset.from_arrays("numbered", pixels, [0, 1] * 3, ["a", "b"])


def test_the_fingerprint_follows_the_table(numbered):
    "A label that is changed in place is in the key of the next run."
    before = numbered.fingerprint
    numbered.items.loc[0, "label"] = 1 - numbered.items.label[0]
    assert numbered.fingerprint != before


def test_two_classes_of_one_name_are_refused(numbered):
    with pytest.raises(ValueError, match="two classes are called 'a'"):
        replace(numbered, classes=["a", "a"])


def test_code_of_an_own_source_is_in_the_key(numbered):
    "A source that a user wrote may decode otherwise than the library's."
    def images(brightness):
        class OwnImages(ArrayImages):
            def image(self, location):
                return Image.fromarray(np.full((8, 8, 3), brightness, "uint8"))

        return replace(numbered, source=OwnImages(numbered.source.array)).images(8)
    assert images(10).max() == 10
    assert images(20).min() == 20
