"""What is drawn and written from the code is up to date, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re

import pytest
from conftest import ROOT

PAGES = (
    "README.md",
    "AGENTS.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/architecture.md",
    "docs/http.md",
    "docs/docker.md",
    "docs/memory.md",
)


@pytest.fixture(scope="module")
def drawing():
    path = ROOT / "docs" / "draw_architecture.py"
    spec = importlib.util.spec_from_file_location("draw_architecture", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_diagram_is_drawn_from_the_present_imports(drawing):
    drawn = (ROOT / "docs" / "architecture.svg").read_text("utf-8")
    assert drawn == drawing.draw(), "run: make docs"


def test_the_diagram_shows_every_package_and_file_of_the_root(drawing):
    shown = {name for files, _ in drawing.GROUPS.values() for name in files.split()}
    packages = {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")} - {"mini/"}
    assert shown == packages | {path.name for path in ROOT.glob("*.py")} - {"bench.py"}


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_to_files(page):
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("page", ["AGENTS.md", "docs/architecture.md", "docs/speed.md"])
def test_files_named_in_the_text_exist(page):
    text = (ROOT / page).read_text("utf-8")
    known = {path.name for folder in ("", "*/", "*/*/") for path in ROOT.glob(f"{folder}*.py")}
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / name).exists() or name in known, name
    for name in re.findall(r"`((?:core|audio|models|runtime|web|lofi)/\w+)`", text):
        assert (ROOT / f"{name}.py").exists(), name
