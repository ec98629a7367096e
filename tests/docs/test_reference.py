# SPDX-License-Identifier: Apache-2.0
"""What the reference pages say of the package: its layers, its core, where modules went."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

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


def test_the_citation_has_the_version_of_the_package():
    version = tomllib.loads(PYPROJECT)["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
