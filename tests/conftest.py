"""What the tests of the tree and of the website share."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def read_notebook(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def run_in(folder: Path, *command: str) -> str:
    "Run a command of this environment in `folder`; what it printed. Fails the test if the command fails."
    program = shutil.which(command[0], path=str(Path(sys.executable).parent)) or command[0]
    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    done = subprocess.run([program, *command[1:]], cwd=folder, env=environment, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}"
    return done.stdout


def copy_tree(copy: Path) -> Path:
    "Copy the sources of the project to `copy`, where a test may write; `copy`."
    copy.mkdir()
    for name in ("settings.ini", "_quarto.yml", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("nbs", "tools"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True,
                        ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
    for manifest in ROOT.glob("reports/*/manifest.json"):
        place = copy / manifest.relative_to(ROOT)
        place.parent.mkdir(parents=True)
        shutil.copy(manifest, place)
    return copy


@pytest.fixture
def tree(tmp_path) -> Path:
    "A copy of the sources of the project, in which a test may write."
    return copy_tree(tmp_path / "tree")
