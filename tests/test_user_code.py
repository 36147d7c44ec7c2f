"""Code of the user decides a result as the library's own does: what counts in a key, and what does not."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from course_ml.config import Recipe
from course_ml.user_code import code_of


def run(source: str) -> dict:
    "Execute code as a Python prompt does, which keeps no source; its names."
    names = {"__name__": "__main__"}
    exec(source, names)
    return names


def of_source(source: str, change: str, to: str):
    "Describe `f` of some code, and `f` of the code with a change."
    assert change in source
    return code_of(run(source)["f"]), code_of(run(source.replace(change, to))["f"])


USED = {
    "the code": ("def f(): return 1", "1", "2"),
    "a default argument": ("RATE = 1\ndef f(rate=RATE): return rate", "1", "2"),
    "a default of a keyword": ("RATE = 1\ndef f(*, rate=RATE): return rate", "1", "2"),
    "a value": ("RATE = 1\ndef f(): return RATE", "1", "2"),
    "a value in a comprehension": ("RATE = 1\ndef f(): return [RATE for _ in range(2)]", "1", "2"),
    "a value in a function inside": ("RATE = 1\ndef f():\n    def g(): return RATE\n    return g()", "1", "2"),
    "a value of a closure": ("def make(rate):\n    def f(): return rate\n    return f\nf = make(1)", "1", "2"),
    "a helper": ("def g(): return 1\ndef f(): return g()", "1", "2"),
    "a helper in a dict": ("def g(): return 1\nBY_NAME = {'g': g}\ndef f(): return BY_NAME['g']()", "1", "2"),
    "a helper of a helper": ("def h(): return 1\ndef g(): return h()\ndef f(): return g()", "1", "2"),
    "what a wrapper wraps": ("import functools\n@functools.lru_cache\ndef f(): return 1", "1", "2"),
    "a class": ("class C:\n    RATE = 1\ndef f(): return C.RATE", "1", "2"),
    "a method": ("class C:\n    def m(self): return 1\ndef f(): return C().m()", "1", "2"),
    "a static method": ("class C:\n    @staticmethod\n    def m(): return 1\ndef f(): return C.m()", "1", "2"),
    "a property": ("class C:\n    @property\n    def m(self): return 1\ndef f(): return C().m", "1", "2"),
    "a base class": ("class B:\n    RATE = 1\nclass C(B): pass\ndef f(): return C.RATE", "1", "2"),
    "an object": ("class C:\n    def __init__(self, r): self.r = r\nc = C(1)\ndef f(): return c.r", "1", "2"),
    "an object with slots": ("class C:\n    __slots__ = ('r',)\nc = C()\nc.r = 1\ndef f(): return c.r", "1", "2"),
    "a callable object": ("class C:\n    def __call__(self): return 1\nf = C()", "1", "2"),
    "a bound object": ("class C:\n    def __init__(self, r): self.r = r\n    def m(self): return self.r\nf = C(1).m",
                       "1", "2"),
    "a partial": ("from functools import partial\ndef g(a): return a\nf = partial(g, a=1)", "1", "2"),
    "a lambda": ("f = lambda: 1", "1", "2"),
    "a recursive function": ("def f(n=1): return n and f(n - 1)", "n=1", "n=2"),
    "a recipe": ("from course_ml.config import Recipe\nr = Recipe(epochs=1)\ndef f(): return r", "=1", "=2"),
    "a set": ("s = {'a', 'b', '1'}\ndef f(): return s", "1", "2"),
    "a function of the library": ("from course_ml.runtime import set_seed as g\ndef f(): return g(0)",
                                  "set_seed", "did_you_mean"),
}


@pytest.mark.parametrize("change", USED.values(), ids=USED)
def test_what_user_code_does_counts(change):
    before, after = of_source(*change)
    assert before == code_of(run(change[0])["f"])  # the same again
    assert before != after


def test_an_attribute_is_not_the_variable_of_the_same_name():
    before, after = of_source("rate = 1\ndef f(o): return o.rate", "1", "2")
    assert before == after


def test_a_description_stays_when_an_object_was_used():
    names = run("class C:\n    def __init__(self): self.rate = 1\nf = C()")
    assert code_of(names["f"]) == code_of(names["f"])


def test_comments_and_docstrings_do_not_count(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    plain = "RATE = 1\n\n\ndef f():\n    return RATE\n"
    (tmp_path / "plain_search.py").write_text(plain)
    (tmp_path / "commented_search.py").write_text(
        plain.replace("def f():\n", 'def f():\n    "Return the rate."\n    # as it is\n'))
    import commented_search
    import plain_search
    assert code_of(plain_search.f) == code_of(commented_search.f)


def test_a_module_of_the_user_counts_by_its_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    helper = tmp_path / "helper_of_a_search.py"

    def described(rate: int) -> str:
        helper.write_text(f"from another_helper import x\nRATE = {rate}\n")
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "another_helper.py").write_text("x = 1\n")
        code = "import helper_of_a_search as h; from course_ml.user_code import code_of; print(code_of(lambda: h.RATE))"
        return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout

    assert described(1) == described(1) != described(2)


def test_others_code_counts_by_its_name():
    assert code_of(len) == code_of(len) == {"name": "len"}
    assert code_of(dataclasses.replace) == {"name": "dataclasses.replace"}
    assert code_of(Path) == {"name": "pathlib.Path"}
    assert code_of(functools.partial(dataclasses.replace, epochs=1)) != code_of(
        functools.partial(dataclasses.replace, epochs=2))
    assert set(code_of(Recipe)) == {"name", "library"}
