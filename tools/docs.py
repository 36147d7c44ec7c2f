"""Build README.md and the website from the notebooks.

    python tools/docs.py readme     nbs/index.ipynb -> README.md
    python tools/docs.py site       nbs/ -> _docs/

The website is described in _quarto.yml. Quarto builds it where it is installed. It is not among
Python's packages, so elsewhere smalldocs, which reads the same file, builds it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

from course_ml.notebooks import parameters_position, with_values
from course_ml.provenance import read_json

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp)\b", re.MULTILINE)
DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)
LINK_INSIDE = re.compile(r"\]\((?!https?:|mailto:|#|/)")
WEB_FONT = re.compile(r"@import\s+(?:url\(\s*[\"']?https?://[^)]*\)|\"https?://[^\"]*\"|'https?://[^']*')[^;]*;")


def readme() -> str:
    "Return README.md: `nbs/index.ipynb` in Markdown, its links as seen from the top folder."
    notebook = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not HIDDEN.search(cell.source)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = DIRECTIVE.sub("", cell.source).strip()
        else:
            cell.source = LINK_INSIDE.sub("](nbs/", cell.source)
    notebook.metadata["language_info"] = {"name": "python"}
    shown = {"display_data_priority": ["text/markdown", "text/plain"]}
    exporter = MarkdownExporter(config=Config({"NbConvertBase": shown}))
    text, _ = exporter.from_notebook_node(notebook)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return f"<!-- Made from nbs/index.ipynb by `make docs`: change it there. -->\n\n{text}\n"


def show_parameters(notebook, folder: Path) -> None:
    "Let a notebook of a report show the parameters of the run that made its outputs, not their defaults."
    values = read_json(folder / "manifest.json")["parameters"]
    cell = notebook.cells[parameters_position(notebook)]
    cell.source = with_values(cell.source, values)


def site() -> Path:
    "Build the website and return its folder."
    from nbdev.serve import proc_nbs

    os.chdir(ROOT)
    shutil.rmtree("_proc", ignore_errors=True)
    staged = proc_nbs(n_workers=2)
    for path in (staged / "reports").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        show_parameters(notebook, ROOT / "reports" / path.stem)
        nbformat.write(notebook, path)
    engine = ["quarto", "render", "--no-cache"]
    if shutil.which("quarto") is None:
        print("Quarto was not found (https://quarto.org/docs/get-started): smalldocs builds the website.")
        engine = [str(Path(sys.executable).with_name("smalldocs")), "render"]
    subprocess.run(engine, cwd=staged, check=True)
    pages = ROOT / "_docs"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.move(staged / "_docs", pages)
    shutil.rmtree(staged)
    for style in pages.rglob("*.css"):  # the pages ask no other host for anything, fonts included
        style.write_text(WEB_FONT.sub("", style.read_text(encoding="utf-8")), encoding="utf-8")
    return pages


def main() -> None:
    if sys.argv[1:] == ["readme"]:
        (ROOT / "README.md").write_text(readme(), encoding="utf-8")
        print("README.md is current.")
    elif sys.argv[1:] == ["site"]:
        print(f"The website: {site() / 'index.html'}")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
