"""What decides a result has a key, and nothing else changes it; digests, locks and folders of a key."""

import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course_ml import provenance
from course_ml.provenance import (
    Key,
    cached_file,
    claim,
    code_hash,
    content_hash,
    derive_seed,
    file_digest,
    file_digests,
    holder,
    imported_modules,
    keyed_folder,
    lock,
    make_key,
    package_versions,
    path_digest,
    run_folder,
    used_modules,
)
from course_ml.runtime import share_of_cores

MODULES = {
    "__init__": '__version__ = "1.0"\n',
    "loss": '"The loss."\nfrom .numbers import half\n\ndef weighted_loss(x):\n    return half(x) * 1.0\n',
    "numbers": "__all__ = ['half']\n\ndef half(x):\n    return x / 2\n",
    "fit": "def fit(x):\n    from course_ml.loss import weighted_loss\n    return weighted_loss(x)\n",
    "plots": "from .fit import fit\n\ndef plot(x):\n    return 'red'\n",
    "parts/__init__": "SIZE = 1\n",
    "parts/layers": "from ..numbers import half\nfrom . import heads\n",
    "parts/heads": "WIDTH = 3\n",
}


@dataclasses.dataclass(frozen=True)
class Part:
    degrees: float = 20.0


@dataclasses.dataclass(frozen=True)
class OtherPart:
    degrees: float = 20.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    lr: float = 0.001
    epochs: int = 5
    augment: tuple = (Part(),)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    "An empty cache, and nothing remembered in memory."
    monkeypatch.setenv("COURSE_ML_HOME", str(tmp_path / "cache"))
    provenance._DIGESTS.clear()
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    "A small package in place of the library."
    folder = tmp_path / "copy" / "course_ml"
    for name, source in MODULES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(source)
    monkeypatch.setattr(provenance, "package_folder", lambda: folder)
    return folder


@pytest.fixture
def inputs(tmp_path) -> dict:
    "All kinds of inputs, as a caller gives them."
    weights, images = tmp_path / "weights.bin", tmp_path / "images"
    weights.write_bytes(b"weights")
    images.mkdir()
    (images / "1.png").write_bytes(b"image")
    table = pd.DataFrame({"id": ["a", "b"], "age": [1.0, 2.0]})
    return {"recipe": Recipe(), "array": np.arange(6, dtype="int64"), "weights": weights, "images": images,
            "order": ["a", "b"], "table": table, "split": {"a": "train", "b": "test"}, "fold": 0, "words": "some words"}


def edit(path: Path, old: str, new: str) -> None:
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new))


def edit_module(name, old, new):
    return lambda package, inputs, monkeypatch: edit(package / f"{name}.py", old, new)


def give(name, change):
    return lambda package, inputs, monkeypatch: inputs.update({name: change(inputs[name])})


def write(name, content, file=""):
    return lambda package, inputs, monkeypatch: (inputs[name] / file).write_bytes(content)


def install(name, version):
    def change(package, inputs, monkeypatch):
        old = provenance.package_versions
        monkeypatch.setattr(provenance, "package_versions", lambda names: {**old(names), name: version})
    return change


def rename_image(package, inputs, monkeypatch):
    (inputs["images"] / "1.png").rename(inputs["images"] / "2.png")


def move(package, inputs, monkeypatch):
    for name in ("weights", "images"):
        inputs[name] = inputs[name].rename(inputs[name].with_name(f"moved_{name}"))


def touch(package, inputs, monkeypatch):
    os.utime(inputs["weights"], ns=(1, 1))


# Each row: what is changed, how, and what the key says about it; "" where the key stays the same.
MUTATIONS = {
    "a module": (edit_module("fit", "weighted_loss(x)", "weighted_loss(0 * x)"), "module fit changed"),
    "a module imported inside a function": (edit_module("loss", "* 1.0", "* 0.0"), "module loss changed"),
    "a module used by a used module": (edit_module("numbers", "x / 2", "x / 3"), "module numbers changed"),
    "an import": (edit_module("loss", "from .numbers", "from . import parts\nfrom .numbers"),
                  "module loss changed, module parts is used now"),
    "a number's type": (edit_module("loss", "1.0", "1"), "module loss changed"),
    "a package": (install("pillow", "0.1"), "package pillow: * became 0.1"),
    "a recipe's field": (give("recipe", lambda r: dataclasses.replace(r, lr=0.01)), "recipe lr: 0.001 became 0.01"),
    "a part of a recipe": (give("recipe", lambda r: Recipe(augment=(Part(10.0),))), "recipe augment: *"),
    "a part's class": (give("recipe", lambda r: Recipe(augment=(OtherPart(),))), "recipe augment: *"),
    "a value of an array": (give("array", lambda a: a + (a == 3)), "array: ndarray * became ndarray *"),
    "the shape of an array": (give("array", lambda a: a.reshape(2, 3)), "array: *"),
    "the type of an array": (give("array", lambda a: a.astype("uint64")), "array: *"),
    "a file of the same size": (write("weights", b"zeroes!"), "weights changed"),
    "a file in a folder": (write("images", b"imagE", "1.png"), "images changed"),
    "a name in a folder": (rename_image, "images changed"),
    "a further file": (write("images", b"", "2.png"), "images changed"),
    "the order of a list": (give("order", lambda v: v[::-1]), 'order: ["a", "b"] became ["b", "a"]'),
    "a table's value": (give("table", lambda t: t.replace(2.0, 3.0)), "table: DataFrame *"),
    "a table's column name": (give("table", lambda t: t.rename(columns={"age": "years"})), "table: DataFrame *"),
    "a table's order": (give("table", lambda t: t[::-1].reset_index(drop=True)), "table: DataFrame *"),
    "a table's index": (give("table", lambda t: t.set_index("id", drop=False)), "table: DataFrame *"),
    "a split": (give("split", lambda s: {**s, "b": "train"}), "split b: test became train"),
    "a number": (give("fold", lambda n: n + 1), "fold: 0 became 1"),
    "a string": (give("words", lambda s: s + "!"), "words: some words became some words!"),

    "a comment": (edit_module("loss", "* 1.0", "* 1.0  # no weights"), ""),
    "a docstring": (edit_module("loss", "The loss.", "The weighted loss."), ""),
    "a new docstring": (edit_module("fit", "def fit(x):\n", 'def fit(x):\n    "Fit."\n'), ""),
    "blank lines and layout": (edit_module("loss", "half(x) * 1.0", "(\n\n        half( x )*1.0)"), ""),
    "__all__": (edit_module("numbers", "['half']", "['half', 'third']"), ""),
    "__version__": (edit_module("__init__", "1.0", "1.1"), ""),
    "code of plots": (edit_module("plots", "red", "blue"), ""),
    "an unused module": (edit_module("parts/heads", "3", "4"), ""),
    "a folder's place": (move, ""),
    "a file's time": (touch, ""),
    "a copy of an array": (give("array", lambda a: np.asfortranarray(a.copy())), ""),
    "a tuple for a list": (give("order", tuple), ""),
    "the order of a dict": (give("split", lambda s: dict(reversed(s.items()))), ""),
    "a number of NumPy": (give("fold", np.int64), ""),
}


@pytest.mark.parametrize("change, expected", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_what_decides_changes_the_key_and_nothing_else_does(change, expected, package, inputs, monkeypatch):
    before = make_key(["fit"], provenance.IMAGE_PACKAGES, **inputs)
    change(package, inputs, monkeypatch)
    after = make_key(["fit"], provenance.IMAGE_PACKAGES, **inputs)
    differences = ", ".join(before.differences(after))
    assert (before.name == after.name) == (expected == ""), differences
    assert all(word in differences for word in expected.split("*")) and bool(differences) == bool(expected), differences
    assert Key.from_dict(json.loads(json.dumps(after.to_dict()))) == after


def test_keyword_order_and_file_names_do_not_count(inputs):
    forwards, backwards = make_key(**inputs), make_key(**dict(reversed(inputs.items())))
    assert forwards.name == backwards.name and not forwards.differences(backwards)


def test_large_inputs_are_not_written_into_the_key():
    ids, array = [f"image {i}" for i in range(10_000)], np.zeros(10_000)
    key = make_key(["provenance"], ids=ids, array=array)
    assert len(json.dumps(key.to_dict())) < 2000
    assert key.name != make_key(["provenance"], ids=ids[1:], array=array).name


def test_what_has_no_content_is_refused_by_type():
    for value in ({1, 2}, object(), Recipe):
        with pytest.raises(TypeError, match="cannot hash a"):
            make_key(value=value)
    with pytest.raises(TypeError, match="cannot hash a PosixPath|cannot hash a WindowsPath"):
        content_hash(Path("file"))


# Hashes of values


def strict(value):
    "The value with its types, so that 1, 1.0, True and '1' differ, as they do in JSON."
    if isinstance(value, (list, tuple)):
        return ("list", *map(strict, value))
    if isinstance(value, dict):
        return ("dict", frozenset((strict(key), strict(item)) for key, item in value.items()))
    if isinstance(value, np.ndarray):
        return ("array", value.dtype, value.shape, value.tobytes())
    return type(value), repr(value)


arrays = st.builds(lambda items, dtype, shape: np.resize(np.array(items, dtype), shape),
                   st.lists(st.integers(0, 3), min_size=1, max_size=4),
                   st.sampled_from(["uint8", "int64", "float32"]),
                   st.sampled_from([(2,), (1, 2), (2, 1), (4,), (2, 2)]))
leaves = (st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, 1.0, 2.5])
          | st.text("01a\u00e9", max_size=2) | st.binary(max_size=2) | arrays)
keys = st.text("01a", max_size=1) | st.integers(0, 1)
values = st.recursive(leaves, lambda deeper: st.lists(deeper, max_size=3) | st.dictionaries(keys, deeper, max_size=3),
                      max_leaves=5)


@settings(max_examples=300, deadline=None)
@given(values, values)
def test_equal_hashes_mean_equal_values(first, second):
    assert (content_hash(first) == content_hash(second)) == (strict(first) == strict(second))
    assert content_hash([first]) == content_hash((first,)) != content_hash(first)


def test_seeds_are_those_of_earlier_versions():
    assert [derive_seed(0, "epoch", 1), derive_seed(7, "fold", 2, "row")] == [724397675, 1035998639]


# Hashes of code


@pytest.mark.parametrize("cell", [
    "%matplotlib inline\nfrom course_ml.loss import x",
    "!ls\nimport course_ml.loss as l",
    "files = !ls\nfrom course_ml.loss import x",
    "x?\nfrom course_ml.loss import x",
    "await go()\nimport course_ml.loss",
    "%time from course_ml.loss import weighted_loss",
    "%%time\nfrom course_ml import loss",
    "%%capture out\n%matplotlib inline\nfrom course_ml.loss import *",
    "%%memit -r 1\nfrom course_ml.loss import x",
    "%%timeit from course_ml.loss import x\nx(1)",
    "def f():\n    if True:\n        from course_ml.loss import x",
])
def test_imports_are_found_in_any_cell(cell, package):
    assert imported_modules(cell) == {"__init__", "loss"}
    assert set(used_modules(sources=[cell])) == {"__init__", "loss", "numbers"}


def test_sub_packages_and_relative_imports(package):
    assert set(used_modules(["parts.layers"])) == {"__init__", "parts", "parts.layers", "parts.heads", "numbers"}
    assert imported_modules("import course_ml.parts.heads") == {"__init__", "parts", "parts.heads"}
    assert imported_modules("from course_ml.parts import heads, SIZE") == {"__init__", "parts", "parts.heads"}
    assert imported_modules("import course_mlx.loss\nfrom numpy import loss") == set()
    with pytest.raises(ValueError, match="there is no module 'losses'"):
        used_modules(["losses"])


def test_cells_count_in_a_key(package):
    cells = ["from course_ml.fit import fit", "%%time\nfit(1)"]
    key = make_key(sources=cells)
    assert set(key.code) == {"cell 1", "cell 2", "__init__", "fit", "loss", "numbers"}
    assert make_key(sources=[cells[0], "# only words", cells[1] + "  # now"]).name == key.name
    assert key.differences(make_key(sources=[cells[0], "%%time\nfit(2)"])) == ["cell 2 changed"]


def test_code_that_is_not_python_counts_as_its_text():
    assert code_hash("this is not code") != code_hash("this is no code")
    assert imported_modules("this is not code") == set()


def test_what_a_magic_writes_counts_with_its_comments():
    assert code_hash("%%writefile notes.py\nx = 1  # one") != code_hash("%%writefile notes.py\nx = 1  # two")
    assert code_hash("%%time\nx = 1  # one") == code_hash("%%time\nx = 1  # two")


NOTEBOOK = '{"cells": [{"cell_type": "code", "source": ["from helper import x"]}]}'
OWN = {  # how a cell uses code outside the library -> the files that count
    "from helper import x": ["helper.py"],
    "def f():\n    import helper as h": ["helper.py"],
    "import pack.part": ["helper.py", "pack/part.py"],  # a folder without __init__.py, whose module uses another
    "%run -i helper.py": ["helper.py"],
    "%run helper": ["helper.py"],
    "%run setup.ipynb": ["helper.py", "setup.ipynb"],
}


@pytest.mark.parametrize(("cell", "files"), OWN.items(), ids=OWN)
def test_modules_outside_the_library_count(cell, files, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pack").mkdir()
    for name, source in (("helper.py", "from course_ml.loss import weighted_loss\nx = 1\n"),
                         ("pack/part.py", "from helper import x\n"), ("setup.ipynb", NOTEBOOK)):
        Path(name).write_text(source)
    key = make_key(sources=[cell])
    assert {name for name in key.code if "." in name} == set(files)
    assert {"loss", "numbers"} <= set(key.code)
    edit(Path("helper.py"), "x = 1", "x = 1  # one")
    assert key.differences(make_key(sources=[cell])) == []
    edit(Path("helper.py"), "x = 1", "x = 2")
    assert key.differences(make_key(sources=[cell])) == ["module helper.py changed"]


def test_installed_packages_count_by_their_version_only(package):
    cell = "import numpy, os, sys, pytest\nfrom torch import nn\nimport no_such_module"
    assert list(make_key(sources=[cell]).code) == ["cell 1"]


def test_versions_are_read_without_imports(package):
    assert package_versions(["pillow"])["pillow"][0].isdigit()
    code = "import sys; from course_ml.provenance import *; make_key(['runtime']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"numpy", "pandas", "torch", "tensorflow", "keras", "IPython", "filelock"}


# Digests of files


@pytest.fixture
def reads(monkeypatch) -> list:
    "The paths of the files that are read."
    read, old = [], provenance._hash_files
    monkeypatch.setattr(provenance, "_hash_files", lambda paths: read.extend(paths) or old(paths))
    return read


def old_file(path: Path, content: bytes) -> Path:
    "A file that was modified a while ago."
    path.write_bytes(content)
    os.utime(path, ns=(10**18 + 5, 10**18 + 5))
    return path


def test_a_file_is_read_once(tmp_path, reads):
    paths = [old_file(tmp_path / f"{i}.png", b"%d" % i) for i in range(200)]
    digests = file_digests(paths)
    assert len(reads) == 200 and len(set(digests)) == 200
    assert file_digests(paths) == digests and len(reads) == 200
    provenance._DIGESTS.clear()  # as in another process
    assert file_digests(paths[::-1]) == digests[::-1] and len(reads) == 200
    assert file_digests([paths[0], paths[0]]) == [digests[0]] * 2


def test_touch_and_replacement_are_seen(tmp_path, reads):
    path = old_file(tmp_path / "a", b"one")
    first = file_digest(path)
    os.utime(path)
    assert file_digest(path) == first and len(reads) == 2
    old_file(tmp_path / "b", b"two")
    os.utime(tmp_path / "b", ns=(os.stat(path).st_mtime_ns,) * 2)  # same size and time, another inode
    os.replace(tmp_path / "b", path)
    assert file_digest(path) != first


def test_a_file_written_in_the_same_tick_is_read_again(tmp_path):
    path = tmp_path / "a"
    for content in [b"one", b"two", b"six"] * 20:
        path.write_bytes(content)
        assert file_digest(path) == provenance.hashlib.sha256(content).hexdigest()


def test_verify_corrects_what_is_remembered(tmp_path, reads):
    path = old_file(tmp_path / "a", b"one")
    first = file_digest(path)
    old_file(path, b"two")  # in place, with the old size and time: nothing that is looked at has changed
    assert file_digest(path) == first
    second = file_digest(path, verify=True)
    assert second != first and file_digest(path) == second
    provenance._DIGESTS.clear()
    assert file_digest(path) == second and len(reads) == 2


def broken(cache):
    cache.mkdir()
    (cache / "digests.sqlite").write_bytes(b"this is no database" * 100)


def occupied(cache):
    cache.write_text("a file where the cache should be")


def other_table(cache):
    cache.mkdir()
    with sqlite3.connect(cache / "digests.sqlite") as connection:
        connection.execute("create table digests (words text)")


@pytest.mark.parametrize("damage", [broken, occupied, other_table])
def test_a_useless_database_is_no_error(damage, cache, tmp_path, reads):
    damage(cache)
    path = old_file(tmp_path / "a", b"one")
    assert file_digest(path) == file_digest(path) == provenance.hashlib.sha256(b"one").hexdigest()
    provenance._DIGESTS.clear()
    assert file_digest(path) and len(reads) == (1 if damage is broken else 2)  # a damaged one is made again


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_without_permission_is_no_error(cache, tmp_path):
    cache.mkdir(mode=0o500)
    assert file_digest(old_file(tmp_path / "a", b"one"))


def test_odd_names(tmp_path):
    (tmp_path / "files").mkdir()
    path = old_file(Path(os.fsdecode(os.fsencode(tmp_path) + b"/files/caf\xe9 \xff")), b"one")
    assert path_digest(tmp_path / "files") == path_digest(tmp_path / "files")
    assert file_digest(path) == file_digest(str(path))
    with pytest.raises(FileNotFoundError):
        path_digest(tmp_path / "nothing")


def start(code: str, *arguments) -> subprocess.Popen:
    "Another process that runs some code; its arguments are in `sys.argv[1:]`."
    code = f"import sys, time\nfrom course_ml.provenance import *\n{code}"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def output_of(process: subprocess.Popen) -> str:
    "What a process printed, once it has ended well."
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output + errors


def test_processes_share_the_database(tmp_path):
    (tmp_path / "files").mkdir()
    for i in range(100):
        old_file(tmp_path / "files" / str(i), b"%d" % i)
    code = "for _ in range(3): print(path_digest(sys.argv[1], verify=True))"
    processes = [start(code, tmp_path / "files") for _ in range(3)]
    assert set("".join(map(output_of, processes)).split()) == {path_digest(tmp_path / "files")}


# Locks and folders

HOLD = "with lock(sys.argv[1]): print('held', flush=True); time.sleep(600)"


@pytest.fixture
def held(tmp_path):
    "A path that another process has locked, and this process."
    process = start(HOLD, tmp_path / "run")
    assert process.stdout.readline() == "held\n"
    yield tmp_path / "run", process
    process.kill()
    process.communicate()


def test_the_message_says_who_works(held):
    path, process = held
    message = rf"process {process.pid} \(since .* UTC\) is working on .*run: wait for its end"
    with pytest.raises(RuntimeError, match=message), lock(path, wait=False):
        raise AssertionError("the lock is held")
    assert holder(path)["pid"] == process.pid


def test_a_kill_frees_the_lock(held):
    path, process = held
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert holder(path) is None
    with lock(path, wait=False):
        assert holder(path)["pid"] == os.getpid()
    assert holder(path) is None


def test_the_other_waits_and_says_for_whom(held):
    path, process = held
    waiting = start("with lock(sys.argv[1], message='run 7'): print('mine')", path)
    assert waiting.stderr.readline().startswith(f"run 7: waiting for process {process.pid} (since ")
    process.kill()
    assert output_of(waiting) == "mine\n"


def test_two_processes_compute_a_file_once(tmp_path):
    code = """
def write(path):
    print("computed", flush=True)
    time.sleep(.5)
    path.write_text("1")
print(cached_file("numbers", make_key(["provenance"]), ".txt", write).read_text())"""
    processes = [start(code), start(code)]
    assert "".join(map(output_of, processes)).count("computed") == 1
    assert cached_file("numbers", make_key(["provenance"]), ".txt", None).read_text() == "1"


def test_a_failed_computation_leaves_nothing(cache):
    def fail(path):
        path.write_text("half")
        raise ValueError("no more")
    with pytest.raises(ValueError, match="no more"):
        cached_file("numbers", make_key(["provenance"]), ".txt", fail)
    assert [path for path in (cache / "numbers").iterdir() if not path.name.startswith(".")] == []
    cached_file("numbers", make_key(["provenance"]), ".txt", lambda path: path.write_text("whole"))


def test_a_folder_belongs_to_its_key(tmp_path):
    key, other = (make_key(["provenance"], recipe=Recipe(lr=lr), fold=0) for lr in (0.1, 0.2))
    with keyed_folder(tmp_path / "run", key) as folder:
        (folder / "result.txt").write_text("0.9")
        assert claim(folder, key) == tmp_path / "run"
    message = "run holds the result of something else: recipe lr: 0.1 became 0.2. Give another folder"
    with pytest.raises(ValueError, match=message):
        claim(tmp_path / "run", other)
    assert (tmp_path / "run/result.txt").read_text() == "0.9"
    assert run_folder("torch", key) != run_folder("torch", other) != run_folder("keras", other)


def test_another_key_is_refused_without_waiting(tmp_path):
    key, other = make_key(["provenance"], fold=0), make_key(["provenance"], fold=1)
    code = "with keyed_folder(sys.argv[1], make_key(['provenance'], fold=0)):"
    process = start(f"{code} print('held', flush=True); time.sleep(600)", tmp_path / "run")
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="fold: 0 became 1"), keyed_folder(tmp_path / "run", other):
            pass
        message = f"process {process.pid}"
        with pytest.raises(RuntimeError, match=message), keyed_folder(tmp_path / "run", key, wait=False):
            pass
    finally:
        process.kill()
        process.communicate()


def test_files_of_unknown_origin_are_refused(tmp_path):
    key = make_key(["provenance"])
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / ".hidden").write_text("")
    with pytest.raises(ValueError, match=r"has files \(run.json\) but no key.json.*give another folder"):
        claim(tmp_path, key)
    assert claim(tmp_path, key, ignore=["run.json"]) == tmp_path
    (tmp_path / "key.json").write_text("{")
    with pytest.raises(ValueError, match="key.json is damaged.*give another folder"):
        claim(tmp_path, key)


# Threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to a core")
@pytest.mark.parametrize("threads", ["", "64"])
def test_threads_are_those_that_may_be_used(threads):
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from course_ml.runtime import *
print(available_threads(), share_of_cores(1), share_of_cores(4), machine_info()["threads"])"""
    variables = {**os.environ, "OMP_NUM_THREADS": threads}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"] * 4


@pytest.mark.parametrize("workers", [0, -1])
def test_cores_are_not_shared_by_nobody(workers):
    with pytest.raises(ValueError, match=f"workers must be at least 1, not {workers}"):
        share_of_cores(workers)
