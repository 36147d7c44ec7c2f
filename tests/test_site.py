"""The website, built in a copy of the tree and looked at with a browser."""

import ast
import functools
import http.server
import re
import shutil
import sys
import threading
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup
from conftest import NOTEBOOKS, ROOT, copy_tree, read_notebook, run_in

from course_ml.provenance import read_json

LINK = re.compile(r"(?:href|src)=\"([^\"]*)\"")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    tree = copy_tree(tmp_path_factory.mktemp("site") / "tree")
    run_in(tree, sys.executable, "tools/docs.py", "site")
    return tree / "_docs"


def test_every_notebook_has_its_page(site):
    pages = {str(page.relative_to(site).with_suffix("")) for page in site.rglob("*.html")}
    assert {str(path.relative_to(ROOT / "nbs").with_suffix("")) for path in NOTEBOOKS} <= pages


def test_no_link_is_broken(site):
    broken = []
    for page in site.rglob("*.html"):
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            target = urlsplit(unescape(link))
            if target.scheme or target.netloc or not target.path:
                continue
            inside = site if target.path.startswith("/") else page.parent
            if not (inside / unquote(target.path).lstrip("/")).exists():
                broken.append(f"{page.relative_to(site)} -> {link}")
    assert not broken, "\n".join(broken)


REPORTS = sorted(path.stem for path in (ROOT / "nbs/reports").glob("*.ipynb"))


@pytest.mark.parametrize("name", REPORTS)
def test_reports_show_the_parameters_of_their_run(site, name):
    values = read_json(ROOT / f"reports/{name}/manifest.json")["parameters"]
    shown = BeautifulSoup((site / f"reports/{name}.html").read_text(encoding="utf-8"), "html.parser")
    blocks = [block.get_text() for block in shown("pre")]
    code = next(block for block in blocks if "report_dir" in block)
    parameters = {line.target.id: ast.literal_eval(line.value) for line in ast.parse(code).body}
    assert {name: value for name, value in parameters.items() if name in values}.items() <= values.items()
    assert len(parameters.keys() & values.keys()) > len(values) / 2
    printed = next(block for block in blocks if "Parameters of this run:" in block).splitlines()
    assert {f"  {name} = {value!r}" for name, value in values.items()} <= set(printed)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium or Chrome is installed")
    with playwright.sync_playwright() as engine:
        window = engine.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield window
        window.close()


@pytest.fixture(scope="module")
def address(site):
    "The address at which the site is served on this machine."
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def page(browser, address):
    "A page that fails the test at an error of a script or a request to another host."
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: request.url.startswith((address, "data:")) or errors.append(request.url))
    yield page
    page.close()
    assert not errors


def test_a_reader_finds_a_lesson(page, address):
    title = read_notebook(ROOT / "nbs/03_resnet.ipynb").cells[0].source.splitlines()[0].removeprefix("# ")
    page.goto(f"{address}/index.html")
    page.locator("#quarto-sidebar a[href$='03_resnet.html']").click()
    assert page.locator("h1").first.inner_text() == title
    images = page.locator("main img")
    assert images.count() and images.evaluate_all("all => all.every(one => one.complete && one.naturalWidth > 0)")


def test_search_finds_a_word_of_a_lesson(page, address):
    page.goto(f"{address}/index.html")
    page.locator("#quarto-search input").first.click()
    page.keyboard.type("confusion", delay=20)
    page.get_by_text("Metrics").locator("visible=true").last.wait_for(timeout=5000)


def test_dark_mode(page, address):
    page.goto(f"{address}/index.html")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.locator(".quarto-color-scheme-toggle").locator("visible=true").first.click()
    page.wait_for_function(f"{background} !== '{light}'")


@pytest.mark.parametrize("name", ["index", "03_resnet"])
def test_fits_a_phone(page, address, name):
    page.set_viewport_size({"width": 375, "height": 800})
    page.goto(f"{address}/{name}.html")
    assert page.evaluate("document.documentElement.scrollWidth") <= 376
