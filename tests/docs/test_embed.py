# SPDX-License-Identifier: Apache-2.0
"""The directive `{embed}`: what a page shows of a cell, and what is refused."""

import re

import pytest

PAGE = "deep/down/losses.html"


@pytest.fixture(scope="module")
def cells(built):
    """The embedded cells of the small site's page, in order."""
    return built.page(PAGE).select(".embedded-cell")


def same(cell):
    """A cell's HTML without what rightly differs between two places: paths, ids, class names."""
    html = re.sub(r'\s(src|href|id)="[^"]*"', "", str(cell))
    return re.sub(r"\s+", " ", html.replace("tag_remove-input ", ""))


def test_code_and_text(cells):
    code = cells[0].select_one(".cell_input").get_text()
    assert code.strip().startswith("import sys")
    texts = [block.get_text().strip() for block in cells[0].select(".cell_output .output")]
    assert texts == ["printed 17", "18"]


def test_remove_input(cells):
    assert cells[1].select_one(".cell_input") is None
    assert cells[1].select_one(".cell_output img") is not None


def test_remove_output(cells):
    assert "of the second notebook" in cells[5].select_one(".cell_input").get_text()
    assert cells[5].select_one(".cell_output") is None


def test_code_says_whether_it_runs_alone(cells):
    notes = [cell.select_one(".listing-copy") for cell in cells]
    assert notes[0].get_text() == "runs alone"
    assert notes[1] is None  # its input is removed
    assert notes[6].find("button")["data-clipboard-text"] == (
        "from nemo_rl_ref.number import NUMBER\n\nstored = NUMBER\n"
    )


def test_a_name_that_nothing_binds_is_a_warning(site):
    site.notebook("one", "import builtins\nbuiltins.hidden = 1", "#| label: bare\nprint(hidden)")
    site.write("docs/index.md", "# Home\n\n```{embed} #bare\n```\n\n{doc}`/notebooks/one`\n")
    result = site.build("-q", builder="dummy")
    assert "the listing 'bare' uses names that no cell above binds: hidden" in result.text


def test_image_with_its_alternative_text(built, cells):
    image = cells[2].find("img")
    assert image["alt"] == "A square, one pixel wide: red."
    assert built.site.html.joinpath("deep/down", image["src"]).read_bytes().startswith(b"\x89PNG")


def test_tables_and_formula(cells):
    html, markdown = cells[3].find_all("table")
    assert html.find("td").get_text() == "cell of a table"
    assert markdown.find("th").get_text() == "loss"
    assert markdown.find("td").select_one("annotation").get_text() == r"\beta"
    assert cells[3].select_one("div.math annotation").get_text() == r"\frac{a}{b}"


def test_error(cells):
    trace = cells[4].select_one(".traceback").get_text()
    assert "Traceback (most recent call last)" in trace
    assert "ValueError: 3 is not allowed" in trace


def test_each_cell_looks_as_on_its_notebook(built, cells):
    own = [same(cell) for cell in built.page("notebooks/first.html").select("div.cell")]
    for embedded in (cells[0], cells[2], cells[3], cells[4]):
        assert same(embedded.select_one("div.cell")) in own


def test_label_lines_are_shown_nowhere(built):
    for page in (PAGE, "notebooks/first.html", "notebooks/second.html"):
        assert "#|" not in built.page(page).find("article").get_text()


def test_each_cell_links_back_to_its_notebook(cells):
    links = [cell.select_one(".embedded-from a")["href"] for cell in cells]
    assert links[0] == "../../notebooks/first.html#code-and-text"
    assert links[5] == "../../notebooks/second.html#other"


def test_each_notebook_ran_once(built):
    assert sorted(built.site.executions()) == ["first", "second"]


def test_downloads(built):
    def links(page):
        return [(a.get_text(), a["href"]) for a in built.page(page).select(".notebook-links a")]

    assert links("notebooks/first.html") == [(".ipynb", "first.ipynb"), (".py", "first.py")]
    assert links(PAGE) == [
        ("notebooks/first", "../../notebooks/first.html"),
        (".ipynb", "../../notebooks/first.ipynb"),
        (".py", "../../notebooks/first.py"),
        ("notebooks/second", "../../notebooks/second.html"),
        (".ipynb", "../../notebooks/second.ipynb"),
        (".py", "../../notebooks/second.py"),
    ]
    assert links("deep/index.html") == []
    folder = built.site.html / "notebooks"
    assert '"printed 17\\n' in folder.joinpath("first.ipynb").read_text("utf-8")
    source = built.site.top / "notebooks" / "first.py"
    assert folder.joinpath("first.py").read_bytes() == source.read_bytes()


def test_what_is_refused(site):
    site.notebook(
        "one",
        "#| label: dpo-curve\nprint(1)",
        "#| label: twice\nprint(1)",
        "#| num: loss-gap = {0.1}\n#| num: gap = {1}\n1",
    )
    site.notebook(
        "two",
        "#| label: twice\n#| num: gap = {2}\nprint(2)",
        "from IPython.display import SVG\nSVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>')",
    )
    site.write(
        "docs/index.md",
        """
        # Home

        ```{embed} #dpo-curv
        ```

        ```{embed} dpo-curve
        ```

        ```{embed} #twice
        ```

        ```{embed} #dpo-curve
        :remove-input:
        :remove-output:
        ```

        ```{embed} #dpo-curve
        :remove-input: maybe
        ```

        The gap is {num}`los-gap`.

        ```{toctree}
        notebooks/one
        notebooks/two
        ```
        """,
    )
    result = site.build("-q", builder="dummy")
    page = f"{site.top}/docs/index.md"
    assert f"{page}:3: WARNING: no cell is labeled 'dpo-curv'; did you mean 'dpo-curve'?" in (
        result.text
    )
    assert f"{page}:6: WARNING: embed takes a label, written '#label', got 'dpo-curve'" in (
        result.text
    )
    places = "notebooks/one.py:6 and notebooks/two.py:2"
    ambiguous = f"{page}:9: WARNING: label 'twice' is ambiguous, it stands at {places}"
    assert ambiguous in result.text
    duplicate = "notebooks/two.py:2: WARNING: duplicate label 'twice', which stands at"
    assert f"{duplicate} notebooks/one.py:6 already" in result.text
    value = "notebooks/two.py:2: WARNING: duplicate value 'gap', which stands at"
    assert f"{value} notebooks/one.py:10 already" in result.text
    assert f"{page}:12: WARNING: remove-input and remove-output together" in result.text
    assert re.search(f"{page}:18: .*should be empty, 'true' or 'false', got 'maybe'", result.text)
    missing = f"{page}:21: WARNING: no value is named 'los-gap'; did you mean 'loss-gap'?"
    assert missing in result.text
    image = f"{site.top}/notebooks/two.py:7: WARNING: a cell that shows an image needs a line"
    assert f"{image} '#| alt: what the image shows'" in result.text
    assert result.code != 0


def test_warnings_in_a_notebook_name_its_line(site):
    site.notebook(
        "one",
        "# %% [markdown]\n# # Title\n#\n# A [bad link](nowhere.md).",
        "# %% [markdown]\n# ```{embed} #none\n# ```",
    )
    site.write("docs/index.md", "# Home\n\n```{toctree}\nnotebooks/one\n```\n")
    result = site.build("-q", builder="dummy")
    notebook = f"{site.top}/notebooks/one.py"
    assert f"{notebook}:4: WARNING: 'myst' cross-reference target not found" in result.text
    assert f"{notebook}:7: WARNING: no cell is labeled 'none'" in result.text


def test_other_builders(built):
    for builder in ("text", "latex"):  # one after the other: they share what was read
        result = built.site.build("-q", builder=builder)
        assert result.code == 0, result.text
    assert sorted(built.site.executions()) == ["first", "second"]
