# SPDX-License-Identifier: Apache-2.0
"""The project's notebooks and the pages that use them: nothing is stored or labeled in vain."""

import re

import pytest
from execution import find_notebooks
from notebook_kernel import read_notebook
from small_site import TOP

NOTEBOOKS = {notebook.name: read_notebook(notebook) for notebook in find_notebooks(TOP)}
SOURCES = [*(TOP / "docs").rglob("*.md"), *(TOP / "notebooks").glob("*.py")]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)

PRINTED = set(re.findall(r"\{num\}`\s*([^`]+?)\s*`", TEXT))
#: Label and options of every `{embed}`, in a page or in a notebook's Markdown cell.
EMBEDDED = re.findall(r"\{embed\} #(\S+)\n((?:(?:# )?:[a-z-]+:.*\n)*)", TEXT)
REFERRED = set(re.findall(r"\]\([^)\s]*#([a-z0-9-]+)\)|\{ref\}`(?:[^`]*<)?([a-z0-9-]+)>?`", TEXT))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_each_value_is_printed_by_a_page(name):
    stored = {num.name for nums in NOTEBOOKS[name][1].values() for num in nums}
    assert sorted(stored - PRINTED) == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_each_label_is_embedded_or_leads_to_a_printed_value(name):
    content, nums = NOTEBOOKS[name]
    needed = {label for label, _ in EMBEDDED} | {label for found in REFERRED for label in found}
    vain = [
        cell.metadata["options"]["label"]
        for index, cell in enumerate(content.cells)
        if "label" in cell.metadata.get("options", {})
        and not nums[index]
        and cell.metadata["options"]["label"] not in needed
    ]
    assert vain == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_listing_has_no_plumbing(name):
    """What a page shows as code displays no table: a cell of its own does, its input removed."""
    listed = {label for label, options in EMBEDDED if "remove-input" not in options}
    plumbing = re.compile(r"\b(Markdown|TokenTable|HTML|display|panels)\(")
    found = [
        cell.metadata["options"]["label"]
        for cell in NOTEBOOKS[name][0].cells
        if cell.cell_type == "code"
        and cell.metadata["options"].get("label") in listed
        and plumbing.search(cell.source)
    ]
    assert found == []
