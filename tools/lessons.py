"""Run lessons afresh and save them with their outputs.

    python tools/lessons.py                       every notebook in nbs/
    python tools/lessons.py nbs/01_data.ipynb     these alone

A notebook is saved, cleaned, only after its last cell has run, and atomically. As in the tests, cells with
`#| eval: false` are left alone. Notebooks with `skip_exec: true` take the outputs of the report that
`course-ml report` made of them, from its report.ipynb, which is not kept in git.
"""

import base64
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from PIL import Image
from traitlets.config import Config

SKIPPED_NOTEBOOK = re.compile(r"^(- )?skip_exec:\s*true", re.MULTILINE)
SKIPPED_CELL = re.compile(r"^#\|\s*eval:\s*false|nbdev_export\(", re.MULTILINE)


def run_notebook(path: Path) -> None:
    "Run the notebook at `path` in its folder and save it. Raises `CellExecutionError`, and then saves nothing."
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        address = {"transport": "ipc", "ip": f"{folder}/kernel"}  # no TCP port that others could read or take
        client = NotebookClient(notebook, timeout=600, kernel_name="python3", config=Config({"KernelManager": address}),
                                resources={"metadata": {"path": str(path.parent)}})
        with client.setup_kernel():
            for position, cell in enumerate(notebook.cells):
                if cell.cell_type != "code":
                    continue
                cell.outputs = []
                if not SKIPPED_CELL.search(cell.source):
                    client.execute_cell(cell, position)
    save(notebook, path)


def save(notebook, path: Path) -> None:
    "Save a notebook, cleaned, atomically."
    clean_nb(notebook, allowed_cell_metadata_keys=get_config().allowed_cell_metadata_keys.split())
    temporary = path.with_suffix(".ipynb.tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)


def smaller(image: str) -> str:
    "Return a PNG in base64 with at most 256 colors."
    small = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB").quantize(256).save(small, "png", optimize=True)
    return min(image, base64.b64encode(small.getvalue()).decode(), key=len)


def take_outputs(path: Path) -> str:
    "Save the outputs of its last report in the notebook at `path`; return what was done."
    report = Path("reports") / path.stem / "report.ipynb"
    if not report.exists():
        return f"left alone: there is no {report} here; make it with course-ml report {path.stem} --force"
    executed = nbformat.read(report, as_version=4)
    made = {cell.source: cell.outputs for cell in executed.cells if cell.cell_type == "code"}
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if missing := [cell.source for cell in cells if cell.source not in made]:
        return f"left alone: {len(missing)} cells are not in {report}; make the report first"
    for cell in cells:
        cell.outputs = [small_output(output) for output in made[cell.source] if output.get("name") != "stderr"]
    save(notebook, path)
    return f"outputs of {report}"


def small_output(output):
    "Return an output of a cell, its image with fewer colors."
    if "image/png" in output.get("data", {}):
        output.data["image/png"] = smaller(output.data["image/png"])
    return output


def main() -> None:
    os.environ["COURSE_ML_PROGRESS"] = "0"  # a progress bar is nothing to save
    for path in [Path(name) for name in sys.argv[1:]] or sorted(nbglob(as_path=True)):
        cells = nbformat.read(path, as_version=4).cells
        if any(cell.cell_type != "code" and SKIPPED_NOTEBOOK.search(cell.source) for cell in cells):
            print(f"{path}: {take_outputs(path)}")
            continue
        start = time.perf_counter()
        run_notebook(path)
        print(f"{path}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
