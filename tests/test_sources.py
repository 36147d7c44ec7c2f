"""Downloads and archives that fail, against a server on this computer; Kaggle's and the hub's clients are stand-ins."""

import errno
import hashlib
import io
import os
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from course_ml import sources
from course_ml.readers import read_dataset
from course_ml.sources import (
    BLOOD_CLASSES,
    SOURCES,
    Source,
    SourceError,
    convert_rare_species,
    download,
    extract,
    fetch,
    name_classes,
)

DATA = bytes(np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8))
MD5 = "md5:" + hashlib.md5(DATA).hexdigest()
SHA256 = "sha256:" + hashlib.sha256(DATA).hexdigest()


class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        world = self.server.world
        world["requests"].append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        if world["errors"]:
            return self.send_error(world["errors"].pop(0))
        data, mark = world["files"].get(self.path), world["mark"]
        if data is None:
            return self.send_error(404)
        start = (
            int(self.headers["Range"][6:-1])
            if world["ranges"] and "Range" in self.headers and self.headers["If-Range"] == mark
            else 0
        )
        if start >= len(data) > 0 and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if mark:
            self.send_header("ETag", mark)
        if world["length"]:
            self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", world["content_range"] or f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data[start:][: world["cuts"].pop(0)] if world["cuts"] else data[start:])
        self.close_connection = True

    def log_message(self, *words):
        pass


@pytest.fixture
def world(monkeypatch):
    "What the server has and how it behaves."
    monkeypatch.setenv("COURSE_ML_PROGRESS", "0")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    address = f"http://127.0.0.1:{server.server_port}"
    server.world = {
        "files": {"/file.bin": DATA},
        "requests": [],
        "errors": [],
        "cuts": [],
        "ranges": True,
        "length": True,
        "mark": '"one"',
        "content_range": "",
        "url": f"{address}/file.bin",
        "address": address,
    }
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.world
    server.shutdown()
    server.server_close()


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Downloads


@pytest.mark.parametrize("checksum", [None, MD5, SHA256])
def test_whole_file(world, tmp_path, checksum):
    path = download(world["url"], tmp_path / "new" / "file.bin", checksum)
    assert path.read_bytes() == DATA and names(tmp_path) == ["new/file.bin"]


@pytest.mark.parametrize("checksum", [None, MD5])
def test_complete_file_is_not_fetched_again(world, tmp_path, checksum):
    for _ in range(2):
        download(world["url"], tmp_path / "file.bin", checksum)
    assert len(world["requests"]) == 1


def test_other_file_of_that_name_is_fetched_again(world, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"something else")
    assert download(world["url"], tmp_path / "file.bin", MD5).read_bytes() == DATA


def test_resumes_after_two_interruptions(world, tmp_path):
    world["cuts"] = [1_200_000, 700_000]
    download(world["url"], tmp_path / "file.bin", MD5, pause=0)
    assert [r[1] for r in world["requests"]] == [None, "bytes=1200000-", "bytes=1900000-"]
    assert names(tmp_path) == ["file.bin"]


def test_resumes_in_a_later_call(world, tmp_path):
    world["cuts"] = [1_000_000]
    with pytest.raises(SourceError, match="1,000,000 of 3,000,000 bytes arrived"):
        download(world["url"], tmp_path / "file.bin", attempts=1)
    assert names(tmp_path) == ["file.bin.part", "file.bin.part.version"]
    download(world["url"], tmp_path / "file.bin", MD5)
    assert world["requests"][-1][1] == "bytes=1000000-"


def test_truncated_every_time(world, tmp_path):
    world.update(ranges=False, cuts=[10, 20, 30, 40])
    with pytest.raises(SourceError, match=r"40 of 3,000,000 bytes arrived, after 4 attempts; call again"):
        download(world["url"], tmp_path / "file.bin", pause=0)
    assert not (tmp_path / "file.bin").exists()


def test_server_without_ranges_starts_again(world, tmp_path):
    world.update(ranges=False, cuts=[1_000_000])
    assert download(world["url"], tmp_path / "file.bin", MD5, pause=0).read_bytes() == DATA


def test_changed_file_is_not_joined_to_the_old_one(world, tmp_path):
    world["cuts"] = [1_000_000]
    with pytest.raises(SourceError):
        download(world["url"], tmp_path / "file.bin", attempts=1)
    new = DATA[::-1]
    world.update(mark='"two"', files={"/file.bin": new})
    assert download(world["url"], tmp_path / "file.bin").read_bytes() == new


@pytest.mark.parametrize("mark", ["", 'W/"weak"'])
def test_version_that_cannot_be_told_is_not_resumed(world, tmp_path, mark):
    world.update(mark=mark, cuts=[1_000_000])
    download(world["url"], tmp_path / "file.bin", MD5, pause=0)
    assert [r[1] for r in world["requests"]] == [None, None]


def test_complete_part_is_recognized(world, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(DATA)
    (tmp_path / "file.bin.part.version").write_text('"one"')
    download(world["url"], tmp_path / "file.bin", MD5, pause=0)
    assert [r[1] for r in world["requests"]] == ["bytes=3000000-"]


def test_part_longer_than_the_file_starts_again(world, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(DATA + b"more")
    (tmp_path / "file.bin.part.version").write_text('"one"')
    assert download(world["url"], tmp_path / "file.bin", pause=0).read_bytes() == DATA


def test_range_refused_without_a_part(world, tmp_path):
    world["errors"] = [416]
    assert download(world["url"], tmp_path / "file.bin", MD5, pause=0).read_bytes() == DATA


@pytest.mark.parametrize("length", [True, False])
def test_progress_is_shown(world, tmp_path, monkeypatch, capsys, length):
    monkeypatch.delenv("COURSE_ML_PROGRESS")
    world.update(length=length)
    download(world["url"], tmp_path / "file.bin")
    assert "file.bin (MiB)" in capsys.readouterr().err


def test_answer_from_another_byte_is_refused(world, tmp_path):
    world.update(cuts=[1_000_000], content_range="bytes 5-2999999/3000000")
    with pytest.raises(SourceError, match="asked for the bytes from 1000000, the server sent 'bytes 5-"):
        download(world["url"], tmp_path / "file.bin", pause=0)


def test_length_unknown(world, tmp_path):
    world["length"] = False
    assert download(world["url"], tmp_path / "file.bin").read_bytes() == DATA


def test_another_checksum(world, tmp_path):
    expected = "md5:" + "0" * 32
    with pytest.raises(SourceError) as error:
        download(world["url"], tmp_path / "file.bin", expected)
    for words in (world["url"], expected, MD5, "file.bin.bad"):
        assert words in str(error.value)
    assert names(tmp_path) == ["file.bin.bad"]


@pytest.mark.parametrize("checksum", ["md5:12", "crc32:00000000", "0" * 32, "md5:" + "G" * 32])
def test_malformed_checksum(world, tmp_path, checksum):
    with pytest.raises(ValueError, match="a checksum is md5:, sha256: or sha512:"):
        download(world["url"], tmp_path / "file.bin", checksum)
    assert not world["requests"]


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_refusals_are_not_repeated(world, tmp_path, code):
    world["errors"] = [code]
    with pytest.raises(SourceError, match=f"answered {code} .*check the address"):
        download(world["url"], tmp_path / "file.bin", pause=0)
    assert len(world["requests"]) == 1


@pytest.mark.parametrize("code", [429, 500, 503])
def test_busy_server_is_asked_again(world, tmp_path, code):
    world["errors"] = [code, code]
    assert download(world["url"], tmp_path / "file.bin", MD5, pause=0).read_bytes() == DATA


def test_pauses_grow(world, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    world["errors"] = [503] * 3
    download(world["url"], tmp_path / "file.bin", pause=1)
    assert pauses == [1, 2, 4]


def test_no_server(tmp_path):
    with pytest.raises(SourceError, match="no connection"):
        download("http://127.0.0.1:9/file", tmp_path / "file", attempts=2, pause=0)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "nonsense"])
def test_other_addresses(tmp_path, url):
    with pytest.raises(SourceError, match="only http"):
        download(url, tmp_path / "x")


# Archives


def make_zip(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def make_tar(path, entries, mode="w:gz"):
    with tarfile.open(path, mode) as file:
        for name, content, options in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for key, value in options.items():
                setattr(entry, key, value)
            file.addfile(entry, io.BytesIO(content))
    return path


def refused(archive, folder, message):
    before = names(folder.parent)
    with pytest.raises(SourceError, match=message):
        extract(archive, folder)
    assert names(folder.parent) == before and not [p for p in folder.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".tar", ".tar.xz"])
def test_good_archive(tmp_path, suffix):
    archive = tmp_path / f"good{suffix}"
    if suffix == ".zip":
        make_zip(archive, [("a/b.txt", b"two"), ("c.txt", b"one"), ("empty/", b"")])
    else:
        make_tar(
            archive,
            [(".", b"", {"type": tarfile.DIRTYPE}), ("a/b.txt", b"two", {}), ("c.txt", b"one", {})],
            "w:" + suffix.removeprefix(".tar").strip("."),
        )
    folder = extract(archive, tmp_path / "out")
    assert names(folder) == ["a/b.txt", "c.txt"] and (folder / "a/b.txt").read_bytes() == b"two"
    assert extract(archive, folder) == folder  # again: the same files are no conflict


@pytest.mark.parametrize(
    "name",
    [
        "../out.txt",
        "a/../../out.txt",
        "/etc/out.txt",
        "..\\out.txt",
        "C:/out.txt",
        "C:out.txt",
        "\\\\server\\out.txt",
        "..",
    ],
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_lead_out(tmp_path, name, kind):
    if kind == "zip":
        archive = make_zip(tmp_path / "x.zip", [("good.txt", b"good"), (name, b"bad")])
    else:
        archive = make_tar(tmp_path / "x.tar.gz", [("good.txt", b"good", {}), (name, b"bad", {})])
    refused(archive, tmp_path / "out", "would be written outside")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_tar(tmp_path, kind):
    archive = make_tar(
        tmp_path / "x.tar.gz", [("images", b"", {"type": kind, "linkname": "/etc"}), ("images/passwd", b"bad", {})]
    )
    refused(archive, tmp_path / "out", "is a link or a device")


def test_link_in_zip(tmp_path):
    entry = zipfile.ZipInfo("images")
    entry.external_attr = 0o120777 << 16
    refused(make_zip(tmp_path / "x.zip", [(entry, b"/etc")]), tmp_path / "out", "is a link or a device")


def test_encrypted_zip(tmp_path):
    archive = make_zip(tmp_path / "x.zip", [("a.txt", b"a")])
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(data)
    refused(archive, tmp_path / "out", "is encrypted")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_bomb(tmp_path, kind):
    zeros = bytes(20_000_000)
    archive = (
        make_zip(tmp_path / "x.zip", [("zeros", zeros)])
        if kind == "zip"
        else make_tar(tmp_path / "x.tar.gz", [("zeros", zeros, {})])
    )
    refused(archive, tmp_path / "out", "beyond the limits")
    assert extract(archive, tmp_path / "out", most_ratio=2000) == tmp_path / "out"
    with pytest.raises(SourceError, match="most_bytes=1,000"):
        extract(archive, tmp_path / "other", most_bytes=1000, most_ratio=2000)


def test_many_small_bombs(tmp_path):
    refused(
        make_zip(tmp_path / "x.zip", [(f"zeros{i}", bytes(1_000_000)) for i in range(20)]),
        tmp_path / "out",
        "beyond the limits",
    )


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "nothing"])
@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".tar.bz2", ".tar.xz"])
def test_damaged_archive(tmp_path, suffix, damage):
    archive = tmp_path / f"x{suffix}"
    make_zip(archive, [("a.bin", DATA[:50000])]) if suffix == ".zip" else make_tar(
        archive, [("a.bin", DATA[:50000], {})], "w:" + suffix.removeprefix(".tar.")
    )
    data = bytearray(archive.read_bytes())
    data[20000] ^= 1
    archive.write_bytes(
        {"truncated": data[:30000], "flipped": bytes(data), "text": b"<html>please sign in</html>", "nothing": b""}[
            damage
        ]
    )
    refused(archive, tmp_path / "out", "damaged")


def test_full_disk(tmp_path, monkeypatch):
    def full(*member):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    monkeypatch.setattr(sources, "member_blocks", full)
    refused(make_zip(tmp_path / "x.zip", [("a.txt", b"a")]), tmp_path / "out", "does not fit into .*No space left")


def test_archive_of_zeros(tmp_path):
    (tmp_path / "x.tar").write_bytes(bytes(10240))
    refused(tmp_path / "x.tar", tmp_path / "out", "is empty, or damaged")


def test_existing_files(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    archive = make_zip(tmp_path / "x.zip", [("a.txt", b"new"), ("mine.txt", b"theirs")])
    refused(archive, tmp_path / "out", "is there already and differs")
    refused(
        make_zip(tmp_path / "y.zip", [("a.txt", b"new"), ("mine.txt/b.txt", b"theirs")]),
        tmp_path / "out",
        "is there already and differs",
    )
    assert (tmp_path / "out/mine.txt").read_text() == "mine"
    extract(make_zip(tmp_path / "z.zip", [("a.txt", b"new"), ("mine.txt", b"mine")]), tmp_path / "out")
    assert names(tmp_path / "out") == ["a.txt", "mine.txt"]


def test_existing_link_out_of_the_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "out/images")
    refused(make_zip(tmp_path / "x.zip", [("images/a.txt", b"a")]), tmp_path / "out", "is there already and differs")


@pytest.mark.parametrize("second", ["a.txt", "a.txt/b.txt"])
def test_two_entries_of_one_name(tmp_path, second):
    archive = make_tar(tmp_path / "x.tar.gz", [("a.txt", b"one", {}), (second, b"two", {})])
    refused(archive, tmp_path / "out", r"two entries of one name \(a.txt")


# fetch


def jpeg(color):
    file = io.BytesIO()
    Image.new("RGB", (20, 16), color).save(file, "JPEG")
    return file.getvalue()


def medmnist(path, size=8):
    rng = np.random.default_rng(0)
    counts = {"train": 24, "val": 8, "test": 16}
    arrays = {
        f"{split}_images": rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8) for split, n in counts.items()
    }
    arrays |= {f"{split}_labels": (np.arange(n) % 8).astype(np.uint8)[:, None] for split, n in counts.items()}
    np.savez_compressed(path, **arrays)
    return arrays


def add_source(monkeypatch, **fields):
    monkeypatch.setitem(
        SOURCES,
        fields["name"],
        Source(**{"title": "t", "publisher": "p", "license": "l", "citation": "c", "contents": "x", **fields}),
    )


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="no source 'leafs'; there are kaggle_leaves, kaggle_cactus, bloodmnist"):
        fetch("leafs", tmp_path)


def add_blood_source(monkeypatch, address, data):
    "A source of blood cells that this test serves itself."
    add_source(
        monkeypatch,
        name="blood",
        how="url",
        address=address,
        file="blood.npz",
        classes=BLOOD_CLASSES,
        checksum="md5:" + hashlib.md5(data).hexdigest(),
    )


def test_fetch_medmnist(world, tmp_path, monkeypatch):
    arrays = medmnist(tmp_path / "published.npz")
    world["files"]["/blood.npz"] = data = (tmp_path / "published.npz").read_bytes()
    world["cuts"] = [3000]
    add_blood_source(monkeypatch, world["address"] + "/blood.npz", data)
    path = fetch("blood", tmp_path / "data")
    dataset = read_dataset(path)
    assert dataset.classes == list(BLOOD_CLASSES) and dataset.items["split"].value_counts().to_dict() == {
        "train": 24,
        "test": 16,
        "validation": 8,
    }
    np.testing.assert_array_equal(dataset.labels[24:32], arrays["val_labels"].ravel())
    images = np.concatenate([arrays[f"{split}_images"] for split in ("train", "val", "test")])
    np.testing.assert_array_equal(dataset.images(8), images)
    assert names(tmp_path / "data") == ["blood.json", "blood.npz"]
    requests = len(world["requests"])
    assert fetch("blood", tmp_path / "data") == path and len(world["requests"]) == requests
    record = sources.read_json(tmp_path / "data/blood.json")
    assert (
        record["sha256"] == hashlib.sha256(data).hexdigest()
        and record["path"] == "blood.npz"
        and record["license"] == "l"
    )


def test_not_an_npz(tmp_path):
    (tmp_path / "x.npz").write_text("<html>")
    with pytest.raises(SourceError, match="no npz file"):
        name_classes(tmp_path / "x.npz", tmp_path / "y.npz", BLOOD_CLASSES)
    assert not (tmp_path / "y.npz").exists()


def test_fetch_class_folders(world, tmp_path, monkeypatch):
    make_zip(
        tmp_path / "x.zip",
        [(f"PBC/{c}/{i}.jpg", jpeg(c)) for c in ("red", "blue") for i in range(3)]
        + [("__MACOSX/PBC/._x", b"x"), ("PBC/red/.DS_1.jpg", b"x")],
    )
    world["files"]["/x"] = (tmp_path / "x.zip").read_bytes()
    add_source(
        monkeypatch,
        name="cells",
        how="url",
        address=world["address"] + "/x",
        file="x.zip",
        inside="PBC",
        no_checksum="none",
    )
    dataset = read_dataset(fetch("cells", tmp_path / "data"))
    assert dataset.classes == ["blue", "red"] and len(dataset) == 6


def test_failed_fetch_leaves_no_data(world, tmp_path, monkeypatch):
    world["files"]["/x"] = b"<html>moved</html>"
    add_source(monkeypatch, name="cells", how="url", address=world["address"] + "/x", file="x.zip", no_checksum="none")
    with pytest.raises(SourceError, match="damaged"):
        fetch("cells", tmp_path / "data")
    assert not (tmp_path / "data/cells").exists() and not (tmp_path / "data/cells.json").exists()


class Kaggle:
    "Kaggle's client, as far as it is used: writes the ZIP file, or fails."

    def __init__(self, entries=(), error=None):
        self.entries, self.error = entries, error

    def competition_download_files(self, competition, path, quiet):
        if self.error:
            raise self.error
        make_zip(f"{path}/{competition}.zip", self.entries)


def test_kaggle_leaves(tmp_path):
    table = "image,label\n" + "".join(f"images/{i}.jpg,{('maple', 'oak')[i % 2]}\n" for i in range(6))
    entries = [
        ("train.csv", table),
        ("test.csv", "image\nimages/6.jpg\n"),
        ("sample_submission.csv", "image,label\nimages/6.jpg,oak\n"),
    ]
    client = Kaggle(entries + [(f"images/{i}.jpg", jpeg("green")) for i in range(7)])
    dataset = read_dataset(fetch("kaggle_leaves", tmp_path, client))
    assert dataset.classes == ["maple", "oak"] and len(dataset) == 6


def test_kaggle_cactus(tmp_path):
    inner = io.BytesIO()
    make_zip(inner, [(f"train/{i}.jpg", jpeg("brown")) for i in range(4)])
    client = Kaggle(
        [
            ("train.csv", "id,has_cactus\n" + "".join(f"{i}.jpg,{i % 2}\n" for i in range(4))),
            ("train.zip", inner.getvalue()),
            ("sample_submission.csv", "id,has_cactus\n9.jpg,0.5\n"),
        ]
    )
    dataset = read_dataset(fetch("kaggle_cactus", tmp_path, client))
    assert dataset.classes == ["0", "1"] and len(dataset) == 4


class Answer(Exception):
    "An error of the hub's or Kaggle's client, which had `status` before version 1.7 and `response.status_code` since."

    def __init__(self, status, new=True):
        super().__init__(f"{status} Client Error")
        if new:
            self.response = type("Response", (), {"status_code": status})()
        else:
            self.status = status


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    "status, message",
    [
        (403, "accept them at https://www.kaggle.com/competitions/classify-leaves/rules"),
        (401, "does not know your token.*KAGGLE_API_TOKEN"),
        (500, "500 Client Error"),
    ],
)
def test_kaggle_refuses(tmp_path, status, message, new):
    with pytest.raises(SourceError, match=message):
        fetch("kaggle_leaves", tmp_path, Kaggle(error=Answer(status, new)))


def test_kaggle_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaggle", None)
    with pytest.raises(SourceError, match="pip install kaggle"):
        fetch("kaggle_leaves", tmp_path)


@pytest.mark.parametrize(
    "error, message",
    [
        (SystemExit(1), "has no valid token"),
        (OSError("Could not find kaggle.json"), "could not sign in .Could not find kaggle.json"),
    ],
)
def test_kaggle_without_token(tmp_path, monkeypatch, capsys, error, message):
    class KaggleApi:
        def authenticate(self):
            print("Authentication required to call the Kaggle API.")
            raise error

    for name in ("kaggle", "kaggle.api", "kaggle.api.kaggle_api_extended"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    sys.modules["kaggle.api.kaggle_api_extended"].KaggleApi = KaggleApi
    with pytest.raises(SourceError, match=message + ".*access_token"):
        fetch("kaggle_leaves", tmp_path)
    assert capsys.readouterr().out == ""


class Hub:
    "The hub's client: three images of two families in one Parquet file."

    def __init__(self, error=None, file="dataset/Animalia-{}/{}.jpg"):
        self.error, self.file = error, file

    def snapshot_download(self, repository, repo_type, local_dir, allow_patterns):
        assert (repository, repo_type) == ("imageomics/rare-species", "dataset")
        if self.error:
            raise self.error
        items = pd.DataFrame(
            {
                "rarespecies_id": ["x", "y", "z"],
                "family": ["Felidae", "Ursidae", "Felidae"],
                "common": ["cat", "bear", "lynx"],
            }
        )
        for rank in ("kingdom", "phylum", "class", "order", "genus", "species"):
            items[rank] = rank
        items["file_name"] = [self.file.format(f, i) for f, i in zip(items["family"], items["rarespecies_id"])]
        for folder in ("metadata", "data"):
            (local_dir / folder).mkdir(parents=True)
        items.to_csv(local_dir / "metadata.csv", index=False)
        items[["rarespecies_id"]].assign(license_name="cc-by", copyright_owner="somebody").to_csv(
            local_dir / "metadata/licenses.csv", index=False
        )
        images = [{"bytes": jpeg("orange"), "path": f"{i}.jpg"} for i in items["rarespecies_id"]]
        pd.DataFrame({"rarespecies_id": items["rarespecies_id"], "file_name": images}).to_parquet(
            local_dir / "data/train-00000-of-00001.parquet"
        )
        return str(local_dir)


def test_rare_species(tmp_path):
    dataset = read_dataset(fetch("eol_rare_species", tmp_path, Hub()))
    assert dataset.classes == ["Felidae", "Ursidae"] and list(dataset.labels) == [0, 1, 0]
    assert list(dataset.items["license"]) == ["cc-by"] * 3 and "taxonomic_phylum" in dataset.items
    assert names(tmp_path)[0] == "eol_rare_species.json" and not (tmp_path / "eol_rare_species.download").exists()


def test_rare_species_with_names_that_lead_out(tmp_path):
    with pytest.raises(SourceError, match="would be written outside"):
        fetch("eol_rare_species", tmp_path, Hub(file="../../{}-{}.jpg"))


def test_rare_species_of_another_form(tmp_path):
    with pytest.raises(SourceError, match="another form than expected"):
        convert_rare_species(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "error, message",
    [
        (Answer(401), "create a token .* HF_TOKEN"),
        (Answer(403), "accept the terms"),
        (OSError("no network"), "no network"),
    ],
)
def test_hub_refuses(tmp_path, error, message):
    with pytest.raises(SourceError, match=message):
        fetch("eol_rare_species", tmp_path, Hub(error))


def test_hub_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SourceError, match="pip install huggingface_hub"):
        fetch("eol_rare_species", tmp_path)


def test_table():
    for name, source in SOURCES.items():
        assert (
            source.name == name
            and source.how in ("url", "kaggle", "hub")
            and source.license
            and source.citation
            and source.contents
        )
        if source.checksum:
            sources._algorithm(source.checksum)
        else:
            assert source.no_checksum
    assert list(sources.sources_table().index) == list(SOURCES)
