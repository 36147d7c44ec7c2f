"""tools/check.py finds what it is there to find: tested on cells made for it."""

import importlib.util

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("check", ROOT / "tools/check.py")
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


def code(source: str, own_cell_of_a_lesson: bool = False):
    limits = (check.LESSON_LINE, check.LESSON_LINE) if own_cell_of_a_lesson else (check.LINE, check.LINE_WITH_STRING)
    return check.Piece("here", source, True, *limits)


def call(length: int) -> str:
    "A line of that length without a string."
    return "f(" + "a" * (length - 3) + ")"


def message(length: int, before: str = "raise ValueError(") -> str:
    "A line of that length that ends in a string."
    return before + '"' + "a" * (length - len(before) - 3) + '")'


@pytest.mark.parametrize("source", [
    call(120), message(140), message(140, "raise ValueError(f"), "x = 1  # " + "a" * 111, "%timeit " + "a" * 100,
    "if a: " + call(94), "for a in b:\n    " + call(116), "",
])
def test_a_line_that_fits(source):
    assert not list(check.long_lines(code(source)))


@pytest.mark.parametrize("source", [
    call(121), message(141), "x = 'é'; " + call(113), "x = 1  # " + "a" * 112, "if a: " + call(95),
    "def f(a):\n    \"" + "a" * 125 + "\"", message(110, "x = (") + " + " + "a" * 20,
])
def test_a_line_that_is_too_long(source):
    assert len(list(check.long_lines(code(source)))) == 1


def test_a_lesson_has_shorter_lines():
    assert not list(check.long_lines(code(call(100), own_cell_of_a_lesson=True)))
    assert len(list(check.long_lines(code(message(101), own_cell_of_a_lesson=True)))) == 1


@pytest.mark.parametrize("lines, count", [(30, 0), (31, 1)])
def test_a_function_has_at_most_thirty_lines(lines, count):
    source = "def f(\n    a,  # a number\n):\n    'What it returns.'\n\n    # why\n" + "    a += 1\n" * lines
    assert len(list(check.long_functions(code(source)))) == count


def test_every_cell_and_file_is_read():
    where = {piece.where.split(":")[0] for piece in check.pieces()}
    assert {"README.md", "setup.py", "tests/test_check.py", "tools/check.py", "nbs/index.ipynb"} <= where
