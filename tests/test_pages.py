"""What comes out of a report: bodies below captions, names as people have them, prose that does not go stale."""

import io
import json
import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.mathtext
import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from conftest import ROOT, read_notebook
from hypothesis import given, strategies
from PIL import Image

from course_ml.cleaning import plot_issues
from course_ml.command_line import main
from course_ml.data import Dataset
from course_ml.execution import execute_notebook
from course_ml.interpretation import plot_embedding, plot_slices
from course_ml.lettering import drawn_names, missing_letters, numbered_names
from course_ml.names import markdown_text, one_line, short_names
from course_ml.notebooks import write_notebook
from course_ml.pages import export_report, read_table
from course_ml.plots import (
    plot_confusion,
    plot_gallery,
    plot_learning_curves,
    plot_per_class,
    plot_reliability,
    plot_top_confusions,
)
from course_ml.predictions import Predictions
from course_ml.provenance import read_json
from course_ml.report_runs import run_report
from course_ml.reporting import FullTable, Report, latex_table, markdown_table, readable_table

REPORTS = [*sorted((ROOT / "nbs/reports").glob("*.ipynb")), ROOT / "nbs/03_resnet.ipynb"]
every_report = pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)

# A caption and its body

CAPTION = re.compile(r"\*\*(Table|Figure) \d+\.\*\*")
BODIES = {"Table": ("text/html",), "Figure": ("image/png", "image/jpeg", "image/svg+xml")}


def without_body(notebook) -> list[str]:
    "Return the captions in a notebook's outputs that nothing follows."
    lost = []
    for cell in notebook.cells:
        shown = [output.get("data", {}) for output in cell.get("outputs", [])]
        for data, following in zip(shown, [*shown[1:], {}]):
            caption = CAPTION.match(data.get("text/markdown", ""))
            if caption and not set(BODIES[caption[1]]) & set(following):
                lost.append(data["text/markdown"])
    return lost


@every_report
def test_captions_have_bodies(path):
    assert not without_body(read_notebook(path))


SHOWN = {  # each of them shows one table and one figure
    "last line": "report.table(frame, 'last', 'A table.')\nreport.figure(draw(), 'last', 'A figure.')",
    "before the last line": "report.figure(draw(), 'before', 'A figure.')\nreport.table(frame, 'before', 'One.')\n1",
    "if": "if True:\n    report.table(frame, 'inside', 'A table.')\n    report.figure(draw(), 'inside', 'A figure.')",
    "for": "for name in ['loop']:\n    report.table(frame, name, 'A table.')\n    report.figure(draw(), name, 'One.')",
    "function": "def show():\n    report.table(frame, 'f', 'A table.')\n    report.figure(draw(), 'f', 'A figure.')\nshow()",
}


def test_captions_have_bodies_wherever_they_are_shown(tmp_path):
    start = ("import pandas as pd, matplotlib.pyplot as plt\nfrom course_ml.reporting import Report\n"
             "report, frame = Report(report_dir), pd.DataFrame({'n': [1, 2]})\n"
             "def draw(): return plt.subplots()[0]")
    write_notebook(tmp_path / "shows.ipynb", f"report_dir = {str(tmp_path / 'out')!r}", start, *SHOWN.values())
    notebook = nbformat.read(tmp_path / "shows.ipynb", as_version=4)
    execute_notebook(notebook, lambda *_: None)
    assert not without_body(notebook)
    for cell in notebook.cells[-len(SHOWN):]:
        kinds = [kind for output in cell.outputs for kind in output.get("data", {})]
        assert [kinds.count(kind) for kind in ("text/markdown", "text/html", "image/png")] == [2, 1, 1], cell.source


# Names of classes

HEBREW, CHINESE, EMOJI = "שלום עולם", "日本の猫", "cat 🐱"
HOSTILE = ["$5 note $10", "<img src=x onerror=alert(1)>", HEBREW, CHINESE, EMOJI, "a|b `c` \\d{e}_f^g~h#%&",
           f"Quercus robur subspecies {'a' * 60} one", f"Quercus robur subspecies {'a' * 60} two",
           "line\nbreak\tand \x1b[31m", "*bold* [link](http://x) _it_", r"\(x\) \[y\] \$z\$", "\u202eesrever"]


def predict(classes, n=6, seed=0) -> Predictions:
    y_true = np.repeat(np.arange(len(classes)), n)
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(len(classes)), len(y_true))
    return Predictions.from_arrays([f"image {i}" for i in range(len(y_true))], y_true, probabilities, classes)


def all_figures(classes) -> dict:
    "Draw every figure that writes names of classes."
    predictions = predict(classes)
    images = np.random.default_rng(0).integers(0, 255, (len(predictions), 8, 8, 3)).astype(np.uint8)
    dataset = Dataset.from_arrays("hostile", images, predictions.y_true, classes, ids=predictions.ids)
    history = pd.DataFrame({"epoch": [0, 1], "train_loss": [1, .5], "validation_loss": [1, .6],
                            "train_accuracy": [.1, .5], "validation_accuracy": [.1, .4]})
    names = pd.DataFrame({"id": predictions.ids[:6], "label": classes[0], "predicted": list(classes)[:6],
                          "probability of predicted": .9})
    slices = pd.DataFrame({"slice": list(classes)[:6], "n": 5, "accuracy": .5, "low": .4, "high": .6})
    return {"confusion": plot_confusion(predictions), "confusions": plot_top_confusions(predictions, dataset),
            "gallery": plot_gallery(predictions, dataset), "per_class": plot_per_class({classes[0]: predictions}),
            "reliability": plot_reliability(dict.fromkeys(list(classes)[:2], predictions)),
            "curves": plot_learning_curves(dict.fromkeys(list(classes)[:2], history)),
            "issues": plot_issues(names, dataset), "slices": plot_slices(slices, .5),
            "map": plot_embedding(np.random.default_rng(0).random((len(predictions), 2)), predictions)}


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.filterwarnings("ignore:no font of this machine")
def test_figures_write_names_and_no_formulas(many, tmp_path, monkeypatch):
    monkeypatch.setattr(matplotlib.mathtext.MathTextParser, "parse", lambda *_: pytest.fail("read as a formula"))
    classes = [*HOSTILE, *(f"{'species ' * 5}{number} of many {'x' * 20}" for number in range(188 * many))]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph .* missing")
        for name, figure in all_figures(classes).items():
            figure.savefig(tmp_path / f"{name}.png", dpi=60)
            content = io.BytesIO()
            figure.savefig(content, format="svg")
            ElementTree.fromstring(content.getvalue())  # it is XML, whatever the names are


def test_the_ends_of_names_that_begin_alike_are_seen():
    labels = list(drawn_names(HOSTILE, 20).values())
    assert len(set(labels)) == len(HOSTILE) and max(map(len, labels)) <= 20
    assert labels[6].endswith(" one") and labels[7].endswith(" two")


@given(strategies.lists(strategies.text(max_size=40), unique=True, max_size=30), strategies.integers(9, 24))
def test_short_names_are_distinct(names, most):
    short = short_names(names, most)
    assert len(set(short)) == len(names) and all(len(name) <= most and "\n" not in name for name in short)


def test_a_name_without_a_font_is_a_number_that_a_table_explains(monkeypatch):
    nowhere = "\ue0f0\ue0f1"  # letters for private use, which no font has
    with pytest.warns(UserWarning, match="class 1"):
        assert drawn_names(["cat", nowhere, "dog"])[nowhere] == "class 1"
    assert numbered_names(["cat", nowhere, "class 1"]) == {"class 1": nowhere}
    assert sorted(drawn_names(["cat", nowhere, "class 1"]).values()) == ["cat", "class 1", "class 1 #2"]
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    images = np.zeros((3, 4, 4, 3), np.uint8)
    Report().made_from(Dataset.from_arrays("private", images, [0, 1, 2], ["cat", nowhere, "dog"]))
    assert nowhere in shown[1]._repr_html_() and "class 1" in shown[1]._repr_html_()


def as_read(markup: str) -> str:
    "Return what a reader of HTML sees, without the marks that isolate a name."
    return re.sub("[\u2068\u2069]", "", BeautifulSoup(markup, "html.parser").get_text())


@pytest.mark.parametrize("name", HOSTILE)
def test_tables_show_names_as_they_are(name):
    from nbconvert.filters import markdown2html
    seen, frame = one_line(name), pd.DataFrame({"class": [name], name: [1234]})
    page = FullTable(readable_table(frame))._repr_html_()
    cells = [as_read(str(cell)) for cell in BeautifulSoup(page, "html.parser")(["th", "td"])]
    assert cells == ["class", seen, seen, "1,234"]
    rendered = BeautifulSoup(str(markdown2html(markdown_table(frame))), "html.parser")
    assert [as_read(str(cell)) for cell in rendered(["th", "td"])] == cells
    assert {tag.name for tag in rendered.find_all(True)} <= {"table", "thead", "tbody", "tr", "th", "td", "span"}
    sentence = BeautifulSoup(str(markdown2html(f"**Table 1.** {markdown_text(name)}: all")), "html.parser")
    assert as_read(str(sentence)).strip() == f"Table 1. {seen}: all"
    assert {tag.name for tag in sentence.find_all(True)} <= {"p", "strong", "span"}


def unescaped(latex: str) -> list[str]:
    "Return the characters that LaTeX would take for more than themselves."
    return re.findall(r"[#$%&_^~<>|`]", re.sub(r"\\(textbackslash|text\w+)\{\}|\\[#$%&_{}]", "", latex))


def test_latex_prints_names_as_they_are(tmp_path):
    table = latex_table(pd.DataFrame({"class": HOSTILE, "n": 1234}), "names", f"Of {HOSTILE[0]} and {HOSTILE[5]}.")
    rows = re.findall(r"^(.*) & 1,234 \\\\$", table, re.MULTILINE)
    assert len(rows) == len(HOSTILE) and not any(map(unescaped, [*rows, *re.findall(r"\\caption{(.*)}", table)]))
    if engine := next(filter(shutil.which, ("tectonic", "lualatex", "xelatex")), None):
        document = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}{table}\\end{{document}}"
        (tmp_path / "names.tex").write_text(document, encoding="utf-8")
        subprocess.run([engine, "names.tex"], cwd=tmp_path, check=True, stdin=subprocess.DEVNULL, timeout=300)


def test_numbers_of_a_table(tmp_path):
    frame = pd.DataFrame({"model": ["a", "b"], "seed": [2024, 2025], "n": [12345, 7], "accuracy": [.5, np.nan],
                          "accuracy low": [.4, np.nan], "accuracy high": [np.nan, np.nan], "p": [1e-9, .25]})
    lines = markdown_table(frame).splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| a | 2024 | 12,345 | 0.500\xa0(no\xa0interval) | &lt;0.001 |" and "| – | 0.250 |" in lines[3]
    report = Report(tmp_path)
    report.table(frame, "numbers", "Numbers.")
    whole = report.made["tables"]["numbers"]["whole"]
    assert markdown_table(read_table(tmp_path / "tables/numbers.csv", whole)) == markdown_table(frame)
    assert "{lrrrr}" in latex_table(frame, "numbers", "")


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory) -> Path:
    "A new report on images of classes with such names."
    root = tmp_path_factory.mktemp("hostile")
    rng, rows = np.random.default_rng(0), []
    (root / "images").mkdir()
    for number, name in enumerate(HOSTILE):
        for k in range(7):
            pixels = np.clip(rng.normal(40 + 20 * number, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"images/{number}_{k}.png")
            rows.append({"file": f"images/{number}_{k}.png", "label": name})
    pd.DataFrame(rows).to_csv(root / "labels.csv", index=False)
    before = os.getcwd()
    os.chdir(root)
    try:
        assert main(["new", "hostile", "--data", "labels.csv", "--label-column", "label"]) == 0
        return run_report("hostile", {"image_size": 16, "epochs": 1}, root).absolute()
    finally: os.chdir(before)


def test_a_whole_report_with_such_names(hostile_report):
    assert set(pd.read_csv(hostile_report / "tables/per_class.csv")["class"]) >= set(HOSTILE)
    page = BeautifulSoup((hostile_report / "report.html").read_text(encoding="utf-8"), "html.parser")
    assert not page("script") and not page.select("[onerror]") and not page.select('img[src="x"]')
    cells = {as_read(str(cell)) for cell in page("td")}
    assert cells >= {one_line(name) for name in HOSTILE}
    assert not without_body(nbformat.read(hostile_report / "report.ipynb", as_version=4))
    assert "epochs = 1\n" in page.get_text()
    for figure in (hostile_report / "figures").glob("*.svg"): ElementTree.parse(figure)
    records = read_json(hostile_report / "results.json")["records"]
    assert records and json.dumps(records)


def test_its_tables_for_a_document(hostile_report, tmp_path):
    from nbconvert.filters import markdown2html
    export_report(hostile_report, tmp_path / "tables")
    rendered = BeautifulSoup(str(markdown2html((tmp_path / "tables/per_class.md").read_text())), "html.parser")
    assert {as_read(str(cell)) for cell in rendered("td")} >= {one_line(name) for name in HOSTILE}
    assert not rendered("img")
    latex = (tmp_path / "tables/per_class.tex").read_text(encoding="utf-8")
    body = latex[latex.index("\\midrule"):latex.index("\\bottomrule")]
    assert not unescaped(re.sub(r" & |\\\\$", "", body, flags=re.MULTILINE))


def test_it_is_printed(hostile_report, tmp_path):
    pytest.importorskip("typst")
    if missing_letters(CHINESE):
        with pytest.warns(UserWarning, match="the PDF shows boxes"):
            export_report(hostile_report, tmp_path / "report.pdf")
    else: export_report(hostile_report, tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


# Prose that states results goes stale: results are written by code, from records

RESULT = re.compile(r"\d|\b(better|worse|best|worst|faster|slower|larger|smaller|higher|lower|more than|less than|gains?|"
                    r"helps?|favors?|improves?|rises?|loses?|none of|all of them|outperforms?|beats|significant\w*)\b")
# Names, references and settings with digits, and words that name a role: "the best member", "lower learning rate".
NEUTRAL = [r"`[^`]*`", r"\]\([^)]*\)", r"(?m)^#.*$", r"(?m)^- skip_exec.*$", r"\[lesson \d\d\w?", r"\[[A-Z]\w+\s\d{4}",
           r"[\w-]+Net[\w-]*\d\w*", r"CIFAR-10N?", r"\bF1\b", r"\bL2\b", r"fp32", r"95 %\s+confidence interval"]
PUBLISHED = {  # what others printed
    "blood_cells": ["some 2,000 of 14,000 images", "without gain"],
    "cactus": ["for 500 epochs", "finds the second far better"],
    "leaves": ["176 species", "differences of .0001 to .0004"],
    "noise": ["is incorrect for 9 % of them", "2022"],
    "rare_species": ["202 families"],
    "speed": ["at the example's 180", "which makes them faster than they would be"],
}
METHOD = {  # how it was done, or how a table is to be read
    "blood_cells": ["70 % of the images", "15 % the validation set", "15 % the test set", "score of the best one",
                    "The table has the best trials, the figure all of them", "the two models that are best on the",
                    "with more epochs the order", "What it gains here:", "The larger backbone is fine-tuned"],
    "cactus": ["70 % of the images", "15 % the validation set", "15 % the test set", "add up to 1"],
    "coverage": ["How often the package's 95 % intervals contain the truth, and how often it calls a model better",
                 "An interval says 95 %", "for a hundred classes of two images", "is one called better?",
                 "93 to 97 % of the intervals contain the truth, and at most 6 % of the comparisons are false",
                 "0.90 to 0.99, middling ones 0.6 to 0.9, bad ones 0.2 to 0.5 (0.55 to 0.7 for two classes)"],
    "fine_tuning": ["the lower blocks", "chooses the best one", "(seed 0)"],
    "leaks": ["where t exceeds 10", "the gain is what the leak adds"],
    "leaves": ["its best member", "our networks are smaller", "What the stages really gain"],
    "nature10": ["At 160 x 160", "without any prediction is 0", "whether dropout and augmentation help"],
    "packaged_resnet": ["the paired gains of the packaged weights", "would move the gain", "measures whether it helps"],
    "rare_species": ["60, 20 and 20 %", "the 16 most common", "the paired gains in", "which loss helps the tail"],
    "speed": ["A ratio above 1 says that ours is faster", "the ratio is 1", "ours is faster, and bars",
              "is a lower bound", "Every median ratio below 1",
              "the probe below 0.95", "own 32 pixels", "32 pixels wide", "lower precision",
              "gains there what we gain here", "A fast step helps", "have smaller batches",
              "slows all of them", "from the smallest to the largest"],
}


def prose_of(path: Path) -> list[str]:
    return [cell.source for cell in read_notebook(path).cells if cell.cell_type == "markdown"]


def stated_results(path: Path) -> list[str]:
    "Return the sentences of a study's prose that state a result, and are not on one of the lists."
    prose = "\n\n".join(prose_of(path))
    for pattern in NEUTRAL: prose = re.sub(pattern, "", prose)
    paragraphs = [" ".join(paragraph.split()) for paragraph in prose.split("\n\n")]
    for phrase in [*PUBLISHED.get(path.stem, ()), *METHOD.get(path.stem, ())]:
        paragraphs = [paragraph.replace(phrase, "") for paragraph in paragraphs]
    sentences = [sentence for paragraph in paragraphs for sentence in re.split(r"(?<=[.?!]) ", paragraph)]
    return [sentence for sentence in sentences if RESULT.search(sentence) and not sentence.endswith("?")]


@pytest.mark.parametrize("path", REPORTS[:-1], ids=lambda path: path.stem)
def test_prose_states_no_results(path):
    assert not stated_results(path)


def test_the_lists_of_allowed_prose_are_needed():
    for study, phrases in [*PUBLISHED.items(), *METHOD.items()]:
        prose = " ".join(" ".join(prose_of(ROOT / f"nbs/reports/{study}.ipynb")).split())
        assert not [phrase for phrase in phrases if phrase not in prose], study
