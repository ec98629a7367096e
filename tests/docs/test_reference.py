# SPDX-License-Identifier: Apache-2.0
"""What the reference pages say of the package: its layers, its core, where modules went."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from nemo_rl_ref.export.slice import statements, whole_class

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MOVED = (ROOT / "docs/reference/moved.md").read_text(encoding="utf-8")


def exists(name):
    """Whether the package has a module."""
    try:
        return importlib.util.find_spec(f"nemo_rl_ref.{name}") is not None
    except ModuleNotFoundError:
        return False


def test_the_diagrams_are_those_that_are_drawn(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    import draw_diagrams  # pyright: ignore[reportMissingImports]

    drawn = {f"{name}.svg": make().svg() for name, make in draw_diagrams.DIAGRAMS.items()}
    files = {path.name: path.read_text("utf-8") for path in draw_diagrams.FOLDER.iterdir()}
    assert files == drawn, "run python docs/draw_diagrams.py"


def test_the_picture_of_the_layers_is_that_of_the_contracts(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    import draw_layers  # pyright: ignore[reportMissingImports]

    rows = draw_layers.layers(PYPROJECT)
    assert draw_layers.PICTURE.read_text(encoding="utf-8") == draw_layers.draw(rows), (
        "run python docs/draw_layers.py"
    )
    folders = {path.parent.name for path in (ROOT / "nemo_rl_ref").glob("*/__init__.py")}
    assert folders <= {name for row in rows for name in row}


@pytest.mark.parametrize("row", re.findall(r"^\| `(.*)` \| (.*) \|$", MOVED, re.M))
def test_a_module_is_where_the_page_says(row):
    before, now = row
    assert not exists(before) or ROOT.joinpath("nemo_rl_ref", *before.split(".")).is_dir()
    if "#| num" not in now:
        assert all(exists(name) for name in re.findall(r"`([a-z_.]+)`", now))


def test_each_custom_loss_can_be_copied_from_its_entry_and_from_the_table(project_html):
    """Complete, for NeMo RL and for this project."""

    def copied(place):
        return [button["data-clipboard-text"] for button in place.select("button.copy-text")]

    pages = ("reference/api/custom", "core-design/design-principles/loss-functions")
    entries, table = (
        BeautifulSoup((project_html / f"{page}.html").read_text("utf-8"), "html.parser")
        for page in pages
    )
    rows = {
        link["title"]: row
        for row in table.select("tr:has(.copy-loss)")
        for link in row.select("a[title^='nemo_rl_ref.custom.']")
    }
    losses = 0
    for path in (ROOT / "nemo_rl_ref" / "custom").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        for statement in statements(source):
            if not statement.text.startswith("class "):
                continue
            (name,) = statement.flow.binds
            full = f"nemo_rl_ref.custom.{path.stem}.{name}"
            texts = [whole_class(source, name, prefix) for prefix in ("nemo_rl", "nemo_rl_ref")]
            assert copied(entries.find("dt", id=full).find_next_sibling("dd")) == texts, full
            if "Source:" in statement.text and name != "TokenPGLossFn":  # what others derive from
                losses += 1
                assert set(texts) <= set(copied(rows[full])), full
    assert losses > 25


def test_the_citation_has_the_version_of_the_package():
    version = tomllib.loads(PYPROJECT)["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
