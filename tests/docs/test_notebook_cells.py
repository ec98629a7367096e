# SPDX-License-Identifier: Apache-2.0
"""Option lines of cells, and where cells stand in their file."""

import jupytext
import pytest
from notebook_cells import cell_starts, parse_options


def test_options_are_read_from_the_top():
    source = "#| label: dpo-curve\n#| alt: Two curves: ours,\n#|   and TRL's\n\nplot()\n#| x"
    options, nums, above = parse_options(source)
    assert options == {"label": "dpo-curve", "alt": "Two curves: ours, and TRL's"}
    assert nums == []
    assert source.split("\n")[above:] == ["plot()", "#| x"]


def test_a_cell_without_options_has_none():
    assert parse_options("# a comment\nx = 1") == ({}, [], 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("#| lable: x", "name one of label, alt, caption, num"),
        ("#| label", "should be '#| name: text'"),
        ("#| label:", "is empty"),
        ('#| caption: "a quoted text"', "without quotes"),
        ("#| label: a\n#| label: b", "given twice"),
        ("#| label: Two Words", "like 'dpo-curve'"),
        ("#| label: under_score", "like 'dpo-curve'"),
    ],
)
def test_bad_options_are_named(line, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        parse_options(f"{line}\nx = 1")


@pytest.mark.parametrize(
    "source",
    [
        "# %% [markdown]\n# # Title\n\n# %%\nx = 1\n\n# %% tags=['a']\ny = 2\n",
        "# ---\n# title: t\n# ---\n\n# %%\nx = 1\n",
        "x = 0\n\n# %%\ny = 1\n",
    ],
)
def test_cells_are_found_in_the_file(source):
    cells = jupytext.reads(source, fmt="py:percent").cells
    starts = cell_starts(source, len(cells))
    lines = source.split("\n")
    for cell, start in zip(cells, starts, strict=True):
        rest = [line.removeprefix("# ") for line in lines[start:] if line]
        assert rest[0] == cell.source.split("\n")[0]


def test_marks_that_are_not_cells_are_noticed():
    assert cell_starts("# %%\ntext = '''\n# %%\n# %%\n'''\n", 1) is None
