"Strict runs of report notebooks: every error is named, and none costs an earlier result."
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import psutil
import pytest

from course_ml import report_runs
from course_ml.command_line import main
from course_ml.manifests import make_command
from course_ml.notebooks import ParameterError, ReportError, RunError, read_notebook, read_parameters
from course_ml.provenance import Key, file_digest, read_json
from course_ml.report_jobs import prepare
from course_ml.report_runs import run_report
from course_ml.report_state import only_run, read_status, report_names
from course_ml.reporting import Report

PARAMETERS = '''report_dir = ""  # filled in by course-ml
images = 40  # how many images
scale = 1.0  # multiplies the score
shuffle = False  # in random order?
data_path = ""  # a folder of your own
layers = ("dense 8",)  # of the head
limit = None  # any number'''

WORK = '''import os, sys, warnings
from course_ml.reporting import Report
report = Report(report_dir)
report.record("accuracy", .5 * scale, .4, 2., n=images, seeds=[3])
report.made_from(weights="none")'''

TABLE = '''import pandas as pd
table = pd.DataFrame({"class": ["a_b & 50%", "c|d"], "recall": [1/3, None]})
report.table(table, "recall", "Recall of each class.")'''

IMAGE = '''import matplotlib.pyplot as plt
figure, axes = plt.subplots(figsize=(2, 1))
axes.plot([1, 2, images])
report.figure(figure, "line", "A line.")'''

LONG = '''report.table(pd.DataFrame({"text": ["word " * 40 + f"end {i}." for i in range(90)]}), "long", "Long.")'''

TRACES = '''print("in", os.getcwd(), "with", sys.prefix, os.path.expanduser("~"), report_dir)
warnings.warn("seen here")
secret_code = images'''

GIVEN = {"images": 9, "layers": ["dense 4"]}
KERNEL = {"name": "python3", "language": "python", "display_name": "python3"}


def write_notebook(path, *cells, parameters=PARAMETERS, tags=("parameters",), kernel=KERNEL):
    "Write a notebook, which may be one that nbformat would refuse to write."
    v4 = nbformat.v4
    notebook = v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [v4.new_markdown_cell("# A lesson\n\n> with a subtitle"),
                      v4.new_code_cell(parameters, metadata={"tags": list(tags)})]
    notebook.cells += [v4.new_markdown_cell(c) if c.startswith("#") else v4.new_code_cell(c) for c in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook))


def write_report(root, name="tiny", *cells, **options):
    write_notebook(root / f"nbs/{name}.ipynb", *cells, **options)
    folder = root / "reports" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.yml").write_text(f"title: A <tiny> report\nnotebook: nbs/{name}.ipynb\n")
    return folder


def make_project(root, *cells, **parameters):
    "Make the report of a new project, once for all tests that copy it or only look at it."
    write_report(root, "tiny", *cells)
    with contextlib.chdir(root): run_report("tiny", parameters)
    return root


def copy_project(root, target, monkeypatch):
    "Copy a project and go there."
    shutil.copytree(root, target, dirs_exist_ok=True)
    monkeypatch.chdir(target)
    return target


@pytest.fixture(autouse=True)
def no_bars(monkeypatch): monkeypatch.setenv("COURSE_ML_PROGRESS", "0")


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A folder with one report that was never made, the current folder of the test."
    monkeypatch.chdir(tmp_path)
    write_report(tmp_path, "tiny", "## Results", WORK, TRACES)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A project whose report was made, with tables and a figure; tests only look at it."
    return make_project(tmp_path_factory.mktemp("made"), "## Results", WORK, TABLE, IMAGE, TRACES, LONG, **GIVEN)


@pytest.fixture
def look(made, monkeypatch):
    "The same as the current folder."
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def made_project(made, tmp_path, monkeypatch):
    "A copy of it as the current folder, which a test may change."
    return copy_project(made, tmp_path, monkeypatch)


def contents(folder):
    "Every file of a report but what tells of its last run."
    return {p.relative_to(folder).as_posix(): file_digest(p) for p in folder.rglob("*")
            if p.is_file() and p.name not in ("status.json", "failed.ipynb")}


def reports_in(folder):
    "What is in reports/, but the files of locks."
    return sorted(p.name for p in (folder / "reports").iterdir() if p.suffix not in (".lock", ".holder"))


def course_ml(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "course_ml.command_line", *arguments],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(.05)


def break_it(root, *cells):
    "Give the notebook of a report that was made other cells; return what the run had made."
    before = contents(root / "reports/tiny")
    write_notebook(root / "nbs/tiny.ipynb", "## Results", WORK, "## Trouble", *cells)
    return before


def test_finished_report(look):
    folder = Path("reports/tiny")
    status = read_json(folder / "status.json")
    assert status["state"] == "finished" and status["pid"] == os.getpid() and status["ended"] >= status["started"]
    accuracy = {"value": .5, "low": .4, "high": 2., "n": 9, "seeds": [3], "unit": ""}
    assert read_json(folder / "results.json") == {"records": {"accuracy": accuracy}}
    manifest = read_json(folder / "manifest.json")
    assert manifest["parameters"] == {"images": 9, "scale": 1., "shuffle": False, "data_path": "",
                                      "layers": ["dense 4"], "limit": None}
    assert manifest["command"] == "course-ml report tiny -p images 9 -p layers '[\"dense 4\"]'"
    assert manifest["seeds"] == [3] and manifest["weights"] == {"name": "none", "sha256": None}
    assert sys.platform != "linux" or manifest["peak_memory_mib"] > 10
    assert set(manifest["outputs"]) == {"results.json", "figures/line.svg", "tables/recall.csv", "tables/long.csv"}
    assert all(file_digest(folder / name) == digest for name, digest in manifest["outputs"].items())
    assert reports_in(look) == ["tiny"]
    written = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    pages = {"report.ipynb", "report.html"}
    assert written == {*manifest["outputs"], *pages, "report.yml", "manifest.json", "status.json"}


def test_the_manifest_holds_the_key_of_the_run(look):
    key = Key.from_dict(read_json("reports/tiny/manifest.json")["key"])
    assert key.name == read_json("reports/tiny/manifest.json")["key"]["name"]
    assert {"reporting", "provenance", "cell 1"} <= set(key.code) and "training" not in key.code
    assert {"python", "numpy", "torch"} <= set(key.packages)
    assert key.inputs["parameter"]["images"] == 9 and "published" not in key.inputs
    assert "MODEL_CARD.md" in key.inputs["packaged"] and "report_dir" not in key.inputs["parameter"]


def test_no_machine_in_the_report(look):
    folder = Path("reports/tiny")
    places = [str(look), os.path.realpath(look), sys.prefix, str(Path.home()), os.uname().nodename + '"', ".tiny.new"]
    for name in ["report.ipynb", "report.html", "manifest.json", "results.json", "status.json"]:
        content = (folder / name).read_text()
        assert not [place for place in places
                    if len(place) > 2 and re.search(rf"(?<!\w){re.escape(place)}(?!\w)", content)], name
        assert "ipykernel_" not in content
    assert 'report_dir = \'reports/tiny\'' in read_notebook(folder / "report.ipynb").cells[2].source


def test_page_stands_alone(look):
    page = Path("reports/tiny/report.html").read_text()
    assert "<title>A &lt;tiny&gt; report</title>" in page and page.count("<h1>") == 1
    assert "secret_code" not in page and "import pandas" not in page and "seen here" not in page
    assert "<script" not in page and "<link" not in page and not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "data:image/png;base64," in page and 'alt="Figure 1. A line."' in page and page.count("<img") == 1
    assert "default-src 'none'" in page and len(page) < 100_000


def test_long_tables_are_complete(look):
    page = Path("reports/tiny/report.html").read_text()
    assert all(f"end {i}." in page for i in range(90)) and "..." not in page


def test_other_forms_of_a_report(look, tmp_path, capsys):
    before = contents(look / "reports/tiny")
    assert main(["export", "tiny", f"{tmp_path}/tiny.html"]) == 0
    assert main(["export", "reports/tiny", f"{tmp_path}/tiny.pdf"]) == 0
    page, printed = (tmp_path / "tiny.html").read_text(), (tmp_path / "tiny.pdf").read_bytes()
    assert page.count("<details><summary>Code</summary>") >= 3 and "import pandas" in page and "0.333" in page
    assert "<script" not in page and printed.startswith(b"%PDF-") and b"/Image" in printed
    assert contents(look / "reports/tiny") == before
    assert main(["export", "tiny", "tiny.docx"]) == 2 and main(["export", "none", "none.pdf"]) == 2
    message = capsys.readouterr().err
    assert "can be exported as .pdf" in message and "there is no report 'none'" in message


def test_tables_for_a_document(look, tmp_path):
    assert main(["export", "tiny", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["long.md", "long.tex", "recall.md", "recall.tex"]
    csv = Path("reports/tiny/tables/recall.csv").read_text()
    assert csv == "class,recall\na_b & 50%,0.3333333333333333\nc|d,\n"
    markdown = (tmp_path / "recall.md").read_text()
    assert markdown == "| class | recall |\n| --- | ---: |\n| a\\_b &amp; 50% | 0.333 |\n| c\\|d | – |\n"
    latex = (tmp_path / "recall.tex").read_text()
    assert r"a\_b \& 50\% & 0.333" in latex and r"\toprule" in latex and r"\caption{Recall of each class.}" in latex


def test_a_pdf_needs_its_tools(look, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typst", None)
    assert main(["export", "tiny", f"{tmp_path}/tiny.pdf"]) == 2
    assert "pip install 'course_ml[pdf]'" in capsys.readouterr().err and not (tmp_path / "tiny.pdf").exists()


def test_a_page_needs_a_notebook_with_outputs(made_project, capsys):
    Path("reports/tiny/report.ipynb").unlink()
    assert main(["export", "tiny", "tiny.html"]) == 2
    assert "make the report again with course-ml report tiny --force" in capsys.readouterr().err


def test_many_images_make_a_png(tmp_path):
    import matplotlib.pyplot as plt
    import numpy as np
    figure, axes = plt.subplots()
    axes.imshow(np.random.default_rng(0).random((400, 400, 3)))
    Report(tmp_path).figure(figure, "grid")
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["grid.png"]


def test_a_trial_leaves_the_full_report_alone(project, capsys):
    folder = write_report(project, "tiny", "## Results", WORK)
    with open(folder / "report.yml", "a") as file: file.write("trial: {images: 3}\n")
    full = contents(run_report("tiny"))
    assert run_report("tiny", {"images": 3}) == Path("reports/tiny/trial")
    assert {name: digest for name, digest in contents(folder).items() if not name.startswith("trial/")} == full
    assert read_json("reports/tiny/trial/results.json") != read_json("reports/tiny/results.json")
    trial = contents(folder / "trial")
    run_report("tiny", {"images": 41})
    assert contents(folder / "trial") == trial
    assert "report_dir = 'reports/tiny/trial'" in (folder / "trial/report.ipynb").read_text()
    assert main(["reports"]) == 0
    listed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert listed == [["tiny", "finished"], ["tiny/trial", "finished"]]
    for images in ("3", "41"):
        assert main(["report", "tiny", "-p", "images", images]) == 0 and "Up to date" in capsys.readouterr().out
    assert main(["verify", "tiny", "--trial"]) == 0
    with only_run(folder / "trial"), ThreadPoolExecutor(1) as pool:
        with pytest.raises(RunError, match="report 'tiny' is being run"):
            pool.submit(run_report, "tiny", {"images": 42}).result()
    with open(folder / "report.yml", "a") as file: file.write("trial: {imagse: 3}\n")
    assert main(["report", "tiny"]) == 2 and "did you mean 'images'" in capsys.readouterr().err


def test_results_are_the_same_every_time(made_project):
    first = contents(made_project / "reports/tiny")
    second = contents(run_report("tiny", GIVEN))
    changed = {name for name in first if first[name] != second[name]}
    assert first.keys() == second.keys() and changed <= {"report.html", "report.ipynb", "manifest.json"}


def test_report_without_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = Report("")
    for _ in range(2): report.record("a", 1, reason="a count")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("values", [
    {"value": float("nan"), "low": 0, "high": 1}, {"value": .5}, {"value": .5, "low": .6, "high": .7}, {"value": None}])
def test_refused_records(tmp_path, values):
    with pytest.raises(ValueError): Report(tmp_path).record("a", **values)
    assert not (tmp_path / "results.json").exists()


def test_missing_value_needs_a_reason(tmp_path):
    report = Report(tmp_path)
    report.record("auc, empty class", float("nan"), reason="no image of this class")
    assert json.loads((tmp_path / "results.json").read_text())["records"]["auc, empty class"]["value"] is None
    with pytest.raises(ValueError, match="already"): report.record("auc, empty class", 1, 1, 1)


@pytest.mark.parametrize("parameters, message", [
    ({"imagse": 5}, "unknown parameter 'imagse'; did you mean 'images'?"),
    ({"images": "5"}, "'images' must be of type int"), ({"images": True}, "must be of type int"),
    ({"shuffle": 1}, "must be of type bool"), ({"scale": "1"}, "must be of type float"),
    ({"scale": float("nan")}, "must be of type float"), ({"layers": "dense"}, "must be of type tuple"),
    ({"report_dir": "x"}, "unknown parameter")])
def test_parameters_that_do_not_fit(project, parameters, message):
    with pytest.raises(ParameterError, match=re.escape(message)) as error:
        run_report("tiny", parameters)
    for line in ["images int 40 how many images", "scale float 1.0 multiplies the score"]:
        assert line in " ".join(str(error.value).split())
    assert contents(project / "reports/tiny").keys() == {"report.yml"}
    assert read_status("reports/tiny") == {"state": "never run"}


@pytest.mark.parametrize("value, expected", [("true", True), ("False", False), ("yes", None), ("1", None)])
def test_truth_values_from_the_command_line(project, value, expected):
    if expected is None:
        pytest.raises(ParameterError, prepare, "tiny", {"shuffle": value}, from_text=True)
    else: assert prepare("tiny", {"shuffle": value}, from_text=True).values["shuffle"] is expected


def test_command_gives_the_same_values_again(project):
    given = {"images": 3, "scale": 1e-07, "shuffle": True, "data_path": "it's $HOME/a b", "layers": ("dense 4", "3"),
             "limit": "7"}
    job = prepare("tiny", given)
    words = shlex.split(make_command(job))[3:]
    again = prepare("tiny", dict(zip(words[1::3], words[2::3])), from_text=True)
    assert again.values == job.values == {**given, "scale": 1e-7}


def test_absolute_path_is_given_from_here(project):
    assert prepare("tiny", {"data_path": str(project / "nbs")}).values["data_path"] == "nbs"


@pytest.mark.parametrize("change, message", [
    (dict(tags=()), '0 cells are tagged "parameters"'),
    (dict(kernel={"name": "python3", "display_name": "p"}), "kernelspec.language"),
    (dict(kernel={"language": "python", "name": "", "display_name": "p"}), "kernelspec.name"),
    (dict(parameters="images = 4"), 'report_dir = ""'),
    (dict(parameters='report_dir = ""\nimages = len("a")'), "not: images = len"),
    (dict(parameters='report_dir = ""\nimport os'), "not: import os")])
def test_a_notebook_that_is_no_report(project, change, message):
    write_notebook(project / "nbs/tiny.ipynb", WORK, **change)
    with pytest.raises(ReportError, match=re.escape(message)): run_report("tiny")


def test_settings_that_are_incomplete(project):
    settings = Path("reports/tiny/report.yml")
    with pytest.raises(ReportError, match="there are: tiny"): run_report("tyni")
    settings.write_text("title: x\n")
    with pytest.raises(ReportError, match="has no notebook"): run_report("tiny")
    settings.write_text("title: x\nnotebook: nbs/none.ipynb\nsize: 3\n")
    with pytest.raises(ReportError, match="unknown size"): run_report("tiny")
    settings.write_text("title: x\nnotebook: nbs/none.ipynb\n")
    with pytest.raises(ReportError, match="no notebook nbs/none.ipynb"): run_report("tiny")
    shutil.copy("reports/tiny/report.yml", "nbs/none.ipynb")
    with pytest.raises(ReportError, match="is not a notebook"): run_report("tiny")


def test_parameters_of_several_lines(project):
    lines = '# of the run\nreport_dir: str = ""\nlayers = [\n    "dense 8",\n]  # of the head\nrate = -1.5'
    write_notebook(project / "nbs/tiny.ipynb", parameters=lines)
    declared = read_parameters(read_notebook("nbs/tiny.ipynb"))
    assert [(p.name, p.default, p.meaning) for p in declared] == [
        ("report_dir", "", ""), ("layers", ["dense 8"], "of the head"), ("rate", -1.5, "")]


def test_failing_cell_keeps_the_earlier_report(made_project):
    before = break_it(made_project, "1 / 0")
    message = r"failed in cell \[4\] Trouble: ZeroDivisionError: division by zero"
    with pytest.raises(RunError, match=message): run_report("tiny")
    folder = made_project / "reports/tiny"
    status = read_json(folder / "status.json")
    assert (status["state"], status["cell"], status["heading"]) == ("failed", 4, "Trouble")
    assert status["reason"] == "ZeroDivisionError: division by zero"
    assert contents(folder) == before and str(made_project) not in (folder / "failed.ipynb").read_text()
    assert read_notebook(folder / "failed.ipynb").cells[-1].outputs[0].ename == "ZeroDivisionError"
    write_notebook(made_project / "nbs/tiny.ipynb", "## Results", WORK)
    run_report("tiny")
    assert read_status(folder)["state"] == "finished" and not (folder / "failed.ipynb").exists()
    assert not (folder / "tables").exists(), "a table of an earlier run stayed"


def test_code_that_changes_during_a_run_fails_it(made_project, monkeypatch):
    before, key = break_it(made_project, "2 + 2"), report_runs.report_key(prepare("tiny", {}))
    changed = Key({**key.code, "reporting": "0"}, key.packages, key.inputs)
    keys = iter([key, changed])
    monkeypatch.setattr(report_runs, "report_key", lambda job: next(keys))
    with pytest.raises(RunError, match="during the run module reporting changed: make the report again"):
        run_report("tiny")
    assert read_status("reports/tiny")["state"] == "failed" and contents(made_project / "reports/tiny") == before


def test_own_files_stay(made_project):
    Path("reports/tiny/published").mkdir()
    Path("reports/tiny/published/table.csv").write_text("a")
    run_report("tiny")
    assert Path("reports/tiny/published/table.csv").read_text() == "a"
    assert "published/table.csv" not in read_json("reports/tiny/manifest.json")["outputs"]


@pytest.mark.parametrize("death", ["os.kill(os.getpid(), 9)", "os._exit(0)"])
def test_killed_kernel(made_project, death):
    before = break_it(made_project, death)
    with pytest.raises(RunError, match="the kernel is gone"): run_report("tiny")
    status = read_status("reports/tiny")
    assert (status["state"], status["cell"]) == ("killed", 4) and contents(made_project / "reports/tiny") == before


def test_time_limit_is_for_the_whole_notebook(made_project):
    cells = ["import time; open('pid', 'w').write(str(os.getpid()))", *["time.sleep(1.5)"] * 200]
    before = break_it(made_project, *cells)
    with pytest.raises(RunError, match="not finished after 6 seconds"):
        run_report("tiny", timeout=6)
    status = read_status("reports/tiny")
    assert status["state"] == "timed out" and status["cell"] < 14 and contents(made_project / "reports/tiny") == before
    if Path("pid").exists():
        with pytest.raises(ProcessLookupError): os.kill(int(Path("pid").read_text()), 0)


def test_time_limit_of_a_cell(made_project):
    before = break_it(made_project, *["import time; time.sleep(.4)"] * 3, "time.sleep(600)")
    with pytest.raises(RunError, match="a cell was not finished"):
        run_report("tiny", cell_timeout=3)
    status = read_status("reports/tiny")
    assert (status["state"], status["cell"]) == ("timed out", 7) and contents(made_project / "reports/tiny") == before


def test_a_notebook_that_exits_has_failed(made_project):
    before = break_it(made_project, "sys.exit(0)", "print('never here')")
    with pytest.raises(RunError, match="failed"): run_report("tiny")
    assert read_status("reports/tiny")["cell"] == 4 and contents(made_project / "reports/tiny") == before


def test_no_room_for_a_file(made_project):
    before = contents(made_project / "reports/tiny")
    code = ("import resource, sys; from course_ml.command_line import main; "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); sys.exit(main(['report', 'tiny', '--force']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert contents(made_project / "reports/tiny") == before and read_status("reports/tiny")["state"] == "failed"


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 400 KB; needs the right to mount one."
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_full_disk(small_disk, monkeypatch):
    monkeypatch.chdir(small_disk)
    folder = write_report(small_disk, "tiny", "## Results", WORK)
    before = contents(run_report("tiny"))
    disk = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(b"x" * (disk.f_bavail * disk.f_frsize))
    with pytest.raises((RunError, OSError), match="No space left"): run_report("tiny")
    (small_disk / "filler").unlink()
    assert contents(folder) == before and read_status(folder)["state"] in ("failed", "finished")
    run_report("tiny")
    assert read_status(folder)["state"] == "finished"


def test_a_disk_that_must_not_be_written(small_disk, monkeypatch):
    monkeypatch.chdir(small_disk)
    before = contents(write_report(small_disk, "tiny", "## Results", WORK)) | contents(run_report("tiny"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(RunError, match="no permission to write"): run_report("tiny")
    assert contents(small_disk / "reports/tiny") == before and read_status("reports/tiny")["state"] == "finished"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root; the test before this one stands for it")
def test_no_permission(made_project):
    before = contents(made_project / "reports/tiny")
    Path("reports/tiny").chmod(0o555)
    try:
        with pytest.raises(RunError, match="no permission to write"): run_report("tiny")
    finally: Path("reports/tiny").chmod(0o755)
    assert contents(made_project / "reports/tiny") == before and read_status("reports/tiny")["state"] == "finished"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_stopped_while_folders_are_exchanged(made_project, monkeypatch, stop):
    before, rename = break_it(made_project), Path.rename
    def stopped(path, target):
        if path.name == ".tiny.new": raise stop("between the two renames")
        return rename(path, target)
    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(RunError): run_report("tiny")
    assert contents(made_project / "reports/tiny") == before and reports_in(made_project) == ["tiny"]


def test_killed_while_folders_are_exchanged(made_project):
    before, aside = contents(made_project / "reports/tiny"), Path("reports/.tiny.old")
    with only_run(Path("reports/tiny")), ThreadPoolExecutor(1) as pool:  # the run that moves it is still at work
        Path("reports/tiny").rename(aside)
        assert pool.submit(report_names, ".").result() == []
    assert report_names(".") == ["tiny"]
    assert contents(made_project / "reports/tiny") == before and not aside.exists()


def gone(pid):
    "Whether a process has ended (or is only waiting to be collected)."
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def hear_ctrl_c():
    "A job in the background ignores Ctrl-C; this one must not."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_runner(made_project, signal_number):
    before = break_it(made_project, "import time; open('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)")
    process = course_ml("report", "tiny", preexec_fn=hear_ctrl_c)
    wait_for(lambda: Path("pid").exists() and Path("pid").read_text())
    assert read_status("reports/tiny")["state"] == "running"
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=120)
    status = read_status("reports/tiny")
    assert (status["state"], status["cell"]) == ("killed", 4) and contents(made_project / "reports/tiny") == before
    written = "running" if signal_number == signal.SIGKILL else "killed"
    assert read_json("reports/tiny/status.json")["state"] == written
    assert "Traceback" not in errors, errors
    wait_for(lambda: gone(int(Path("pid").read_text())))
    if signal_number == signal.SIGKILL:
        write_notebook(made_project / "nbs/tiny.ipynb", "## Results", WORK)
    if signal_number == signal.SIGKILL: run_report("tiny")  # the lock is free
    names = {".tiny.new"} & set(reports_in(made_project))
    assert not names and "tiny" in reports_in(made_project)


def test_second_run_is_refused(project):
    wait = "import time; open('started', 'w')\nwhile not os.path.exists('go'): time.sleep(.05)"
    write_notebook(project / "nbs/tiny.ipynb", WORK, wait)
    first = course_ml("report", "tiny")
    wait_for(Path("started").exists)
    second = course_ml("report", "tiny")
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 1 and f"is being run by process {first.pid}" in errors
    Path("go").touch()
    output, errors = first.communicate(timeout=120)
    assert (first.returncode, output, errors) == (0, "Report: reports/tiny/report.html\n", "")
    assert read_status("reports/tiny")["state"] == "finished"


def test_four_at_once(project):
    names = [f"tiny{i}" for i in range(4)]
    for name in names: write_report(project, name, "## Results", WORK, "print(images)")
    start = lambda i: course_ml("report", names[i], "-p", "images", str(i + 1))
    with ThreadPoolExecutor(4) as pool: processes = list(pool.map(start, range(4)))
    for process in processes: assert process.wait(timeout=240) == 0, process.communicate()
    manifests = [read_json(f"reports/{name}/manifest.json") for name in names]
    assert [manifest["parameters"]["images"] for manifest in manifests] == [1, 2, 3, 4]
    executed = [read_notebook(f"reports/{name}/report.ipynb") for name in names]
    assert [notebook.cells[-1].outputs[0].text for notebook in executed] == ["1\n", "2\n", "3\n", "4\n"]


def test_command_line(project, capsys, monkeypatch):
    monkeypatch.chdir(project / "nbs")
    assert main(["report", "tiny", "-p", "imagse", "5"]) == 2
    message = "course-ml: unknown parameter 'imagse'; did you mean 'images'?\nThe parameters are:\n"
    assert capsys.readouterr().err.startswith(message)
    assert main(["report", "tiny", "-p", "images", "5", "-p", "images", "6"]) == 2
    assert main(["report", "none"]) == 2
    capsys.readouterr()
    assert main(["report", "tiny", "-p", "images", "5"]) == 0
    assert capsys.readouterr().out == "Report: ../reports/tiny/report.html\n"
    assert read_json("../reports/tiny/manifest.json")["folder"] == "nbs"
    assert main(["reports"]) == 0
    assert re.fullmatch(r"tiny +finished +\S+ +A <tiny> report\n", capsys.readouterr().out)
    assert main(["params", "tiny"]) == 0 and "how many images" in capsys.readouterr().out
    write_notebook(project / "nbs/tiny.ipynb", "1 / 0")
    assert main(["report", "tiny"]) == 1 and "ZeroDivisionError" in capsys.readouterr().err
    assert main(["report"]) == 2 and "there are: tiny" in capsys.readouterr().err


def test_other_data_do_not_replace_the_results_of_a_report(project, capsys, monkeypatch):
    monkeypatch.chdir(project / "nbs")
    assert main(["report", "tiny", "-p", "data_path", "../reports"]) == 2
    assert "course-ml new NAME --data ../reports\n  course-ml report NAME" in capsys.readouterr().err
    settings = project / "reports/tiny/report.yml"
    settings.write_text(f"{settings.read_text()}\nparameters: {{data_path: nbs}}")
    assert main(["report", "tiny", "--set", "data_path=../reports"]) == 2
    assert main(["report", "tiny", "-p", "data_path", "../nbs"]) == 0


@pytest.mark.parametrize("arguments", [
    ["report", "tiny", "--jobs", "0"], ["report", "tiny", "--timeout", "-1"], ["report", "tiny", "--timeout", "soon"],
    ["raport"], []], ids=" ".join)
def test_refused_command_lines(arguments):
    with pytest.raises(SystemExit) as error: main(arguments)
    assert error.value.code == 2


def test_help_loads_nothing_slow():
    slow = ("torch", "pandas", "numpy", "matplotlib", "nbformat", "tensorflow")
    code = ("import sys, course_ml, course_ml.command_line as r\n"
            f"try: r.main(['--help'])\nexcept SystemExit: pass\nprint([m for m in {slow} if m in sys.modules])")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.startswith("usage: course-ml") and output.endswith("[]\n")
    process = course_ml("--version")
    assert re.fullmatch(r"course_ml (\d[\w.]*|not installed)\n", process.communicate()[0])
