"Every study runs to its end at its smallest size, sets itself beside what was published, and says what is not comparable."
import json

import pandas as pd
import pytest
from conftest import ROOT

from course_ml.audit import read_record
from course_ml.notebooks import RunError
from course_ml.provenance import read_json
from course_ml.report_jobs import prepare
from course_ml.report_runs import run_report
from course_ml.report_state import read_status

STUDIES = ("leaves", "cactus", "nature10", "blood_cells", "rare_species")


def elsewhere(name, folder):
    "A place for a study's results that is not the project's."
    (folder / "reports" / name).mkdir(parents=True)
    (folder / "reports" / name / "report.yml").write_text(json.dumps({"title": name, "notebook": str(ROOT / "nbs" / "reports" / f"{name}.ipynb")}))
    return folder


@pytest.mark.parametrize("name", STUDIES)
def test_the_smallest_size(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COURSE_ML_PROGRESS", "0")
    folder = run_report(name, {"size": "smoke"}, elsewhere(name, tmp_path))
    assert read_status(folder)["state"] == "finished"
    records = read_json(folder / "results.json")["records"]
    assert records and all(record["n"] and (record["low"] is not None or record.get("reason")) for record in records.values())
    beside = pd.read_csv(folder / "tables/published.csv")
    assert set(beside.model) <= set(read_record(ROOT / "reports" / name / "published.yml")["models"]) and beside.verdict.str.startswith("not comparable: ").all()
    assert len(pd.read_csv(folder / "tables/audit.csv")) and list((folder / "figures").glob("*.svg"))
    page = (folder / "report.html").read_text()
    assert "What to conclude" in page and "Traceback" not in page
    if name != "rare_species": assert list(pd.read_csv(folder / "submission.csv").columns) == ["id", "label"]


@pytest.mark.parametrize("name", STUDIES)
def test_a_size_that_does_not_fit_the_data_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COURSE_ML_PROGRESS", "0")
    assert prepare(name, {}, ROOT).values["size"] == "mini"
    with pytest.raises(RunError, match="size 'full' needs real_data"): run_report(name, {"size": "full"}, elsewhere(name, tmp_path))
