"Only what is stale is made again; one that fails leaves the others alone; and what differs is found."
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies
from PIL import Image
from test_reporting import IMAGE, TABLE, WORK, contents, course_ml, gone, wait_for, write_notebook, write_report

from course_ml.command_line import main
from course_ml.provenance import read_json, write_json
from course_ml.regenerating import regenerate, run_reports, stale
from course_ml.comparing import compare_tables, diff, verify
from course_ml.report_runs import code_hash, prepare, read_status, run_report, used_modules


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A folder with one report that was made, the current folder of the test."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_ML_PROGRESS", "0")
    write_report(tmp_path, "tiny", "## Results", WORK, TABLE, IMAGE)
    run_report("tiny")
    return tmp_path


def change_manifest(change):
    path = Path("reports/tiny/manifest.json")
    manifest = read_json(path)
    change(manifest)
    write_json(path, manifest)


def reasons(**parameters): return stale(prepare("tiny", parameters))


def test_nothing_is_stale_after_a_run(project):
    assert reasons() == [] and regenerate("tiny") == "up to date"


@pytest.mark.parametrize("cells, expected", [
    (("## Results", WORK + "\nimages + 1", TABLE, IMAGE), "code: cell 1 changed"), (("## Results", WORK, TABLE, IMAGE, "2 + 2"), "code: cell 4 changed"),
    (("## Results", WORK, IMAGE, TABLE), "code: cells were removed, or their order changed"), (("## Results", WORK, TABLE), "code: cells were removed, or their order changed"),
    (("## Results", "from course_ml import audit\n" + WORK, TABLE, IMAGE), "module audit is used now")])
def test_changed_code_is_stale(project, cells, expected):
    write_notebook(project / "nbs/tiny.ipynb", *cells)
    assert expected in reasons()


@pytest.mark.parametrize("cells", [("## Other words", WORK, TABLE, IMAGE), ("## Results", "# a comment, not a heading\n".replace("# a", "\n# a") + WORK, TABLE, IMAGE), ("## Results", WORK.replace("import os, sys", "import os,  sys"), TABLE, IMAGE)])
def test_prose_comments_and_layout_run_nothing(project, cells):
    finished, before = read_json("reports/tiny/manifest.json")["finished"], contents(project / "reports/tiny")
    write_notebook(project / "nbs/tiny.ipynb", *cells)
    assert reasons() == [] and regenerate("tiny") == "prose renewed" and regenerate("tiny") == "up to date"
    after = contents(project / "reports/tiny")
    assert {name for name in before if before[name] != after.get(name)} <= {"report.ipynb", "report.html", "manifest.json"} and before.keys() == after.keys()
    assert read_json("reports/tiny/manifest.json")["finished"] == finished and reasons() == []
    assert "report.yml" not in read_json("reports/tiny/manifest.json")["outputs"]


def test_other_words_reach_the_page(project):
    write_notebook(project / "nbs/tiny.ipynb", "## Much better words", WORK, TABLE, IMAGE)
    regenerate("tiny")
    page = Path("reports/tiny/report.html").read_text()
    assert "Much better words" in page and page.count("<img") == 1


def test_parameters_files_and_outputs(project):
    assert reasons(images=5) == ["parameter images: 40 became 5"]
    Path("images").mkdir()
    Path("images/a.png").write_text("one")
    run_report("tiny", {"data_path": "images"})
    assert reasons(data_path="images") == []
    Path("images/a.png").write_text("two")
    assert reasons(data_path="images") == ["file images changed"]
    Path("images/b.png").write_text("new")
    run_report("tiny", {"data_path": "images"})
    Path("images/b.png").unlink()
    assert reasons(data_path="images") == ["file images changed"]
    run_report("tiny")
    Path("reports/tiny/tables/recall.csv").write_text("class,recall\n")
    Path("reports/tiny/figures/line.png").unlink()
    assert set(reasons()) == {"tables/recall.csv was changed or removed", "figures/line.png was changed or removed"}


def test_modules_and_earlier_ends(project):
    change_manifest(lambda manifest: manifest["decided_by"]["modules"].update(plots="other"))
    assert reasons() == ["module plots changed"]
    change_manifest(lambda manifest: manifest.pop("decided_by"))
    assert "did not note" in reasons()[0]
    status = read_json("reports/tiny/status.json")
    write_json("reports/tiny/status.json", {**status, "state": "failed", "reason": "ValueError: x"})
    assert reasons() == ["the last run failed: ValueError: x"]
    write_json("reports/tiny/status.json", {**status, "state": "running"})
    assert "the last run killed" in reasons()[0]


def test_modules_are_followed():
    used = used_modules(["from course_ml.crossval import submit"])
    assert {"crossval", "core", "data", "metrics", "training"} <= set(used) and "audit" not in used
    assert "command_line" not in used_modules(["from course_ml.reporting import Report"])


@given(comment=strategies.text(strategies.characters(codec="ascii", exclude_characters="\n\r\x00\x0c"), max_size=30), spaces=strategies.integers(0, 4))
def test_comments_and_blank_lines_do_not_change_code(comment, spaces):
    source = "def double(x):\n    'Twice.'\n    return 2 * x\n"
    assert code_hash(source) == code_hash(source.replace("\n    return", "\n" * spaces + f"\n    # {comment}\n    return"))
    assert code_hash(source) != code_hash(source.replace("2", "3"))


def test_many_reports_and_one_that_fails(project, capsys):
    write_report(project, "bad", "1 / 0")
    write_report(project, "good", "## Results", WORK)
    write_report(project, "alone", "## Results", WORK)
    with open("reports/alone/report.yml", "a") as file: file.write("only_by_name: true\n")
    before = contents(project / "reports/tiny")
    assert main(["report", "--all", "--explain"]) == 0
    message = capsys.readouterr().out
    assert "tiny: up to date" in message and "good: it was never run" in message and "Left out, for they are made only by name: alone" in message and read_status("reports/good")["state"] == "never run"
    assert main(["report", "--all", "--jobs", "3"]) == 1
    message = capsys.readouterr()
    assert re.search(r"bad +failed", message.out) and re.search(r"good +made", message.out) and re.search(r"tiny +up to date", message.out)
    assert "1 of 3 reports did not finish" in message.err and "ZeroDivisionError" in message.err
    assert contents(project / "reports/tiny") == before and read_status("reports/good")["state"] == "finished" and read_status("reports/bad")["state"] == "failed"
    write_notebook(project / "nbs/bad.ipynb", WORK)
    assert main(["report", "--all", "--set", "images=3"]) == 0
    assert [read_json(f"reports/{name}/results.json")["records"]["accuracy"]["n"] for name in ("bad", "good", "tiny")] == [3, 3, 3]
    assert main(["report", "--all", "tiny"]) == 2 and main(["report", "tiny", "--set", "images"]) == 2 and main(["report", "tiny", "-p", "images", "3", "--set", "images=4"]) == 2


def test_the_same_through_dask(project, capsys):
    write_report(project, "good", "## Results", WORK)
    assert main(["report", "good", "tiny", "--executor", "dask", "--jobs", "2"]) == 0
    assert read_status("reports/good")["state"] == "finished" and re.search(r"tiny +up to date", capsys.readouterr().out)


def test_the_same_through_jobs_of_slurm(project, monkeypatch):
    monkeypatch.setenv("COURSE_ML_HOME", str(project / "home"))
    write_report(project, "good", "## Results", WORK)
    write_report(project, "bad", "## Results", "1 / 0")
    message = run_reports([prepare("good", {}), prepare("bad", {})], workers=2, executor="slurm:local")  # submitit runs the jobs here
    assert message["good"] == "" and "ZeroDivisionError" in message["bad"]
    assert [read_status(f"reports/{name}")["state"] for name in ("good", "bad")] == ["finished", "failed"]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_many_stops_all(project, signal_number):
    before = contents(project / "reports/tiny")
    for name in ("slow", "tiny"): write_report(project, name, WORK, f"import time; open('pid_{name}', 'w').write(str(os.getpid()))\ntime.sleep(60)")
    process = course_ml("report", "slow", "tiny", "--jobs", "2", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    pids = [Path(f"pid_{name}") for name in ("slow", "tiny")]
    wait_for(lambda: all(pid.exists() and pid.read_text() for pid in pids))
    process.send_signal(signal_number)
    process.communicate(timeout=40)
    assert process.returncode != 0
    wait_for(lambda: all(gone(int(pid.read_text())) for pid in pids))
    assert [read_status(f"reports/{name}")["state"] for name in ("slow", "tiny")] == ["killed", "killed"] and contents(project / "reports/tiny") == before


@given(values=strategies.lists(strategies.floats(-10, 10), min_size=1, max_size=20), tolerance=strategies.floats(.001, .1), data=strategies.data())
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
    assert main(["verify", "tiny"]) == 0 and "Verified: " in capsys.readouterr().out
    path = Path("reports/tiny/tables/recall.csv")
    path.write_text(path.read_text().replace("0.3333333333333333", "0.3433333333333333"))
    change_manifest(lambda manifest: manifest["outputs"].update({"tables/recall.csv": "touched"}))
    before = contents(project / "reports/tiny")
    assert main(["verify", "tiny"]) == 1
    assert "1 cells, e.g. row 1, recall: 0.3433333333333333 became 0.3333333333333333" in capsys.readouterr().out
    with open("reports/tiny/report.yml", "a") as file: file.write("tolerance: 0.02\n")
    assert verify("tiny").set_index("file").verdict["tables/recall.csv"] == "same numbers"
    Path("reports/tiny/report.yml").write_text(Path("reports/tiny/report.yml").read_text().replace("tolerance: 0.02\n", ""))
    assert contents(project / "reports/tiny") == before, "verify changed the report"
    write_report(project, "never", WORK)
    assert main(["verify", "never"]) == 2 and "there is nothing to verify" in capsys.readouterr().err


def test_diff(project, capsys):
    assert main(["diff", "reports/tiny", "reports/tiny"]) == 0
    page = Path("diff.html").read_text()
    assert "Nothing that is noted differs" in page and "All numbers are the same" in page and "<img" not in page
    subprocess.run(["cp", "-r", "reports/tiny", "before"], check=True)
    run_report("tiny", {"images": 7})
    page = diff("before", "reports/tiny")
    assert "parameter images: 40 became 7" in page and "<h3>results</h3>" in page and page.count("data:image/png") == 2 and str(project) not in page
    assert main(["diff", "before", "nowhere"]) == 2 and "has no manifest.json" in capsys.readouterr().err


def test_a_study_of_own_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_ML_PROGRESS", "0")
    random = np.random.default_rng(0)
    for label, color in {"red": (200, 40, 40), "blue": (40, 40, 200)}.items():
        Path("my images", label).mkdir(parents=True)
        for i in range(20): Image.fromarray(np.clip(random.normal(color, 40, (24, 24, 3)), 0, 255).astype("uint8")).save(Path("my images", label, f"{i}.png"))
    Path("my images/red/broken.png").write_bytes(b"\x89PNG\r\n")
    assert main(["check", "my images"]) == 0
    message = capsys.readouterr().out
    assert "Cannot be read" in message and "broken.png" in message and "red" in message
    assert main(["new", "balls", "--data", "my images"]) == 0 and main(["new", "balls", "--data", "my images"]) == 2
    assert main(["report", "balls", "-p", "epochs", "2", "-p", "image_size", "24"]) == 0
    results = read_json("reports/balls/results.json")["records"]
    assert results["transfer, top-1 accuracy, test"]["n"] == 6 and Path("reports/balls/balls.ipynb").exists()
    os.chdir("my images")
    assert main(["report", "balls", "-p", "epochs", "2", "-p", "image_size", "24", "--explain"]) == 0
    assert main(["check", "none"]) == 2


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    message = capsys.readouterr().out
    for what in ("python", "torch", "cores", "free memory", "network", "weights", "advised batch size"): assert re.search(rf"^{what}  ", message, re.MULTILINE), what
