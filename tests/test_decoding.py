"""From bytes to pixels: depths, large images, damaged files, archives, full disks."""

import io
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pillow_heif
import pytest
from hypothesis import given, strategies
from PIL import Image

from course_ml import decoding, image_cache, image_sources, listing
from course_ml.data import Dataset
from course_ml.decoding import UnreadableImage, decode, largest_value, set_ranges
from course_ml.image_sources import ArrayImages, FolderImages, TarImages, ZipImages, open_archive
from course_ml.provenance import CacheError
from course_ml.readers import read_dataset, read_unlabelled
from course_ml.sources import SourceError, extract


def scene(seed=0, size=(48, 36)):
    "A smooth color image whose values fill the range."
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype="uint8")
    coarse[0, 0], coarse[-1, -1] = 0, 255
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def dataset_of(source, places):
    items = pd.DataFrame({"id": places, "location": places, "label": 0, "group": places})
    return Dataset("images", items, ["all"], source)


def folder_set(folder):
    return dataset_of(FolderImages(folder), files_in(folder))


def png16(values):
    "A PNG of 16 bits a channel, which Pillow cannot write: (height, width, 3) uint16."
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def gray(seed=0): return np.asarray(scene(seed).convert("L"))


# Depth: case 14

DEEP_FILES = {
    "12-bit.tif": lambda g: encoded(Image.fromarray(g.astype("uint16") * 16), "TIFF"),
    "16-bit.png": lambda g: encoded(Image.fromarray(g.astype("uint16") * 257), "PNG"),
    "int32.tif": lambda g: encoded(Image.fromarray(g.astype("int32")), "TIFF"),
    "float1.tif": lambda g: encoded(Image.fromarray(g.astype("float32") / 255), "TIFF"),
    "float255.tif": lambda g: encoded(Image.fromarray(g.astype("float32")), "TIFF"),
    "channels.png": lambda g: png16(np.stack([g.astype("uint16") * 257] * 3, -1)),
    "scaled.pgm": lambda g: b"P5 48 36 4095\n" + (g.astype("uint16") * 16).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_every_depth_gives_the_same_image(tmp_path, name):
    for seed in range(3):
        put(tmp_path / f"{seed}-{name}", DEEP_FILES[name](gray(seed)))
    dataset = folder_set(tmp_path)
    for place in dataset.items.location:
        pixels = np.asarray(dataset.source.image(place))[..., 0].astype(int)
        assert np.abs(pixels - gray(int(place[0]))).max() <= 1
    assert not len(dataset.check().flat)


def test_kinds_of_files_in_one_folder_have_their_own_ranges(tmp_path):
    for name in ("12-bit.tif", "16-bit.png", "int32.tif", "channels.png"):
        put(tmp_path / name[:3] / name, DEEP_FILES[name](gray()))
    put(tmp_path / "photo.jpg", encoded(scene(), "JPEG"))
    check = folder_set(tmp_path).check()
    assert not len(check.quarantine) and not len(check.flat)
    white = dict(zip(check.kinds.kind, check.kinds.white))
    assert white == {"TIFF, 16-bit gray": 4095, "PNG, 16-bit gray": 65535, "TIFF, 32-bit gray": 255,
                     "PNG, 16-bit channels": 65535, "JPEG, 8 bits": 255}


def test_the_range_is_the_sets_so_no_image_is_brightened(tmp_path):
    for name, top in {"dark": 300, "bright": 4000}.items():
        put(tmp_path / f"{name}.tif", encoded(Image.fromarray(np.full((8, 8), top, "uint16")), "TIFF"))
    dataset = folder_set(tmp_path)
    alone = dataset.take([list(dataset.items.id).index("dark.tif")])  # before anything was decoded
    assert alone.images(4).max() == dataset.images(4).min() == 300 * 255 // 4095
    sent = pickle.loads(pickle.dumps(alone))
    assert sent.source.image("dark.tif").getpixel((0, 0))[0] == 300 * 255 // 4095


def test_images_without_labels_get_the_range_of_those_with_labels(tmp_path):
    for place, most in {"train/a/0": 4000, "train/b/0": 4000, "test/0": 900, "test/1": 950}.items():
        values = np.linspace(0, most, 36 * 36).astype("uint16").reshape(36, 36)
        put(tmp_path / f"{place}.png", encoded(Image.fromarray(values)))
    dataset = read_dataset(tmp_path)
    alone = read_unlabelled(tmp_path, dataset.classes)
    unknown = read_unlabelled(tmp_path, dataset.classes, like=dataset)
    assert list(dataset.source.ranges.values()) == list(unknown.source.ranges.values()) == [4095]
    assert list(alone.source.ranges.values()) == [1023]
    assert unknown.images(36).max() == 950 * 255 // 4095
    assert pickle.loads(pickle.dumps(unknown.source)).ranges == dataset.source.ranges


def test_another_range_is_another_key_and_another_fingerprint(tmp_path):
    put(tmp_path / "a.tif", encoded(Image.fromarray(np.full((8, 8), 4000, "uint16")), "TIFF"))
    before = folder_set(tmp_path)
    assert before.images(4).max() == 4000 * 255 // 4095
    put(tmp_path / "b.tif", encoded(Image.fromarray(np.full((8, 8), 60000, "uint16")), "TIFF"))
    after = folder_set(tmp_path).take([0])
    assert after.images(4).max() == 4000 * 255 // 65535
    assert list(before.digests) == list(after.digests) and before.fingerprint != after.fingerprint


@pytest.mark.parametrize("values, reason", [
    (np.linspace(-1000, 3000, 64).astype("int32"), "-1000 to 3000"),
    (np.linspace(0, 70000, 64).astype("int32"), "0 to 70000"),
    (np.linspace(-1, 1, 64).astype("float32"), "-1 to 1"),
    (np.where(np.arange(64) == 3, np.nan, .5).astype("float32"), "nan"),
])
def test_values_beyond_all_ranges_are_set_aside_and_the_others_used(tmp_path, values, reason):
    for seed in range(3):
        put(tmp_path / f"{seed}.tif", encoded(Image.fromarray(gray(seed).astype(values.dtype)), "TIFF"))
    put(tmp_path / "bad.tif", encoded(Image.fromarray(values.reshape(8, 8)), "TIFF"))
    check = folder_set(tmp_path).check()
    assert list(check.quarantine.id) == ["bad.tif"] and reason in check.quarantine.reason[0]


def test_a_range_that_could_mean_anything_is_set_aside(tmp_path):
    put(tmp_path / "mask.tif", encoded(Image.fromarray(np.eye(8, dtype="int32") * 3), "TIFF"))
    put(tmp_path / "dark.png", png16(np.full((8, 8, 3), 4095, "uint16")))
    reasons = folder_set(tmp_path).check().quarantine.set_index("id").reason
    assert "from 0 to 3" in reasons["mask.tif"] and "its set uses 12" in reasons["dark.png"]


@given(strategies.lists(strategies.integers(0, 65535), min_size=1), strategies.booleans())
def test_a_range_contains_its_set_and_does_not_depend_on_the_order(tops, floats):
    kind = "TIFF, floats" if floats else "TIFF, 16-bit gray"
    ranges = [(kind, 0, top / 257 if floats else top) for top in tops]
    found = set_ranges(ranges)
    assert found == set_ranges(ranges[::-1])
    highest = max(high for _, _, high in ranges)
    assert found[kind] >= highest if found[kind] else highest < 64


def test_arrays_follow_the_same_rule():
    small, full = np.full((1, 2, 2), 200), np.full((1, 2, 2), 4000)
    expected = [(small.astype("int64"), 200), (full.astype("uint16"), 4000 * 255 // 4095), (small / 255, 200),
                (small.astype("float32"), 200), (small > 0, 255)]
    for array, value in expected:
        assert ArrayImages(array).image(0).getpixel((0, 0)) == (value,) * 3
    for array in (small - 201, full / 1., full.astype(object), np.zeros((3, 2))):
        with pytest.raises(ValueError, match="give"): ArrayImages(array)


def test_constant_images_are_reported(tmp_path):
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "teal.png")
    Image.fromarray(np.arange(100, dtype="uint8").reshape(10, 10) // 10).save(tmp_path / "nearly.png")
    scene().save(tmp_path / "scene.png")
    check = folder_set(tmp_path).check()
    assert check.flat.set_index("id").contrast.to_dict() == {"teal.png": 0, "nearly.png": 9}
    assert {"images of one value", "images of nearly one value"} <= set(check.summary().finding)


# Formats: case 15


def test_modes_orientation_and_pages(tmp_path):
    image, exif = scene(), Image.Exif()
    exif[0x0112] = 6
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "turned.tif", exif=exif)
    image.convert("1").save(tmp_path / "bit.png")
    image.convert("LA").save(tmp_path / "la.png")
    image.quantize(16).save(tmp_path / "palette.png", transparency=0)
    image.save(tmp_path / "web.webp")
    image.save(tmp_path / "new.avif")
    image.save(tmp_path / "moving.gif", save_all=True, append_images=[scene(1), scene(2)])
    image.save(tmp_path / "pages.tif", save_all=True, append_images=[scene(1)])
    dataset = folder_set(tmp_path)
    check = dataset.check()
    assert not len(check.quarantine)
    sizes = check.images.set_index("id")
    for name in ("turned.jpg", "turned.tif"):
        assert (sizes.width[name], sizes.height[name]) == dataset.source.image(name).size == (36, 48)
    assert check.kinds["several pages"].sum() == 2
    assert np.array_equal(np.asarray(dataset.source.image("pages.tif")), np.asarray(image))


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)


def test_a_heic_photograph_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UnreadableImage, match=r"pip install 'course_ml\[heif\]'"): decode(HEIC)


def test_heic_photographs(tmp_path):
    pillow_heif.register_heif_opener()
    scene(size=(64, 48)).save(tmp_path / "photo.jpg", format="HEIF", quality=95)
    put(tmp_path / "broken.heic", HEIC)
    dataset = folder_set(tmp_path)
    difference = np.asarray(dataset.source.image("photo.jpg"), dtype=int) - np.asarray(scene(size=(64, 48)))
    assert np.abs(difference).mean() < 8
    check = dataset.check()
    assert list(check.quarantine.id) == ["broken.heic"] and "HEIC" in check.quarantine.reason[0]


# Damaged files: case 16


def test_damaged_files_are_named_with_the_reason(tmp_path):
    good = encoded(scene(), "JPEG")
    crc = bytearray(encoded(scene()))
    crc[60] ^= 255
    bad = {"cut.jpg": good[:len(good) // 2], "empty.jpg": b"", "404.jpg": b"<!DOCTYPE html>", "crc.png": bytes(crc),
           "odd.tif": b"II*\0" + bytes(50), "gone.jpg": b""}
    for name, content in bad.items(): put(tmp_path / name, content)
    put(tmp_path / "good.jpg", good)
    dataset = folder_set(tmp_path)
    (tmp_path / "gone.jpg").unlink()
    reasons = dataset.check().quarantine.set_index("id").reason
    assert set(reasons.index) == set(bad)
    assert "empty" in reasons["empty.jpg"] and "not an image" in reasons["404.jpg"] and "TIFF" in reasons["odd.tif"]
    assert len(dataset.without(dataset.check().quarantine).images(8)) == 1


def test_a_set_without_one_readable_image_is_checked(tmp_path):
    put(tmp_path / "a.jpg", b"")
    check = folder_set(tmp_path).check()
    assert len(check.quarantine) == 1 and not len(check.kinds) and check.summary().number.sum() > 0


# Large images: cases 17 and 18


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "P", "16-bit", "RGBA"])
def test_large_images_are_read_in_reduced_size(monkeypatch, format):
    image = scene(size=(640, 480))
    shown = {"P": image.quantize(200), "16-bit": Image.fromarray(np.asarray(image.convert("L")).astype("uint16") * 257),
             "RGBA": image.convert("RGBA")}.get(format, image)
    content = encoded(shown, format if format in ("JPEG", "TIFF", "WEBP") else "PNG")
    full = decode(content)
    monkeypatch.setattr(decoding, "MOST_PIXELS", 20_000)
    monkeypatch.setattr(decoding, "_STRIP", 7_000)
    small = decode(content)
    assert (small.size, small.info["size"]) == ((160, 120), (640, 480))
    difference = np.asarray(full.resize(small.size, Image.Resampling.BOX), dtype=int) - np.asarray(small)
    assert np.abs(difference).mean() < 3


@given(strategies.integers(1, 300), strategies.integers(1, 300), strategies.integers(50, 5000))
def test_conversion_by_strips_loses_no_row(width, height, strip):
    image = Image.fromarray(np.arange(width * height, dtype="uint32").astype("uint8").reshape(height, width))
    before, decoding._STRIP = decoding._STRIP, strip
    try: assert np.array_equal(np.asarray(decoding._convert(image, 255))[..., 0], np.asarray(image))
    finally: decoding._STRIP = before


def test_an_image_that_needs_too_much_memory_is_set_aside_with_the_limit(monkeypatch):
    progressive = encoded(scene(size=(640, 480)), "JPEG", progressive=True)
    plain = encoded(scene(size=(640, 480)), "JPEG")
    monkeypatch.setattr(decoding, "MOST_PIXELS", 20_000)
    monkeypatch.setattr(decoding, "MOST_MEMORY", 2**20)
    decode(plain)  # 160 x 120 pixels are all that it keeps
    for content in (progressive, encoded(scene(size=(640, 480)))):
        with pytest.raises(UnreadableImage, match="640 x 480 pixels need .* save it smaller"):
            decode(content)


def test_a_small_file_of_enormous_size_is_refused_before_it_is_decoded():
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\2L\1\0;"
    bomb = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + frame
    with pytest.raises(UnreadableImage, match="65,535 x 65,535 pixels need 4,096 MiB"): decode(bomb)


def test_pillows_own_limit_neither_warns_nor_refuses_and_stays(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ThreadPoolExecutor(4) as pool:
            contents = [encoded(scene(), format) for format in ("PNG", "JPEG", "TIFF", "GIF", "WEBP")] * 20
            assert {image.size for image in pool.map(decode, contents)} == {(48, 36)}
        with pytest.raises(UnreadableImage): decode(b"II*\0")
    assert Image.MAX_IMAGE_PIXELS == 100


MEMORY = """
import resource, sys
import numpy as np, pandas as pd, imagehash, scipy.fftpack
from course_ml.data import Dataset
from course_ml.image_sources import FolderImages
def check(name):
    items = pd.DataFrame({"id": [name], "location": [name], "label": 0, "group": name})
    assert not len(Dataset("x", items, ["a"], FolderImages(sys.argv[1])).check().quarantine)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = check("small.jpg")
print(check("large.jpg") - before)
"""


def test_checking_a_large_photograph_takes_little_more_memory_than_its_pixels(tmp_path):
    scene().save(tmp_path / "small.jpg")
    scene(size=(4000, 3000)).save(tmp_path / "large.jpg")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 120  # MiB; 48 of them are the pixels


def test_tiny_and_narrow_images(tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    scene(size=(6000, 20)).save(tmp_path / "wide.jpg")
    scene(size=(20, 3000)).save(tmp_path / "tall.jpg")
    dataset = folder_set(tmp_path)
    assert not len(dataset.check().quarantine) and dataset.images(16).shape == (3, 16, 16, 3)


# Archives: case 34


def zip_of(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items(): archive.writestr(name, content)
    return path


def tar_of(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            entry = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes): entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


PHOTOS = {f"{c}/{i}.jpg": encoded(scene(10 * i + (c == "cat")), "JPEG") for c in ("cat", "dog") for i in range(4)}


@pytest.mark.parametrize("name", ["good.ZIP", "plain.tar", "data.tar.gz", "data.tar.bz2", "data.tgz", "data.tar.xz"])
def test_archives_give_what_a_folder_gives(tmp_path, name):
    for place, content in PHOTOS.items(): put(tmp_path / "folder" / place, content)
    kind = {"gz": "w:gz", "tgz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}.get(name.split(".")[-1], "w")
    make = zip_of if name.endswith("ZIP") else lambda path, members: tar_of(path, members, kind)
    source = open_archive(make(tmp_path / name, PHOTOS))
    assert sorted(source.names()) == files_in(tmp_path / "folder") and not source.set_aside
    ours, theirs = dataset_of(source, sorted(PHOTOS)), folder_set(tmp_path / "folder")
    assert ours.fingerprint == theirs.fingerprint
    assert np.array_equal(ours.images(16), theirs.images(16))


def test_archives_that_cannot_be_opened_are_named_with_the_reason(tmp_path):
    good = zip_of(tmp_path / "good.zip", PHOTOS).read_bytes()
    packed = tar_of(tmp_path / "good.tar.gz", PHOTOS, "w:gz").read_bytes()
    encrypted = bytearray(good)
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = -1
        while (at := encrypted.find(mark, at + 1)) >= 0: encrypted[at + offset] |= 1
    bad = {"truncated.zip": (good[:len(good) // 2], "damaged"), "rar.zip": (b"Rar!\x1a\7\1\0", "RAR"),
           "seven.zip": (b"7z\xbc\xaf\x27\x1c", "7z"), "encrypted.zip": (encrypted, "is encrypted"),
           "cut.tar.gz": (packed[:len(packed) // 2], "damaged"), "text.zip": (b"hello", "no zip or tar")}
    for name, (content, reason) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*{reason}"): open_archive(tmp_path / name)


def test_one_bad_member_ends_nothing(tmp_path):
    content = bytearray(zip_of(tmp_path / "crc.zip", PHOTOS).read_bytes())
    content[content.find(b"cat/1.jpg") + 200] ^= 255
    (tmp_path / "crc.zip").write_bytes(content)
    cut = tar_of(tmp_path / "cut.tar", PHOTOS).read_bytes()
    (tmp_path / "cut.tar").write_bytes(cut[:cut.find(b"dog/3.jpg") + 600])
    for name, bad in {"crc.zip": "cat/1.jpg", "cut.tar": "dog/3.jpg"}.items():
        source = open_archive(tmp_path / name)
        dataset = dataset_of(source, sorted(source.names()))
        check = dataset.check()
        assert list(check.quarantine.id) == [bad] and "damaged" in check.quarantine.reason[0]
        assert len(dataset.without(check.quarantine).images(8)) == 7
        with pytest.raises(UnreadableImage, match=bad): dataset.images(8)
        assert len(dataset.fingerprint) == 16
    assert [reason for _, reason in source.set_aside] == ["the archive is cut off: what comes after its last member is lost"]


def test_members_that_lead_out_and_links_are_set_aside(tmp_path):
    outside = {"../evil.jpg": b"x", "/etc/evil.jpg": b"x", "a/../../evil.jpg": b"x"}
    linked = zipfile.ZipInfo("link.jpg")
    linked.external_attr = 0o120777 << 16
    zip_of(tmp_path / "a.zip", {**PHOTOS, **outside, linked: b"/etc/passwd", "C:\\evil.jpg": b"x"})
    tar_of(tmp_path / "a.tar", {**PHOTOS, **outside, "link.jpg": link("link.jpg", "/etc/passwd"),
                                "pipe": link("pipe", "", tarfile.FIFOTYPE),
                                "same.jpg": link("same.jpg", "cat/0.jpg", tarfile.LNKTYPE),
                                "hard.jpg": link("hard.jpg", "/etc/passwd", tarfile.LNKTYPE)})
    found, packed = open_archive(tmp_path / "a.zip"), open_archive(tmp_path / "a.tar")
    assert set(found.names()) == set(PHOTOS) and set(packed.names()) == {*PHOTOS, "same.jpg"}
    assert packed.content("same.jpg") == PHOTOS["cat/0.jpg"]
    assert {name for name, _ in found.set_aside} == {*outside, "link.jpg", "C:/evil.jpg"}
    assert {name for name, _ in packed.set_aside} == {*outside, "link.jpg", "pipe", "hard.jpg"}
    assert files_in(tmp_path) == ["a.tar", "a.zip"]


def test_names_with_backslashes(tmp_path):
    source = open_archive(zip_of(tmp_path / "windows.zip", {"cat\\1.jpg": PHOTOS["cat/1.jpg"]}))
    assert source.names() == ["cat/1.jpg"] and source.content("cat/1.jpg") == PHOTOS["cat/1.jpg"]


def test_nothing_expands_without_limit(tmp_path, monkeypatch):
    zeros = bytes(5_000_000)
    member = open_archive(zip_of(tmp_path / "bomb.zip", {"a.jpg": zeros}, compression=zipfile.ZIP_DEFLATED))
    monkeypatch.setattr(image_sources, "MOST_BYTES", 1_000_000)
    with pytest.raises(UnreadableImage, match="more than the"): member.content("a.jpg")
    monkeypatch.setattr(image_sources, "MOST_BYTES", 2**30)
    monkeypatch.setattr(image_sources, "MOST_ANY_RATIO", 1_000_000)
    with pytest.raises(UnreadableImage, match="more than 200 times"): member.content("a.jpg")
    monkeypatch.setattr(image_sources, "MOST_BYTES", 1_000_000)
    put(tmp_path / "folder" / "a.jpg", zeros)
    folder = FolderImages(tmp_path / "folder")
    with pytest.raises(UnreadableImage, match="more than the"): folder.content("a.jpg")
    with pytest.raises(ValueError, match="unpacks to more than"):
        open_archive(tar_of(tmp_path / "bomb.tar.gz", {"a.jpg": zeros}, "w:gz"))
    assert not list(image_sources.cache_folder().rglob(".*.tar"))


METHODS = {"stored": zipfile.ZIP_STORED, "deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2,
           "lzma": zipfile.ZIP_LZMA}


@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_member_of_any_compression_fails_alone(tmp_path, method):
    members = {**PHOTOS, "cat/0.jpg": np.random.default_rng(0).bytes(5000)}
    content = bytearray(zip_of(tmp_path / "good.zip", members, compression=METHODS[method]).read_bytes())
    assert all(open_archive(tmp_path / "good.zip").content(name) == members[name] for name in members)
    for place in (14, 200, 2000):
        damaged = bytearray(content)
        damaged[39 + place] ^= 255
        (tmp_path / "bad.zip").write_bytes(damaged)
        source = open_archive(tmp_path / "bad.zip")
        with pytest.raises(UnreadableImage, match="damaged in the archive"):
            source.content("cat/0.jpg")
        check = dataset_of(source, sorted(PHOTOS)).check()
        assert list(check.quarantine.id) == ["cat/0.jpg"]


@pytest.mark.parametrize("method", ["deflate", "bzip2", "lzma"])
def test_no_more_is_unpacked_than_a_member_states(tmp_path, method):
    zip_of(tmp_path / "a.zip", {"a.jpg": bytes(50_000_000)}, compression=METHODS[method])
    content = bytearray((tmp_path / "a.zip").read_bytes())
    for mark, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        at = content.find(mark) + offset
        content[at:at + 4] = struct.pack("<I", 10_000)
    (tmp_path / "a.zip").write_bytes(content)
    source = open_archive(tmp_path / "a.zip")
    tracemalloc.start()
    assert source.head("a.jpg") == bytes(32)
    with pytest.raises(UnreadableImage, match="damaged in the archive"): source.content("a.jpg")
    with pytest.raises(SourceError, match="damaged"):
        extract(tmp_path / "a.zip", tmp_path / "out", most_ratio=10**6)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4_000_000 and not (tmp_path / "out").exists()


def test_a_dictionary_that_claims_all_memory_gets_what_its_member_needs(tmp_path):
    zip_of(tmp_path / "a.zip", {"a.jpg": PHOTOS["cat/0.jpg"]}, compression=zipfile.ZIP_LZMA)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[40:44] = b"\xff" * 4
    (tmp_path / "a.zip").write_bytes(content)
    assert open_archive(tmp_path / "a.zip").content("a.jpg") == PHOTOS["cat/0.jpg"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "folder"])
def test_a_table_of_too_many_bytes_is_refused_before_it_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(listing, "MOST_TABLE_BYTES", 100_000)
    members = {f"{i}.jpg": PHOTOS[f"cat/{i}.jpg"] for i in range(4)}
    members["train.csv"] = b"file,label\n" + b"0.jpg,cat\n" * 10_000
    if name == "folder":
        for place, content in members.items(): put(tmp_path / name / place, content)
    elif name == "a.zip": zip_of(tmp_path / name, members, compression=zipfile.ZIP_DEFLATED)
    else: tar_of(tmp_path / name, members, "w:gz" if name.endswith("gz") else "w")
    contents = []
    for source in (FolderImages, ZipImages, TarImages):
        monkeypatch.setattr(source, "content", lambda *place: contents.append(place))
    with pytest.raises(ValueError, match="train.csv not used: the table has 100,011 bytes .* more than the 100,000"):
        read_dataset(tmp_path / name)
    assert not contents


def test_threads_and_forked_processes_read_one_archive(tmp_path):
    members = {f"{i}.bin": bytes([i]) * 20_000 for i in range(60)}
    sources = [open_archive(zip_of(tmp_path / "a.zip", members)), open_archive(tar_of(tmp_path / "a.tar", members))]
    for source in sources:
        source.content("0.bin")  # opened before the processes are forked
        correct = lambda i, source=source: source.content(f"{i % 60}.bin") == members[f"{i % 60}.bin"]
        with ThreadPoolExecutor(4) as pool: assert all(pool.map(correct, range(240)))
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=lambda correct=correct: os._exit(not all(map(correct, range(600)))))
                     for _ in range(3)]
        for process in processes: process.start()
        for process in processes: process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]


def test_sources_go_to_other_processes(tmp_path):
    sources = [open_archive(zip_of(tmp_path / "a.zip", PHOTOS)), open_archive(tar_of(tmp_path / "a.tar.gz", PHOTOS, "w:gz"))]
    for source in sources:
        source.content("cat/0.jpg")
        assert isinstance(source, (ZipImages, TarImages))
        assert pickle.loads(pickle.dumps(source)).content("cat/0.jpg") == PHOTOS["cat/0.jpg"]


# Arrays


def test_a_mapped_array_is_sent_as_its_place(tmp_path):
    array = np.random.default_rng(0).random((50, 3, 16, 12)).astype("float32")
    np.save(tmp_path / "x.npy", array)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for part, same in [(mapped, array), (mapped[7:], array[7:]), (mapped[::3], array[::3])]:
        images = ArrayImages(part.transpose(0, 2, 3, 1))
        sent = pickle.dumps(images)
        copy = pickle.loads(sent)
        assert len(sent) < 2000 and np.array_equal(copy.array, same.transpose(0, 2, 3, 1))
        assert copy.content(1) == images.content(1) and len(pickle.dumps(copy)) < 2000
    dataset = Dataset.from_arrays("x", mapped.transpose(0, 2, 3, 1), np.zeros(50))
    assert len(pickle.dumps(dataset)) < array.nbytes / 4
    assert dataset.fingerprint == Dataset.from_arrays("x", array.transpose(0, 2, 3, 1), np.zeros(50)).fingerprint


# Disks


FULL = """
import resource, sys
from test_decoding import folder_set
from pathlib import Path
dataset = folder_set(Path(sys.argv[1]))
dataset.digests, dataset.source.ranges
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try: dataset.images(64)
except Exception as error: print(type(error).__name__, error)
"""


def test_a_disk_that_becomes_full_ends_in_an_error_and_leaves_nothing(tmp_path):
    for i in range(100): put(tmp_path / "set" / f"{i}.jpg", encoded(scene(i), "JPEG"))
    environment = {**os.environ, "COURSE_ML_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", FULL, str(tmp_path / "set")]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CacheError") and "COURSE_ML_HOME" in done.stdout
    assert not list((tmp_path / "home" / "images").glob("*.npy")) + list((tmp_path / "home" / "images").glob(".*.npy"))


def test_images_that_do_not_fit_on_the_disk_are_refused_before_decoding(tmp_path, monkeypatch):
    for i in range(10): put(tmp_path / "set" / f"{i}.jpg", encoded(scene(i), "JPEG"))
    monkeypatch.setenv("COURSE_ML_HOME", str(tmp_path / "home"))
    dataset, decoded = folder_set(tmp_path / "set"), []
    monkeypatch.setattr(FolderImages, "image", lambda *place: decoded.append(place))
    free = type("Usage", (), {"free": 10 * 64 * 64 * 3 // 4})
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(CacheError, match="room for 2 of them, or for all of them with 32 x 32 pixels.*COURSE_ML_HOME"):
        dataset.images(64)
    assert not decoded and not list((tmp_path / "home").rglob("*.npy"))


def test_a_cache_that_cannot_be_written_is_named_and_check_does_without(tmp_path, monkeypatch):
    put(tmp_path / "set" / "a.tif", DEEP_FILES["12-bit.tif"](gray()))
    zip_of(tmp_path / "a.zip", PHOTOS)
    put(tmp_path / "file", b"no folder")
    monkeypatch.setenv("COURSE_ML_HOME", str(tmp_path / "file" / "cache"))
    dataset = folder_set(tmp_path / "set")
    assert not len(dataset.check().quarantine)
    assert not len(dataset_of(open_archive(tmp_path / "a.zip"), sorted(PHOTOS)).check().quarantine)
    with pytest.raises(CacheError, match="cache .*file/cache.*COURSE_ML_HOME"): dataset.images(16)


def test_largest_value_is_never_below_the_highest():
    for highest in range(0, 65536, 5):
        assert (largest_value(highest, False) or 65535) >= highest
