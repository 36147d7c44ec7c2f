"""Tests of the tree itself: the library is what the notebooks say, and the notebooks are fit to be read."""

import ast
import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import re
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml
from conftest import NOTEBOOKS, ROOT, read_notebook, run_in
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MODULES = sorted(path for path in (ROOT / "course_ml").glob("*.py") if not path.stem.startswith("_"))
MACHINE_PATH = re.compile(r"/(home|root|tmp|Users|work|var/folders|private)/|\b[A-Z]:\\|site-packages")
EMBEDDED_DATA = re.compile(r"data:[\w/+.-]+;base64,[\w+/=\s]+")

# What an object can do is asked of its type. `hasattr` only where another package leaves no choice.
HASATTR = {
    ("provenance", "__array__"): "NumPy's own protocol",
    ("transfer", "group_matcher"): "only some of timm's models have it",
    ("backbones", "part"): "torchvision's models call their last layer fc, classifier, head or heads",
}

LONGEST_BODY = 30  # lines of a function, without its signature and docstring

# What git keeps of a report; pages, and tables in Markdown and LaTeX, are made from it.
KEPT = re.compile(r"(report|published)\.yml|(results|manifest|status)\.json|submission\.csv|tables/[\w-]+\.csv"
                  r"|figures/[\w.-]+\.(svg|png)")
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)


def directive(cell, name: str) -> str | None:
    "Return the value of the directive `#| name value` of a cell; None where it has none."
    found = re.search(rf"^#\|\s*{name}\b:?[ \t]*(.*)$", cell.source, re.MULTILINE)
    return found and found.group(1).strip()


@functools.cache
def code_cells(path: Path) -> list:
    return [cell for cell in read_notebook(path).cells if cell.cell_type == "code"]


def statements(cell) -> list[ast.stmt]:
    "Return the statements of a code cell, its magics turned into Python."
    return ast.parse(TransformerManager().transform_cell(cell.source)).body


def is_import(node: ast.AST) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def imported_names(path: Path) -> set[str]:
    "Return all that a module imports, also inside functions, as dotted names; its neighbors as `course_ml.NAME`."
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["course_ml" if node.level else "", node.module]))
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "course_ml" else {module}
    return names


def settings() -> dict[str, list[Requirement]]:
    "Return what the package needs, by the key of settings.ini: requirements, keras_requirements, ..."
    reader = ConfigParser(delimiters=["="], interpolation=None)
    reader.read(ROOT / "settings.ini", encoding="utf-8")
    return {key: [Requirement(one) for one in names.split()]
            for key, names in reader["DEFAULT"].items() if key.endswith("requirements")}


# The notebooks and what is made from them


def test_export_gives_the_library_there_is(tree):
    run_in(tree, "nbdev_export")
    made = {path.name: path.read_text(encoding="utf-8") for path in (tree / "course_ml").glob("*.py")}
    there = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "course_ml").glob("*.py")}
    changed = [name for name in sorted(made.keys() | there.keys()) if made.get(name) != there.get(name)]
    assert not changed, f"edited by hand or out of date, run nbdev_export: {changed}"


def test_notebooks_are_clean(tree):
    run_in(tree, "nbdev_clean")
    unclean = [str(path.relative_to(ROOT)) for path in NOTEBOOKS
               if path.read_bytes() != (tree / path.relative_to(ROOT)).read_bytes()]
    assert not unclean, f"run nbdev_clean: {unclean}"


def test_readme_is_current(tree):
    run_in(tree, sys.executable, "tools/docs.py", "readme")
    same = (tree / "README.md").read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8")
    assert same, "README.md differs from nbs/index.ipynb: run make docs"


def test_website_lists_every_notebook():
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    listed = [page for entry in sidebar for page in entry.get("contents", [entry.get("href")])]
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "nbs")) for path in NOTEBOOKS)
    assert (ROOT / "nbs/_quarto.yml").samefile(ROOT / "_quarto.yml")


@every_notebook
def test_opens_with_title_and_description(path):
    first = read_notebook(path).cells[0]
    assert first.cell_type == "markdown" and re.match(r"# \S.*\n+> \S", first.source)


@every_notebook
def test_does_not_end_with_exported_code(path):
    "nbdev looks at the cell after an exported one when it builds the website, and fails where there is none."
    last = read_notebook(path).cells[-1]
    assert last.cell_type != "code" or not re.search(r"^#\|\s*export", last.source, re.MULTILINE), "add an example"


@every_notebook
def test_names_its_kernel(path):
    kernel = read_notebook(path).metadata.get("kernelspec", {})
    assert (kernel.get("name"), kernel.get("language")) == ("python3", "python")  # papermill asks for both


def test_parameterized_notebooks_have_their_tag():
    records = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in ROOT.glob("reports/*/report.yml")]
    studies = {Path(record["notebook"]).name for record in records}
    studies |= {path.name for path in (ROOT / "nbs/reports").glob("*.ipynb")}
    assert studies, "no notebook is named in a reports/*/report.yml"
    tagged = {path.name: sum("parameters" in cell.metadata.get("tags", []) for cell in code_cells(path))
              for path in NOTEBOOKS}
    others = {name: tagged.get(name) for name in studies if tagged.get(name) != 1}
    assert not others, f"these need one code cell tagged `parameters`: {others}"


@every_notebook
def test_imports_are_alone_in_their_cells(path):
    """Building the website runs every cell that is exported or has an import, so it must have nothing else.

    An exported function may import inside itself; settings such as `os.environ` go into a cell of their own.
    """
    for cell in code_cells(path):
        if "nbdev_export(" in cell.source or (directive(cell, "eval") or "").lower() == "false":
            continue
        body = statements(cell)
        exported = any(directive(cell, name) is not None for name in ("export", "exports", "exporti"))
        nodes = body if exported else [node for statement in body for node in ast.walk(statement)]
        if any(is_import(node) for node in nodes):
            assert all(is_import(statement) for statement in body), f"imports and other code:\n{cell.source}"


# Lessons are committed with their outputs


@every_notebook
def test_is_small(path):
    size = path.stat().st_size / 1e6
    assert size < 1, f"{size:.1f} MB: save fewer or smaller images"


STUDIES = sorted((ROOT / "nbs/reports").glob("*.ipynb"))
STUDY_LINES = 62  # of code, without comments and empty lines: sixty, and two that convert the parameters


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_is_short(path):
    "A student can copy a study: what all studies share is in the library."
    lines = [line.strip() for cell in code_cells(path) for line in cell.source.splitlines()]
    count = sum(bool(line) and not line.startswith("#") for line in lines)
    assert count <= STUDY_LINES, f"{count} lines of code, at most {STUDY_LINES}"


@every_notebook
def test_was_run_and_saved(path):
    "Every cell that ends in a value shows it."
    shown = (ast.Name, ast.Attribute, ast.Subscript, ast.Tuple, ast.List, ast.Dict, ast.BinOp, ast.Compare)
    cells = [cell for cell in code_cells(path) if (directive(cell, "eval") or "").lower() != "false"]
    for cell in cells:
        body = statements(cell)
        ends_in_value = body and isinstance(body[-1], ast.Expr) and isinstance(body[-1].value, shown)
        assert cell.outputs or not ends_in_value or cell.source.rstrip().endswith(";"), f"no output:\n{cell.source}"
    prose_only = not any("default_exp" in cell.source or "parameters" in cell.metadata.get("tags", [])
                         for cell in cells)
    assert prose_only or any(cell.outputs for cell in cells), "saved without outputs: run make lessons"


@every_notebook
def test_outputs_are_fit_to_be_read(path):
    "No traceback, warning, remains of a progress bar, or path of the machine it ran on."
    for cell in code_cells(path):
        for output in cell.outputs:
            where = f"the output of\n{cell.source}"
            assert output.output_type != "error", f"a traceback in {where}"
            assert output.get("name") != "stderr", f"a warning or other text on stderr in {where}\n{output.text}"
            data = output.get("data", {"text/plain": output.get("text", "")})
            assert not any("widget" in kind for kind in data), f"a widget, which a saved page can't show, in {where}"
            for kind, text in data.items():
                if kind.startswith("text/") or kind == "image/svg+xml":
                    text = EMBEDDED_DATA.sub("", text)
                    assert "\r" not in text and "\x1b" not in text, f"remains of a progress bar in {where}"
                    found = MACHINE_PATH.search(text)
                    shown = found and text[max(0, found.start() - 40):found.end() + 40]
                    assert not found, f"the path of a machine ({shown}) in {where}"


# Reports are committed with what cannot be made from the rest. They may be of an older state of the library than
# the code next to them, so nothing here runs them or asks whether they are stale.

REPORTS = sorted(path.parent for path in ROOT.glob("reports/*/manifest.json"))


@pytest.mark.parametrize("folder", REPORTS, ids=lambda folder: folder.name)
def test_reports_are_complete(folder):
    outputs = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["outputs"]
    assert "results.json" in outputs or not (folder / "results.json").exists()
    changed = [name for name, digest in outputs.items()
               if not (folder / name).exists() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest]
    assert not changed, f"changed or removed since the report was made: {changed}"
    assert json.loads((folder / "status.json").read_text(encoding="utf-8"))["state"] == "finished"


def test_git_keeps_each_thing_of_a_report_once():
    try: listed = run_in(ROOT, "git", "ls-files", "reports").splitlines()
    except (AssertionError, OSError): pytest.skip("this is no clone of the repository")
    names = ["/".join(Path(one).parts[2:]) for one in listed if (ROOT / one).exists()]
    notebooks = re.compile(r"[\w-]+\.ipynb")  # of a study that `course-ml new` began
    more = sorted({name for name in names if not KEPT.fullmatch(name) and not notebooks.fullmatch(name)})
    assert not more and "report.ipynb" not in names, f"made from other files, git need not keep them: {more}"
    figures = [Path(one).with_suffix("") for one in listed if "/figures/" in one]
    assert len(figures) == len(set(figures)), "a figure is kept as SVG and as PNG"


# The library


def neighbors(path: Path) -> set[str]:
    "Return the modules of the library that a module imports."
    return {name.split(".")[1] for name in imported_names(path) if name.startswith("course_ml.")}


def layers() -> list[str]:
    "Return the modules in the order in which CONTRIBUTING.md lists them: below another one means later."
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("### Layers")[1].split("###")[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")]
    return [module for row in rows for module in re.findall(r"`(\w+)`", row)]


@every_module
def test_imports_go_one_way(path):
    "A module imports only those before it in the table of layers, inside functions too; so there are no cycles."
    order = layers()
    assert order.count(path.stem) == 1, f"{path.stem} stands {order.count(path.stem)} times in the layers of CONTRIBUTING.md"
    later = sorted(neighbors(path) & set(order[order.index(path.stem):]))
    assert not later, f"{path.stem} imports {later}, which stand after it in the layers of CONTRIBUTING.md"


def test_no_cycle_of_imports():
    "Whatever the layers say: follow the imports from each module; none leads back to it."
    graph = {path.stem: neighbors(path) for path in MODULES}
    for start in graph:
        reached, waiting = set(), set(graph[start])
        while waiting:
            name = waiting.pop()
            reached.add(name)
            waiting |= graph.get(name, set()) - reached
        assert start not in reached, f"{start} imports itself, by way of {sorted(reached)}"


def called(path: Path, *names: str) -> list[ast.Call]:
    "Return the calls of functions of these names in a module."
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    return [call for call in calls if getattr(call.func, "attr", getattr(call.func, "id", "")) in names]


@every_module
def test_imports_are_statements(path):
    "No module is imported by a function call, which the tests above and the keys of results would not see."
    found = [ast.unparse(call) for call in called(path, "import_module", "__import__")]
    assert not found, f"imported at run time: {found}"


@every_module
def test_types_say_what_objects_can_do(path):
    asked = [(path.stem, getattr(call.args[1], "value", ast.unparse(call.args[1]))) for call in called(path, "hasattr")]
    assert set(asked) <= set(HASATTR), f"hasattr in place of an interface: {set(asked) - set(HASATTR)}"


@every_module
def test_functions_are_short(path):
    long = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) and node.body[1:] else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1
            long += [f"{node.name} ({lines})"] * (lines > LONGEST_BODY)
    assert not long, f"bodies of more than {LONGEST_BODY} lines: {long}"


@every_module
def test_imports_what_settings_declare(path):
    declared = {canonicalize_name(requirement.name) for key, requirements in settings().items()
                if key != "dev_requirements" for requirement in requirements}
    distributions = packages_distributions()
    top = {name.split(".")[0] for name in imported_names(path)} - set(sys.stdlib_module_names)
    top -= {"course_ml", "triton"}  # triton comes with torch, on some platforms
    missing = {name for name in top
               if not declared & {canonicalize_name(one) for one in distributions.get(name, [name])}}
    assert not missing, f"not among the requirements in settings.ini: {sorted(missing)}"


@pytest.mark.parametrize("key", ["requirements", "keras_requirements", "pdf_requirements", "dev_requirements"])
def test_requirements_are_installed_in_the_tested_versions(key):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}
    for requirement in settings()[key]:
        assert tested[canonicalize_name(requirement.name)] in requirement.specifier, requirement
        assert version(requirement.name) in requirement.specifier, requirement


LOADED = "import sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
HELP = """
import sys
from course_ml.command_line import main
sys.argv = ["course-ml", "--help"]
try: main()
except SystemExit: pass
"""


@pytest.mark.parametrize("code, slow", [
    ("import course_ml", "torch timm tensorflow keras pandas numpy sklearn matplotlib"),
    (HELP, "torch timm tensorflow keras sklearn matplotlib"),
], ids=["import", "help"])
def test_starts_fast(code, slow):
    loaded = set(run_in(ROOT, sys.executable, "-c", f"{code}\n{LOADED}").splitlines()[-1].split())
    assert not loaded & set(slow.split())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_site_can_read_every_signature(path):
    "The website evaluates the annotations of public functions and of classes, inherited ones included."
    module = importlib.import_module(f"course_ml.{path.stem}")
    for public in [getattr(module, name) for name in getattr(module, "__all__", [])]:
        inside = vars(public).values() if inspect.isclass(public) else []
        for one in [public, *filter(inspect.isfunction, inside)] if callable(public) else []:
            with contextlib.suppress(ValueError):  # an exception has no signature
                inspect.signature(one, eval_str=True)
