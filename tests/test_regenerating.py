"Only what is stale is made again; one that fails leaves the others alone; and what differs is found."
import ast
import re
import shutil
import signal
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies
from PIL import Image
from test_reporting import (
    IMAGE,
    TABLE,
    WORK,
    contents,
    copy_project,
    course_ml,
    gone,
    hear_ctrl_c,
    make_project,
    wait_for,
    write_notebook,
    write_report,
)

from course_ml.command_line import main
from course_ml.comparing import compare_tables, diff, verify
from course_ml.manifests import named_files, report_key
from course_ml.notebooks import read_notebook
from course_ml.provenance import package_folder, read_json, used_modules, write_json
from course_ml.regenerating import regenerate, run_reports, stale
from course_ml.report_jobs import prepare
from course_ml.report_runs import run_report
from course_ml.report_state import read_status

PAGES = {"report.ipynb", "report.html"}


@pytest.fixture(autouse=True)
def no_bars(monkeypatch): monkeypatch.setenv("COURSE_ML_PROGRESS", "0")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A project whose report was made; tests copy it."
    return make_project(tmp_path_factory.mktemp("made"), "## Results", WORK, TABLE, IMAGE)


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    "A copy of a project whose report was made, the current folder of the test."
    return copy_project(made, tmp_path, monkeypatch)


def change_manifest(change):
    path = Path("reports/tiny/manifest.json")
    manifest = read_json(path)
    change(manifest)
    write_json(path, manifest)


def reasons(**parameters): return stale(prepare("tiny", parameters))


def test_nothing_is_stale_after_a_run(project):
    assert reasons() == [] and regenerate("tiny") == "up to date"


@pytest.mark.parametrize("cells, expected", [
    ((WORK + "\nimages + 1", TABLE, IMAGE), ["cell 1 changed"]),
    ((WORK, TABLE, IMAGE, "2 + 2"), ["cell 4 is used now"]),
    ((WORK, IMAGE, TABLE), ["cell 2 changed", "cell 3 changed"]),
    ((WORK, TABLE), ["cell 3 is no longer used"]),
    (("from course_ml import audit\n" + WORK, TABLE, IMAGE), ["cell 1 changed", "module audit is used now"]),
    ((WORK, TABLE, IMAGE, "%time from course_ml import audit"), ["cell 4 is used now", "module audit is used now"])])
def test_changed_code_is_stale(project, cells, expected):
    write_notebook(project / "nbs/tiny.ipynb", "## Results", *cells)
    assert set(expected) <= set(reasons())


COMMENT = "\n# a comment, not a heading\n"


@pytest.mark.parametrize("cells", [
    ("## Other words", WORK, TABLE, IMAGE), ("## Results", COMMENT + WORK, TABLE, IMAGE),
    ("## Results", COMMENT, WORK, TABLE, IMAGE),
    ("## Results", WORK.replace("import os, sys", "import os,  sys"), TABLE, IMAGE)])
def test_prose_comments_and_layout_run_nothing(project, cells):
    finished, before = read_json("reports/tiny/manifest.json")["finished"], contents(project / "reports/tiny")
    write_notebook(project / "nbs/tiny.ipynb", *cells)
    assert reasons() == [] and regenerate("tiny") == "prose renewed" and regenerate("tiny") == "up to date"
    after = contents(project / "reports/tiny")
    assert {name for name in before if before[name] != after.get(name)} <= {*PAGES, "manifest.json"}
    assert before.keys() == after.keys()
    assert read_json("reports/tiny/manifest.json")["finished"] == finished and reasons() == []
    assert not {"report.yml", *PAGES} & set(read_json("reports/tiny/manifest.json")["outputs"])


def test_other_words_reach_the_page(project):
    write_notebook(project / "nbs/tiny.ipynb", "## Much better words", WORK, TABLE, IMAGE)
    regenerate("tiny")
    page = Path("reports/tiny/report.html").read_text()
    assert "Much better words" in page and page.count("<img") == 1


def test_a_page_that_is_missing_is_rendered_again(project):
    "As in a fresh clone: from the outputs that the site's notebook was saved with, or not at all."
    page = Path("reports/tiny/report.html").read_text()
    executed = read_notebook("reports/tiny/report.ipynb")
    for name in PAGES: Path("reports/tiny", name).unlink()
    assert reasons() == [] and regenerate("tiny") == "up to date, without a page"
    saved = read_notebook("nbs/tiny.ipynb")
    outputs = {cell.source: cell.outputs for cell in executed.cells if cell.cell_type == "code"}
    for cell in saved.cells:
        if cell.cell_type == "code": cell.outputs = outputs[cell.source]
    nbformat.write(saved, "nbs/tiny.ipynb")
    assert reasons() == [] and regenerate("tiny") == "prose renewed" and regenerate("tiny") == "up to date"
    assert Path("reports/tiny/report.html").read_text() == page


def test_parameters_and_files(project):
    assert reasons(images=5) == ["parameter images: 40 became 5"]
    Path("images").mkdir()
    Path("images/a.png").write_text("one")
    run_report("tiny", {"data_path": "images"})
    assert reasons(data_path="images") == []
    Path("images/a.png").write_text("two")
    assert reasons(data_path="images") == ["file images changed"]
    Path("images/a.png").write_text("one")
    assert reasons(data_path="images") == []
    Path("images/b.png").write_text("new")
    assert reasons(data_path="images") == ["file images changed"]
    Path("images/a.png").rename("images/b.png")
    assert reasons(data_path="images") == ["file images changed"]


def test_files_in_a_parameter_of_several_values_count(project):
    Path("a.csv").write_text("one")
    for value in ("a.csv", ["a.csv"], {"train": "a.csv"}, {"all": [{"train": "a.csv"}]}):
        assert list(named_files(value, Path())) == ["a.csv"], value


def test_the_key_is_the_same_wherever_one_calls(project, monkeypatch):
    key = report_key(prepare("tiny", {"data_path": "nbs"}))
    monkeypatch.chdir("reports")
    assert report_key(prepare("tiny", {"data_path": "../nbs"}, "..")) == key


def test_outputs_that_were_touched(project):
    Path("reports/tiny/tables/recall.csv").write_text("class,recall\n")
    Path("reports/tiny/figures/line.svg").unlink()
    touched = ["figures/line.svg was changed or removed", "tables/recall.csv was changed or removed"]
    assert sorted(reasons()) == touched


def test_the_published_record_decides(project):
    Path("reports/tiny/published.yml").write_text("models: {}\n")
    assert len(reasons()) == 1 and reasons()[0].startswith("published published.yml: absent became ")


def test_modules_packages_and_weights_decide(project):
    def change(manifest):
        manifest["key"]["code"]["plots"] = "other"
        manifest["key"]["packages"]["numpy"] = "1.0"
        manifest["key"]["inputs"]["packaged"]["MODEL_CARD.md"] = "other"
    change_manifest(change)
    found = reasons()
    assert found[:2] == ["module plots changed", f"package numpy: 1.0 became {np.__version__}"]
    assert len(found) == 3 and found[2].startswith("packaged MODEL_CARD.md: other became ")


def test_earlier_states(project):
    "Reports of an older state, such as those in git may be, are stale, and say why."
    change_manifest(lambda manifest: manifest.pop("key"))
    assert reasons() == ["an older course_ml made it, which did not note what decided it"]
    status = read_json("reports/tiny/status.json")
    write_json("reports/tiny/status.json", {**status, "state": "failed", "reason": "ValueError: x"})
    assert reasons() == ["the last run failed: ValueError: x"]
    write_json("reports/tiny/status.json", {**status, "state": "running"})
    assert "the last run killed" in reasons()[0]


def test_modules_are_followed():
    used = used_modules(sources=["from course_ml.crossval import submit"])
    assert {"crossval", "provenance", "data", "training"} <= set(used) and "audit" not in used
    assert "command_line" not in used_modules(sources=["from course_ml.reporting import Report"])


TRAIN = """from course_ml.config import Recipe
from course_ml.data import Split
from course_ml.datasets import load_dataset
from course_ml.experiment import train_recipe
dataset = load_dataset("cactus", images=40, size=24)
recipe = Recipe(backbone="baseline_cnn", image_size=24, epochs=1)
run = train_recipe(recipe, dataset, Split.holdout(dataset))
report.record("mean probability, validation", run.predictions.probabilities[:, 0].mean(), reason="an example")"""


def test_a_changed_loss_changes_the_numbers(tmp_path, monkeypatch):
    "From end to end, in a copy of the package: another loss makes the report stale, and the run is not the old one."
    shutil.copytree(package_folder(), tmp_path / "course_ml", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("COURSE_ML_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_report(tmp_path, "tiny", WORK, TRAIN)

    def numbers():
        made = course_ml("report", "tiny")
        errors = made.communicate()[1]
        assert made.returncode == 0, errors
        return read_json("reports/tiny/results.json")

    before, module = numbers(), tmp_path / "course_ml/training.py"
    source = module.read_text()
    name = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "weighted_loss")
    lines = source.splitlines(keepends=True)
    lines.insert(name.end_lineno, "\n_old_loss = weighted_loss\n"
                 "def weighted_loss(*values, **options): return 0 * _old_loss(*values, **options)\n\n")
    module.write_text("".join(lines))
    explained = course_ml("report", "tiny", "--explain").communicate()[0]
    assert explained == "tiny: module training changed\n" and numbers() != before
    module.write_text(source.replace("def weighted_loss", "# a comment\ndef weighted_loss"))
    assert numbers() == before


def test_many_reports_and_one_that_fails(project, capsys):
    write_report(project, "bad", "1 / 0")
    write_report(project, "good", "## Results", WORK)
    write_report(project, "alone", "## Results", WORK)
    with open("reports/alone/report.yml", "a") as file: file.write("only_by_name: true\n")
    before = contents(project / "reports/tiny")
    assert main(["report", "--all", "--explain"]) == 0
    message = capsys.readouterr().out
    assert "tiny: up to date" in message and "good: it was never run" in message
    assert "Left out, for they are made only by name: alone" in message
    assert read_status("reports/good")["state"] == "never run"
    assert main(["report", "--all", "--jobs", "3"]) == 1
    message = capsys.readouterr()
    for line in (r"bad +failed", r"good +made", r"tiny +up to date"):
        assert re.search(line, message.out)
    assert "1 of 3 reports did not finish" in message.err and "ZeroDivisionError" in message.err
    assert contents(project / "reports/tiny") == before and read_status("reports/good")["state"] == "finished"
    assert read_status("reports/bad")["state"] == "failed"
    write_notebook(project / "nbs/bad.ipynb", WORK)
    assert main(["report", "--all", "--set", "images=3", "--jobs", "3"]) == 0
    records = [read_json(f"reports/{name}/results.json")["records"] for name in ("bad", "good", "tiny")]
    assert [record["accuracy"]["n"] for record in records] == [3, 3, 3]


@pytest.mark.parametrize("arguments", [
    ["--all", "tiny"], ["tiny", "--set", "images"], ["tiny", "-p", "images", "3", "--set", "images=4"]], ids=" ".join)
def test_refused_choices(project, arguments):
    assert main(["report", *arguments]) == 2


def test_the_same_through_dask(project, capsys):
    write_report(project, "good", "## Results", WORK)
    assert main(["report", "good", "tiny", "--executor", "dask", "--jobs", "2"]) == 0
    assert read_status("reports/good")["state"] == "finished"
    assert re.search(r"tiny +up to date", capsys.readouterr().out)


def test_the_same_through_jobs_of_slurm(project, monkeypatch):
    monkeypatch.setenv("COURSE_ML_HOME", str(project / "home"))
    write_report(project, "good", "## Results", WORK)
    write_report(project, "bad", "## Results", "1 / 0")
    jobs = [prepare("good", {}), prepare("bad", {})]
    message = run_reports(jobs, workers=2, executor="slurm:local")  # submitit runs the jobs here
    assert message["good"] == "" and "ZeroDivisionError" in message["bad"]
    assert [read_status(f"reports/{name}")["state"] for name in ("good", "bad")] == ["finished", "failed"]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_many_stops_all(project, signal_number):
    before = contents(project / "reports/tiny")
    for name in ("slow", "tiny"):
        wait = f"import time; open('pid_{name}', 'w').write(str(os.getpid()))\ntime.sleep(600)"
        write_report(project, name, WORK, wait)
    process = course_ml("report", "slow", "tiny", "--jobs", "2", preexec_fn=hear_ctrl_c)
    pids = [Path(f"pid_{name}") for name in ("slow", "tiny")]
    wait_for(lambda: all(pid.exists() and pid.read_text() for pid in pids))
    process.send_signal(signal_number)
    process.communicate(timeout=120)
    assert process.returncode != 0
    wait_for(lambda: all(gone(int(pid.read_text())) for pid in pids))
    assert [read_status(f"reports/{name}")["state"] for name in ("slow", "tiny")] == ["killed", "killed"]
    assert contents(project / "reports/tiny") == before


@given(values=strategies.lists(strategies.floats(-10, 10), min_size=1, max_size=20),
       tolerance=strategies.floats(.001, .1), data=strategies.data())
def test_differences_of_tables(values, tolerance, data):
    table = pd.DataFrame({"name": [f"r{i}" for i in range(len(values))], "x": values})
    near = table.assign(x=[value + data.draw(strategies.floats(-.9, .9)) * tolerance for value in values])
    assert compare_tables(table, table).empty and compare_tables(table, near, tolerance).empty
    row = data.draw(strategies.integers(0, len(values) - 1))
    far = near.copy()
    far.loc[row, "x"] = values[row] + 2 * tolerance
    found = compare_tables(table, far, tolerance)
    assert found.row.tolist() == [row + 1] and found.column.tolist() == ["x"]


def test_verify(project, capsys):
    path = Path("reports/tiny/tables/recall.csv")
    path.write_text(path.read_text().replace("0.3333333333333333", "0.3433333333333333"))
    change_manifest(lambda manifest: manifest["outputs"].update({"tables/recall.csv": "touched"}))
    before = contents(project / "reports/tiny")
    assert main(["verify", "tiny"]) == 1
    message = capsys.readouterr().out
    assert "1 cells, e.g. row 1, recall: 0.3433333333333333 became 0.3333333333333333" in message
    assert re.search(r"results.json +same bytes", message) and re.search(r"figures/line.svg +same bytes", message)
    with open("reports/tiny/report.yml", "a") as file: file.write("tolerance: 0.02\n")
    assert verify("tiny").set_index("file").verdict["tables/recall.csv"] == "same numbers"
    settings = Path("reports/tiny/report.yml")
    settings.write_text(settings.read_text().replace("tolerance: 0.02\n", ""))
    assert contents(project / "reports/tiny") == before, "verify changed the report"
    write_report(project, "never", WORK)
    assert main(["verify", "never"]) == 2 and "there is nothing to verify" in capsys.readouterr().err


def test_verified(project, capsys):
    assert main(["verify", "tiny"]) == 0 and "Verified: 3 files" in capsys.readouterr().out


def test_diff(project, capsys):
    assert main(["diff", "reports/tiny", "reports/tiny"]) == 0
    page = Path("diff.html").read_text()
    assert "Nothing that is noted differs" in page and "All numbers are the same" in page and "<img" not in page
    shutil.copytree("reports/tiny", "before")
    run_report("tiny", {"images": 7})
    page = diff("before", "reports/tiny")
    assert "parameter images: 40 became 7" in page and "<h3>results</h3>" in page
    assert page.count("data:image/svg+xml") == 2 and str(project) not in page
    assert main(["diff", "before", "nowhere"]) == 2 and "has no manifest.json" in capsys.readouterr().err


def draw_balls(folder):
    "Twenty noisy images of each of two colors, and one file that is no image."
    random = np.random.default_rng(0)
    for label, color in {"red": (200, 40, 40), "blue": (40, 40, 200)}.items():
        (folder / label).mkdir(parents=True)
        for i in range(20):
            pixels = np.clip(random.normal(color, 40, (24, 24, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    (folder / "red/broken.png").write_bytes(b"\x89PNG\r\n")


def test_a_study_of_own_images(tmp_path, monkeypatch, capsys):
    "The template that comes with the package runs on a tiny folder."
    monkeypatch.chdir(tmp_path)
    draw_balls(Path("my images"))
    assert main(["check", "my images"]) == 0
    message = capsys.readouterr().out
    for expected in ("2 classes by folder: blue, red", "Not used: 1", "red/broken.png", "Split: 70% train", "PNG, 8 bits"):
        assert expected in message, message
    assert main(["new", "balls", "--data", "my images"]) == 0 and main(["new", "balls", "--data", "my images"]) == 2
    assert "1 of 41 images that were tried cannot be read" in capsys.readouterr().out
    given = ["-p", "epochs", "2", "-p", "image_size", "24"]
    assert main(["report", "balls", *given]) == 0
    results = read_json("reports/balls/results.json")["records"]
    assert results["transfer, top-1 accuracy, test"]["n"] == 6
    assert {"reports/balls/balls.ipynb", "reports/balls/report.html"} <= {str(p) for p in Path().rglob("*.*")}
    monkeypatch.chdir("my images")
    capsys.readouterr()
    assert main(["report", "balls", *given, "--explain"]) == 0 and capsys.readouterr().out == "balls: up to date\n"
    assert main(["check", "none"]) == 2


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    message = capsys.readouterr().out
    for what in ("python", "torch", "cores", "free memory", "network", "weights", "advised batch size"):
        assert re.search(rf"^{what}  ", message, re.MULTILINE), what
