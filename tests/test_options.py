"The commands and notebooks that read data: one set of options, what is said, and values of papermill."

import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
from PIL import Image

from course_ml.command_line import command_line, main
from course_ml.data import Dataset, Split
from course_ml.data_commands import with_groups
from course_ml.datasets import load_dataset
from course_ml.notebooks import ParameterError, convert_parameters, parameters_position, read_notebook, read_parameters
from course_ml.provenance import package_folder
from course_ml.readers import read_dataset, read_unlabelled
from course_ml.reading import OPTION_HELP

ROOT = Path(__file__).parents[1]
OPTIONS = [*OPTION_HELP, "group_duplicates"]


def draw(folder, classes, n, seed=0):
    "Noisy images of a color for each class."
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        color = random.integers(0, 255, 3)
        for i in range(n):
            pixels = np.clip(random.normal(color, 30, (24, 24, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def write_table(folder, n=12):
    "A table that does not say which of two columns is the class."
    draw(folder / "images", ["all"], n)
    rows = [(f"images/all/{i}.png", f"kind {i % 2}", f"plant {i // 4}", "red") for i in range(n)]
    pd.DataFrame(rows, columns=["where", "kind", "plant_id", "color"]).to_csv(folder / "list.csv", index=False)


@pytest.mark.parametrize("arguments", [["check", "x"], ["new", "x", "--data", "x"], ["train", "x", "--data", "x"]])
def test_commands_have_the_same_options(arguments):
    flags = [word for name in OPTION_HELP for word in (f"--{name.replace('_', '-')}", f"a {name}")]
    options = command_line().parse_args([*arguments, *flags, "--group-duplicates", "near"])
    assert [getattr(options, name) for name in OPTIONS] == [*(f"a {name}" for name in OPTION_HELP), "near"]


@pytest.mark.parametrize("function", [read_dataset, load_dataset])
def test_help_shows_the_same_options(function):
    names = list(inspect.signature(function).parameters)
    assert names[-len(OPTION_HELP):] == list(OPTION_HELP) and "options" not in names
    assert all(f"  {name}: {about}\n" in f"{inspect.getdoc(function)}\n" for name, about in OPTION_HELP.items())
    with pytest.raises(TypeError, match="lable_column"): function("x", lable_column="dx")


@pytest.mark.parametrize("path", [ROOT / "nbs/03_resnet.ipynb", package_folder() / "templates/study.ipynb"])
def test_notebooks_have_the_same_parameters(path):
    names = [parameter.name for parameter in read_parameters(read_notebook(path))]
    assert [name for name in names if name in OPTIONS] == OPTIONS


def test_notebooks_with_annotated_parameters_convert_them():
    paths = [*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("nbs/reports/*.ipynb"), package_folder() / "templates/study.ipynb"]
    notebooks = [read_notebook(path) for path in paths if '"parameters"' in path.read_text()]
    converting = [one for one in notebooks if ": str = " in one.cells[parameters_position(one)].source]
    assert len(converting) >= 2
    for notebook in converting:
        cells = [cell.source for cell in notebook.cells[parameters_position(notebook) + 1:] if cell.cell_type == "code"]
        first = next(source for source in cells if "import" not in source)
        assert first.startswith("convert_parameters(globals())")


@pytest.mark.parametrize("kind, value, expected", [
    ("str", 2024, "2024"), ("str", "7", "7"), ("int", 32.0, 32), ("int", "1", 1), ("int", 3, 3), ("float", 1, 1.0),
    ("float", "1e-3", 0.001), ("list", "[1, 2]", [1, 2]), ("bool", "true", True),
])
def test_values_of_another_type_are_converted(kind, value, expected):
    names = {"__annotations__": {"it": kind, "other": "Path"}, "it": value, "other": 3}
    convert_parameters(names)
    assert names["it"] == expected and type(names["it"]) is type(expected) and names["other"] == 3


@pytest.mark.parametrize("kind, value", [
    ("str", 32.0), ("str", True), ("str", None), ("int", 32.5), ("int", "a"), ("int", True), ("float", "nan"),
    ("float", False), ("list", 3), ("list", "a, b"), ("bool", 1), ("bool", "yes"),
])  # fmt: skip
def test_values_that_do_not_fit_are_refused_by_name(kind, value):
    with pytest.raises(ParameterError, match=f"parameter 'it' must be of type {kind}, not"):
        convert_parameters({"__annotations__": {"it": kind}, "it": value})


def test_a_new_report_reads_what_papermill_gives_in_its_own_folder(tmp_path, monkeypatch, capsys):
    "A folder 2024 with classes 7, 8, 9 and a split, which is kept; the path is found from the notebook's folder."
    monkeypatch.chdir(tmp_path)
    draw(Path("2024/Training"), ["7", "8", "9"], 8)
    draw(Path("2024/Testing"), ["7", "8", "9"], 3, seed=1)
    assert main(["new", "digits", "--data", "2024", "--leave-out", "9"]) == 0
    message = capsys.readouterr().out
    assert "splits by folder" in message and "test came with the data" in message and "Kinds of pixels" in message
    given = {"data_path": 2024, "leave_out": 9, "image_size": 24.0, "epochs": "1", "seed": "1", "report_dir": "out"}
    monkeypatch.chdir("reports/digits")
    papermill.execute_notebook("digits.ipynb", "done.ipynb", given, progress_bar=False)
    split = pd.read_csv("out/tables/split.csv")
    assert split["class"].tolist() == [7, 8] and split.test.tolist() == [3, 3]
    assert pd.read_csv("out/tables/reading.csv").sentence.str.contains("left out on request: 9").any()


def test_new_refuses_what_cannot_be_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_table(Path("table"))
    for arguments in (["check", "table"], ["new", "kinds", "--data", "table"], ["train", "none", "--data", "table"]):
        assert main(arguments) == 2
    (tmp_path / "broken/a").mkdir(parents=True)
    (tmp_path / "broken/b").mkdir()
    for name in ("a/1.jpg", "b/2.jpg"): (tmp_path / "broken" / name).write_text("no image")
    assert main(["new", "broken", "--data", "broken"]) == 2
    assert "none of 2 images that were tried can be read, e.g. a/1.jpg: not an image" in capsys.readouterr().err
    assert not Path("reports").exists()


def test_new_refuses_what_cannot_be_split(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(Path("pets"), ["cat", "dog"], 4)
    draw(Path("pets"), ["owl, barn"], 1)
    assert main(["new", "pets", "--data", "pets"]) == 2 and not Path("reports").exists()
    assert "'owl, barn' has 1. Add images, or leave the class out (--leave-out)" in capsys.readouterr().err
    assert main(["check", "pets"]) == 0 and "No split: pets: 3 splits need" in capsys.readouterr().out
    assert main(["new", "pets", "--data", "pets", "--leave-out", "owl, barn"]) == 0


def test_advice_names_options_that_the_command_has(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_table(Path("table"))
    commands = {"check": ["check", "table"], "new": ["new", "kinds", "--data", "table"]}
    for arguments in commands.values():
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert "--label-column" in message and "label_column" not in message
        assert main([*arguments, "--label-column", "kind"]) == 0
        assert "--group-column='plant_id'" in capsys.readouterr().out
        assert main([*arguments, "--leave-out", "kind 3"]) == 2


def test_at_most_twenty_lines_of_what_is_not_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_ML_HOME", str(tmp_path / "home"))
    draw(tmp_path / "set", ["a", "b"], 3)
    for i in range(50): (tmp_path / "set" / f"notes {i}.txt").touch()
    assert main(["check", str(tmp_path / "set")]) == 0
    message = capsys.readouterr().out
    assert len(re.findall(r"^ *notes \d+\.txt ", message.split("Not used: 50\n")[1], re.MULTILINE)) == 20
    path = message.split("30 more; all of them are in ")[1].splitlines()[0]
    assert len(pd.read_csv(path)) == 50


def test_train_names_images_that_cannot_be_read(tmp_path, capsys):
    draw(tmp_path / "set", ["kind 7", "kind 8"], 8)
    (tmp_path / "set/kind 7/1.png").write_bytes(b"")
    assert main(["train", "nature10_model_1", "--data", str(tmp_path / "set"), "--set", "image_size=24"]) == 2
    message = capsys.readouterr().err
    assert "1 images cannot be read: kind 7/1.png (the file is empty)" in message
    assert f"course-ml check {tmp_path / 'set'} names all" in message and "dataset." not in message


def test_a_reader_who_has_seen_enough_ends_a_command(tmp_path):
    draw(tmp_path / "set", ["cat", "dog"], 3)
    command = [sys.executable, "-m", "course_ml.command_line", "check", str(tmp_path / "set")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize("arguments", [["check", ""], ["train", "leaves_resnet50d", "--data", ""]])
def test_an_empty_path_is_no_built_in_set(arguments, capsys):
    assert main(arguments) == 2
    assert "the path of the images is empty" in capsys.readouterr().err


def test_names_do_not_control_the_terminal(tmp_path, capsys):
    draw(tmp_path / "set", ["\x1b[31mcat", "dog\x9b2J"], 3)
    (tmp_path / "set/\x1b[2J.txt").write_text("")
    assert main(["check", str(tmp_path / "set")]) == 0
    message = capsys.readouterr().out
    assert "[31mcat" in message and "[2J.txt" in message and not re.search(r"[\x1b\x9b]", message)


def test_new_and_train_split_as_the_report_does(tmp_path, monkeypatch, capsys):
    "Duplicates are tied together and unreadable images left out before a split is promised."
    monkeypatch.chdir(tmp_path)
    draw(Path("set"), ["cat", "dog"], 6)
    for i in range(1, 6): Path(f"set/dog/{i}.png").write_bytes(Path("set/dog/0.png").read_bytes())
    train = ["train", "nature10_model_1", "--data", "set", "--set", "image_size=24"]
    for arguments in (["new", "pets", "--data", "set"], train):
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert "'dog' has 1. Add images; images that share a group count as one" in message
    assert main(["check", "set"]) == 0 and "No split: set: 3 splits need" in capsys.readouterr().out
    draw(Path("bad"), ["cat", "dog"], 3)
    Path("bad/cat/1.png").write_bytes(b"")
    assert main(["new", "pets", "--data", "bad"]) == 2 and "'cat' has 2" in capsys.readouterr().err
    assert not Path("reports").exists()


def test_exact_duplicates_are_grouped_as_a_check_groups_them(tmp_path):
    draw(tmp_path / "set", ["cat", "dog"], 4)
    content = (tmp_path / "set/cat/2.png").read_bytes()
    for name in ("cat/8.png", "dog/9.png"): (tmp_path / "set" / name).write_bytes(content)
    dataset = read_dataset(tmp_path / "set")
    found = dataset.check().duplicates
    for kind in ("none", "exact", "near"):
        assert with_groups(dataset, kind).fingerprint == dataset.group_duplicates(found, kind).fingerprint
    assert with_groups(dataset, "exact").items.group.nunique() == 8


def test_a_report_is_not_made_in_the_folder_that_it_replaces(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(Path("set"), ["cat", "dog"], 4)
    assert main(["new", "pets", "--data", "set"]) == 0
    (tmp_path / "reports/pets/tables").mkdir()
    for place, up in (("reports/pets", "../.."), ("reports/pets/tables", "../../..")):
        monkeypatch.chdir(tmp_path / place)
        assert main(["report", "pets"]) == 2 and f"cd {up}\n" in capsys.readouterr().err
        assert main(["report", "pets", "--explain"]) == 0


def test_an_empty_path_is_not_the_data_of_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(Path("set"), ["cat", "dog"], 4)
    assert main(["new", "pets", "--data", "set"]) == 0
    assert main(["report", "pets", "-p", "data_path", ""]) == 2
    assert "'data_path': the path of the images is empty" in capsys.readouterr().err
    with pytest.raises(papermill.PapermillExecutionError, match=r"the path of the images \(data_path\) is empty"):
        papermill.execute_notebook("reports/pets/pets.ipynb", "done.ipynb", {"data_path": ""}, progress_bar=False)


def test_paths_of_a_program_are_read_as_people_write_them(tmp_path, monkeypatch):
    draw(tmp_path / "set", ["cat", "dog"], 2)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "set")  # an empty path is not this folder
    assert len(read_dataset("~/set")) == len(load_dataset(data_path="~/set")) == 4
    for read in (read_dataset, lambda path: read_unlabelled(path, ["cat", "dog"])):
        with pytest.raises(ValueError, match="the path of the images .* is empty"):
            read("")
    for value in (["cat"], 7, None, True):
        with pytest.raises(ValueError, match="leave_out is a string"):
            read_dataset("~/set", leave_out=value)
    with pytest.raises(ValueError, match="has no name of a class"):
        read_dataset("~/set", leave_out=" , ")


def test_advice_that_does_not_help_is_not_given(tmp_path, capsys):
    draw(tmp_path / "two", ["a", "b"], 2)
    assert main(["check", str(tmp_path / "two")]) == 0
    message = capsys.readouterr().out
    assert "'a' has 2, 'b' has 2. Add images\n" in message
    for name in ("val", "test"): draw(tmp_path / "held" / name, ["a", "b"], 3)
    assert main(["train", "nature10_model_1", "--data", str(tmp_path / "held")]) == 2
    assert "only test and validation; call the one to train on 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("changes, told", [
    ({"labels": [0, np.nan]}, "image 1 has no label"), ({"labels": ["a", None]}, "image 1 has no label"),
    ({"labels": [0.5, 1.0], "classes": ["a", "b"]}, "an image has label 0.5, which is none of 2 classes"),
    ({"labels": ["a", "c"], "classes": ["a", "b"]}, "an image has label 'c', which is none of 2 classes"),
    ({"labels": [1, 2], "classes": ["a", "b"]}, "an image has label 2, which is none of 2 classes"),
    ({"classes": "ab"}, "a list of names, not 'ab'"), ({"ids": ["x"]}, "2 images but 1 ids"),
    ({"groups": ["x"]}, "2 images but 1 groups"),
    ({"metadata": pd.DataFrame({"age": [3]})}, "2 images but 1 rows of metadata"),
    ({"metadata": pd.DataFrame({"id": [3, 4]})}, "call the column 'id' of metadata otherwise"),
])  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(changes, told):
    images = np.zeros((2, 8, 8), "uint8")
    with pytest.raises(ValueError, match=told):
        Dataset.from_arrays("pets", images, **{"labels": [0, 1], **changes})


def test_names_of_classes_in_arrays_are_names():
    images = np.zeros((2, 8, 8), "uint8")
    assert Dataset.from_arrays("digits", images, ["0", "1"], classes=["1", "0"]).labels.tolist() == [1, 0]
    for labels in ([1.0, 0.0], [True, False], np.array([1, 0], object), np.array(["b", "a"], object)):
        assert Dataset.from_arrays("digits", images, labels, classes=["a", "b"]).labels.tolist() == [1, 0]


def test_a_split_with_gaps_is_refused_by_its_image():
    metadata = pd.DataFrame({"split": ["train", None]})
    dataset = Dataset.from_arrays("pets", np.zeros((2, 8, 8), "uint8"), [0, 1], metadata=metadata)
    with pytest.raises(ValueError, match="the split .* of '000001' is none of train, validation, test"):
        Split.of(dataset)
