# SPDX-License-Identifier: Apache-2.0
"""A notebook away from the site: what it installs, where its links lead, one that `make run` ran."""

import ast
import base64
import json
import subprocess
import sys

import pytest
import repository
from portable import install_cell, link_elsewhere
from run_notebook import html_of
from small_site import PNG, TOP, Site

PLACE = "https://example.org/owner/name"


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("git@example.org:owner/name.git", PLACE),
        ("https://example.org/owner/name.git", PLACE),
        ("https://someone:secret@example.org/owner/name", PLACE),
        ("ssh://git@example.org:22/owner/name/", PLACE),
        ("/srv/git/name.git", None),
        ("../name", None),
    ],
)
def test_an_address_is_that_of_the_remote(remote, address):
    """Without a password, and none for a folder."""
    assert repository.web_address(remote) == address


def test_the_first_cell_installs_from_the_repository():
    source = install_cell(PLACE, "abc123")["source"]
    assert f'%pip install "nemo-rl-ref[notebooks] @ git+{PLACE}@abc123"' in source
    ast.parse(source.replace("%pip install", "pip_install ="))  # nothing else in it is not Python
    assert "git+" not in install_cell(None, "abc123")["source"]


def test_the_first_cell_says_what_to_do_where_no_address_is_known():
    """Run where the package is out of reach."""
    source = install_cell(None, None)["source"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", source], cwd="/", capture_output=True, text=True
    )
    assert "pip install '.[notebooks]'" in done.stderr.splitlines()[-1]
    done = subprocess.run([sys.executable, "-c", source], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


TEXT = "See [DPO](../docs/a/custom-dpo.md#data), [this](#here) and [that](https://x.org)."


@pytest.mark.parametrize(
    ("site", "where", "link"),
    [
        ("https://x.org/s/", PLACE, "[DPO](https://x.org/s/a/custom-dpo.html#data)"),
        ("", PLACE, f"[DPO]({PLACE}/blob/abc/docs/a/custom-dpo.md)"),
        ("", None, "DPO (`docs/a/custom-dpo.md`)"),
    ],
)
def test_links_lead_out_of_the_notebook(site, where, link):
    rest = ", [this](#here) and [that](https://x.org)."
    assert link_elsewhere(TEXT, site, where, "abc") == f"See {link}{rest}"


def test_the_download_of_the_site_is_portable(built):
    text = (built.site.html / "notebooks" / "first.ipynb").read_text("utf-8")
    cells = json.loads(text)["cells"]
    assert cells[0]["id"] == "install"
    assert "](../docs" not in text and "docs/deep/down/losses.md" in text


def run(site: Site, name: str):
    """`make run` in a small project."""
    return site.run("docs/_ext/run_notebook.py", name)


def test_a_run_says_which_cell_runs_and_keeps_what_it_shows(site):
    site.notebook(
        "one",
        "# %% [markdown]\n# # Title",
        "#| label: said\nprint('a word')",
        f"from IPython.display import Image\nimport base64\nImage(base64.b64decode('{PNG}'))",
    )
    done = run(site, "one")
    assert done.returncode == 0, done.stderr
    assert "[2/3] notebooks/one.py:5: cell 2 (label said)" in done.stdout
    notebook, page = (site.top / "_build" / "run" / f"one{end}" for end in (".ipynb", ".html"))
    assert done.stdout.splitlines()[-2:] == [str(notebook), str(page)]
    assert json.loads(notebook.read_text("utf-8"))["cells"][1]["outputs"][0]["text"] == "a word\n"
    html = page.read_text("utf-8")
    assert "a word" in html and "data:image/png;base64,iVBOR" in html and "<h1" in html


def test_a_run_that_fails_keeps_what_came_before(site):
    site.notebook("one", "print('before')", "1 / 0", "print('after')")
    done = run(site, "one")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    html = (site.top / "_build" / "run" / "one.html").read_text("utf-8")
    assert "before" in html and "ZeroDivisionError" in html


def test_a_run_of_no_notebook_names_those_there_are(site):
    site.notebook("one", "x = 1")
    done = run(site, "two")
    assert done.returncode == 2 and "no notebook 'two'; there are one" in done.stderr


def test_an_image_is_inside_the_page():
    data = {"image/png": base64.b64encode(base64.b64decode(PNG)).decode()}
    output = {"output_type": "display_data", "data": data, "metadata": {}}
    cell = {"cell_type": "code", "source": "x", "metadata": {}, "outputs": [output]}
    notebook = {"cells": [cell | {"execution_count": 1, "id": "a"}], "metadata": {}}
    html = html_of(notebook | {"nbformat": 4, "nbformat_minor": 5}, "one")
    assert html.count("data:image/png") == 1 and 'src="_build' not in html
