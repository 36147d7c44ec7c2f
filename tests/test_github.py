"""The forms and workflows of GitHub can be read, and name what the project has: nobody sees them run before a push."""

import re
from configparser import ConfigParser

import pytest
import yaml
from conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
MAKE = re.compile(r"^make (\w+)", re.MULTILINE)


def read(path) -> dict:
    "What a YAML file contains; the key `on`, which YAML 1.1 takes for true, under its name."
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in content.items()}


def settings() -> dict:
    reader = ConfigParser(delimiters=["="], interpolation=None)
    reader.read(ROOT / "settings.ini", encoding="utf-8")
    return reader["DEFAULT"]


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow(path):
    workflow = read(path)
    assert workflow["name"] == path.stem and workflow["on"] and workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for job in workflow["jobs"].values():
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(workflow["jobs"])
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        assert set(MAKE.findall(step.get("run", ""))) <= targets
        assert re.search(r"@(v\d+|release/v\d+)$", step.get("uses", "x@v1")), f"{step['uses']} names no major version"


def test_tested_versions_of_python_are_the_supported_ones():
    tested = read(ROOT / ".github/workflows/tests.yml")["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    assert all(isinstance(version, str) for version in tested)  # 3.10 without quotes is 3.1
    minors = [int(version.removeprefix("3.")) for version in tested]
    assert tested[0] == settings()["min_python"] and minors == list(range(minors[0], minors[0] + len(minors)))
    named = re.search(r"\((3\.\d+), (3\.\d+) or (3\.\d+)\)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert tested == list(named.groups())


def test_release_builds_and_checks():
    release = read(ROOT / ".github/workflows/release.yml")
    commands = "\n".join(step.get("run", "") for step in steps(release))
    assert "python -m build" in commands and "twine check" in commands
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert set(release["jobs"]["publish"]["needs"]) == {"tests", "build"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_form(path):
    form = read(path)
    assert form["name"] and form["description"] and form["body"]
    identifiers = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(identifiers) == len(set(identifiers))
    assert all(field["attributes"]["label"] for field in form["body"] if field["type"] != "markdown")
    assert {field["type"] for field in form["body"]} <= {"markdown", "input", "textarea", "dropdown", "checkboxes"}


def test_citation_and_change_log_name_the_version():
    citation = read(ROOT / "CITATION.cff")
    assert citation["title"] == settings()["lib_name"] and citation["license"] == "Apache-2.0"
    assert str(citation["version"]) == settings()["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\]", changes, re.MULTILINE)
    assert sections[0] == "Unreleased" and settings()["version"] in sections
