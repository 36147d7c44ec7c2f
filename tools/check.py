"""Check the tree in seconds: style, lengths, spelling, and that all that is made from the notebooks is current.

    python tools/check.py                  every check
    python tools/check.py lines spelling   some of them; their names are in CHECKS, at the end

Limits. ruff refuses a line of more than 140 characters anywhere. Here a line has at most 120, and up to 140
only where character 121 stands inside a string, such as the message of an error; a docstring is prose and
has to be wrapped. A cell of a lesson that is not exported has at most 100, without exception: that is what a
notebook window and a page of the website show. A line that holds several statements has at most 100.
A function has at most 30 lines of code, without its signature, docstring, comments and empty lines.
"""

import ast
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LINE, LINE_WITH_STRING, LESSON_LINE, SHARED_LINE, FUNCTION = 120, 140, 100, 100, 30
EXPORTED = re.compile(r"^#\|\s*export[si]?\b", re.MULTILINE)
MAGIC = re.compile(r"^(\s*)[%!].*$", re.MULTILINE)
PROSE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "Makefile", "settings.ini", "_quarto.yml")


class Piece(NamedTuple):
    "Code or prose that is read on its own: a file, or one cell of a notebook."
    where: str  # nbs/01_data.ipynb:cell 3
    source: str
    is_code: bool
    limit: int = LINE  # characters a line
    string_limit: int = LINE_WITH_STRING  # where a string passes the limit


# What there is to read


def notebooks() -> list[Path]:
    return sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def cells(path: Path) -> Iterator[Piece]:
    "The cells of a notebook, numbered from 1 as ruff numbers them."
    is_lesson = path.parent == ROOT / "nbs"
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"], 1):
        source = "".join(cell["source"])
        own = is_lesson and not EXPORTED.search(source)
        limits = (LESSON_LINE, LESSON_LINE) if own else (LINE, LINE_WITH_STRING)
        yield Piece(f"{path.relative_to(ROOT)}:cell {number}", source, cell["cell_type"] == "code", *limits)


def files() -> Iterator[Piece]:
    "Python files that are written by hand, and the prose beside them."
    code = [ROOT / "setup.py", *(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    prose = [ROOT / name for name in PROSE] + sorted((ROOT / ".github").rglob("*.*"))
    for path in code + [path for path in prose if path.is_file()]:
        yield Piece(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"), path.suffix == ".py")


@cache
def pieces() -> list[Piece]:
    return [*files(), *(cell for path in notebooks() for cell in cells(path))]


# Lengths of lines and functions


def syntax(source: str) -> ast.Module:
    "The syntax tree of a cell, its magics left out. The line numbers stay."
    try:
        return ast.parse(MAGIC.sub(r"\1pass", source))
    except SyntaxError:
        return ast.parse("")  # ruff names the error


def docstrings(tree: ast.Module) -> set[ast.AST]:
    "The strings that stand alone as a statement."
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def string_spans(tree: ast.Module, lines: list[str]) -> dict[int, list[tuple[int, float]]]:
    "For every line the columns (from 0, in characters) at which strings begin and end, without docstrings."
    spans = {}
    skipped = docstrings(tree)
    for node in ast.walk(tree):
        is_string = isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)
        if not is_string or not hasattr(node, "end_lineno") or node in skipped:
            continue
        for line in range(node.lineno, node.end_lineno + 1):
            start = column(lines[line - 1], node.col_offset) if line == node.lineno else 0
            end = column(lines[line - 1], node.end_col_offset) if line == node.end_lineno else math.inf
            spans.setdefault(line, []).append((start, end))
    return spans


def column(line: str, offset: int) -> int:
    "A column in characters from one in bytes, as the syntax tree counts."
    return len(line.encode()[:offset].decode(errors="ignore"))


def shared_lines(tree: ast.Module) -> set[int]:
    "Lines with several statements: `if a: b`, or `a; b`."
    starts = Counter(node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt))
    return {line for line, count in starts.items() if count > 1}


def long_lines(piece: Piece) -> Iterator[str]:
    lines = piece.source.split("\n")
    limit = min(piece.limit, SHARED_LINE)
    if not any(len(line) > limit for line in lines):
        return
    tree = syntax(piece.source)
    spans, shared = string_spans(tree, lines), shared_lines(tree)
    for number, line in enumerate(lines, 1):
        in_string = any(start <= piece.limit < end for start, end in spans.get(number, []))
        limit = piece.string_limit if in_string else piece.limit
        if len(line) > limit:
            yield f"{piece.where}:{number}: {len(line)} characters, at most {limit} here"
        elif number in shared and len(line) > SHARED_LINE:
            yield f"{piece.where}:{number}: several statements on a line of {len(line)} characters, at most {SHARED_LINE}"


def long_functions(piece: Piece) -> Iterator[str]:
    lines = piece.source.split("\n")
    if len(lines) <= FUNCTION:
        return
    tree = syntax(piece.source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            code = lines[body[0].lineno - 1:node.end_lineno] if body else []
            count = sum(bool(line.strip()) and not line.strip().startswith("#") for line in code)
            if count > FUNCTION:
                yield f"{piece.where}:{node.lineno}: {node.name} has {count} lines of code, at most {FUNCTION}"


def check_lines() -> list[str]:
    return [finding for piece in pieces() if piece.is_code for finding in long_lines(piece)]


def check_functions() -> list[str]:
    return [finding for piece in pieces() if piece.is_code for finding in long_functions(piece)]


# Tools of others


def tool(*command: str, folder: Path = ROOT) -> str:
    "What a program of this environment prints. Stops with its message where it is missing or breaks down."
    program = Path(sys.executable).with_name(command[0])
    if not program.exists():
        sys.exit(f"{command[0]} is not installed in {sys.prefix}: run make install")
    done = subprocess.run([program, *command[1:]], cwd=folder, text=True, capture_output=True)
    if done.returncode and not done.stdout.strip():
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def check_ruff() -> list[str]:
    found = tool("ruff", "check", "--quiet", "--no-cache", "--output-format", "concise", ".").splitlines()
    return [line for line in found if re.match(r"\S+?:(cell )?\d+:", line)]


def check_spelling() -> list[str]:
    "codespell on every piece, each written into a file that is named like its place."
    with tempfile.TemporaryDirectory() as folder:
        for piece in pieces():
            path = Path(folder, piece.where.replace(":", "/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(piece.source, encoding="utf-8")
        settings = str(ROOT / "pyproject.toml")
        found = tool("codespell", "--toml", settings, "--check-hidden", ".", folder=Path(folder))
    return sorted(line.removeprefix("./").replace("/cell", ":cell") for line in found.splitlines())


# What is made from the notebooks


def copy_sources(folder: Path) -> Path:
    "Copy what nbdev and tools/docs.py read to `folder`, where they may write; `folder`."
    for name in ("settings.ini", "_quarto.yml", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("nbs", "tools"):
        ignored = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    return folder


def made_by(*command: str, pattern: str) -> list[Path]:
    "The files of the pattern that a command makes otherwise than they are, in the tree or only in one of both."
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_sources(Path(folder))
        tool(*command, folder=copy)
        made = {path.relative_to(copy): path.read_bytes() for path in copy.glob(pattern) if path.is_file()}
    there = {path.relative_to(ROOT): path.read_bytes() for path in ROOT.glob(pattern) if path.is_file()}
    return sorted(path for path in made.keys() | there.keys() if made.get(path) != there.get(path))


def check_notebooks() -> list[str]:
    changed = made_by("nbdev_clean", pattern="nbs/**/*.ipynb")
    return [f"{path}: is not clean: run nbdev_clean" for path in changed if ".ipynb_checkpoints" not in path.parts]


def check_export() -> list[str]:
    changed = made_by("nbdev_export", pattern="course_ml/**/*.py")
    return [f"{path}: edited by hand or out of date: run nbdev_export" for path in changed]


def check_readme() -> list[str]:
    changed = made_by("python", "tools/docs.py", "readme", pattern="README.md")
    return [f"{path}: differs from nbs/index.ipynb: run python tools/docs.py readme" for path in changed]


CHECKS = {"ruff": check_ruff, "lines": check_lines, "functions": check_functions, "spelling": check_spelling,
          "notebooks": check_notebooks, "export": check_export, "readme": check_readme}


def main() -> None:
    names = sys.argv[1:] or list(CHECKS)
    if unknown := [name for name in names if name not in CHECKS]:
        sys.exit(f"there is no check {unknown[0]!r}; choose from {', '.join(CHECKS)}")
    with ThreadPoolExecutor() as pool:
        found = dict(zip(names, pool.map(lambda name: CHECKS[name](), names)))
    for findings in found.values():
        print(*findings, sep="\n", end="\n" if findings else "")
    print(", ".join(f"{name} {len(findings)}" for name, findings in found.items()))
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
