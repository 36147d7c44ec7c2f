"""Every study runs at its smallest size, compares itself with published scores, and says what is not comparable."""

import ast
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, read_notebook

from course_ml.benchmarking import DEFAULT, Peer, few_images, noise_file
from course_ml.data import Split
from course_ml.notebooks import read_parameters
from course_ml.provenance import read_json
from course_ml.published_records import read_record
from course_ml.recipes import named_recipe
from course_ml.report_jobs import prepare
from course_ml.report_runs import run_report
from course_ml.report_state import read_status
from course_ml.study_data import choose_size
from course_ml.synthetic import make_synthetic

NOTEBOOKS = sorted((ROOT / "nbs/reports").glob("*.ipynb"))
# What makes the smallest size cheaper still: no probing of the machine, and small images.
SMALLEST = {
    "leaves": {"precision": "fp32", "image_size": 32},
    "cactus": {"precision": "fp32", "tuned_size": 32},
    "nature10": {"precision": "fp32", "cnn_size": 32, "frozen_size": 32, "tuned_size": 32},
    "blood_cells": {"precision": "fp32", "image_size": 32},
    "rare_species": {"precision": "fp32", "image_size": 32},
}
every_study = pytest.mark.parametrize("name", SMALLEST)
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def project(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COURSE_ML_PROGRESS", "0")


def elsewhere(name: str, folder: Path) -> Path:
    "Make a place for a study's results that is not the project's."
    settings = {"title": name, "notebook": str(ROOT / f"nbs/reports/{name}.ipynb")}
    (folder / "reports" / name).mkdir(parents=True)
    (folder / "reports" / name / "report.yml").write_text(json.dumps(settings))
    return folder


def has_interval(record: dict) -> bool:
    return record["low"] is not None or bool(record.get("reason"))


@every_study
def test_the_smallest_size(name, tmp_path):
    folder = run_report(name, {"size": "smoke", **SMALLEST[name]}, elsewhere(name, tmp_path))
    assert read_status(folder)["state"] == "finished"
    records = read_json(folder / "results.json")["records"]
    assert records and all(record["n"] and has_interval(record) for record in records.values())
    compared = pd.read_csv(folder / "tables/published.csv")
    published = read_record(ROOT / "reports" / name / "published.yml")
    assert set(compared.model) <= set(published["models"])
    assert compared.verdict.str.startswith("not comparable: ").all()
    assert len(pd.read_csv(folder / "tables/audit.csv")) and list((folder / "figures").glob("*.svg"))
    page = (folder / "report.html").read_text()
    assert "What to conclude" in page and "Traceback" not in page
    if name != "rare_species":
        assert list(pd.read_csv(folder / "submission.csv").columns) == ["id", "label"]


def cells(path: Path) -> list[str]:
    return [cell.source for cell in read_notebook(path).cells if cell.cell_type == "code"]


def sizes_of(path: Path) -> dict:
    "Read the sizes of a study from its call of `choose_size`, whose first argument only calls `dict`."
    source = next(source for source in cells(path) if "= choose_size(" in source)
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    sizes, *others = next(call.args for call in calls if ast.unparse(call.func) == "choose_size")
    assert [ast.unparse(other) for other in others] == ["size", "real_data"]
    return eval(ast.unparse(sizes), {"__builtins__": {}, "dict": dict})


@every_study
def test_a_size_that_does_not_fit_the_data_is_refused(name):
    assert prepare(name, {}, ROOT).values["size"] == "small"
    sizes = sizes_of(ROOT / f"nbs/reports/{name}.ipynb")
    assert list(sizes) == ["smoke", "small", "full"]
    for size, real_data in (("full", ""), ("small", "data"), ("smoke", "data")):
        with pytest.raises(ValueError, match="size 'full' needs real_data"):
            choose_size(sizes, size, real_data)
    with pytest.raises(ValueError, match="did you mean 'small'"):
        choose_size(sizes, "smalll", "")
    assert choose_size(sizes, "smoke", "").images < choose_size(sizes, "small", "").images


@every_study
def test_what_the_smallest_size_sets_is_a_parameter(name):
    assert set(SMALLEST[name]) < {parameter.name for parameter in read_parameters(
        read_notebook(ROOT / f"nbs/reports/{name}.ipynb"))}


@every_notebook
def test_says_what_it_asks_and_what_limits_it(path):
    prose = "\n".join(cell.source for cell in read_notebook(path).cells if cell.cell_type == "markdown")
    assert "**Question.**" in prose and "\n## Limits" in prose
    headings = re.findall(r"^## (\w+)", prose, re.MULTILINE)
    assert headings.index("Data") < headings.index("Limits")


# The processes that the speed study measures


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    dataset = make_synthetic("cactus", 40, 32)[0]
    return few_images(dataset, Split.holdout(dataset), 20, tmp_path_factory.mktemp("peers") / "images")


def ask_for_rates(peer: Peer, folder: str, **more):
    job = {"model": "resnet10t", "image_size": 32, "batch_size": 4, "folder": folder}
    assert peer.ask("prepare", **job, **more)["seconds"] > 0
    assert min(peer.ask("rates", steps=1).values()) > 0


def test_our_process_can_be_measured(folder, tmp_path):
    import torch
    from safetensors.torch import save_file

    from course_ml.baselines import CNNS, build_cnn
    peer = Peer("ours", ROOT / "tools/peers/ours_peer.py", tmp_path)
    ask_for_rates(peer, folder, chosen={"training": DEFAULT, "inference": DEFAULT})
    job = {"model": "resnet10t", "image_size": 32, "batch_size": 4}
    rates = peer.ask("compare", **job, choices=[DEFAULT], training=True, seconds=.01, repeats=2)
    assert np.shape(rates) == (2, 1)
    recipe = named_recipe("cactus_small_image", epochs=2, precision="fp32")
    torch.manual_seed(0)
    save_file(build_cnn(CNNS[recipe.backbone], 32, 2).state_dict(), tmp_path / "start.safetensors")
    start = {"network": recipe.backbone, "start": str(tmp_path / "start.safetensors"), "folder": folder, "seed": 0}
    assert len(peer.ask("fit_recipe", **start, recipe=recipe.to_yaml())["epochs"]) == 2
    assert peer.ask("frozen_head", **job, epochs=1, folder=folder)["head"] > 0
    assert peer.ask("grow", file=noise_file(64, tmp_path), batch_size=16)["memory"]["own"] > 0
    peer.close()


def test_the_plain_loop_can_be_measured(folder, tmp_path):
    peer = Peer("plain", ROOT / "tools/peers/plain_peer.py", tmp_path, sys.executable)
    ask_for_rates(peer, folder)
    job = {"model": "resnet10t", "image_size": 32, "batch_size": 4, "folder": folder}
    assert peer.ask("frozen_epoch", **job)["seconds"] > 0
    peer.close()
