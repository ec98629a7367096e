# SPDX-License-Identifier: Apache-2.0
"""What a page makes a browser load, counted from the files."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup
from light_pages import draw_icons, icons, used_rules

LIMIT = 900_000  # bytes, uncompressed, on a first visit
HEAVY = 1_450_000  # the same, without figures, for the pages below
#: Pages above the limit: their formulas as HTML, the fonts of these, and SVG figures that draw
#: each point on its own.
THEORY = "advanced/algorithm-development/mathematical-foundations"
HEAVY_PAGES = {
    "advanced/algorithm-development/custom-dpo.html",
    "advanced/algorithm-development/hyperparameter-optimization.html",
    "advanced/algorithm-development/data-to-batch.html",
    f"{THEORY}/grpo.html",
    f"{THEORY}/kl-and-distillation.html",
    f"{THEORY}/policy-gradient.html",
    f"{THEORY}/ppo.html",
    f"{THEORY}/preferences.html",
    "advanced/performance/fused-kernels.html",
    "core-design/design-principles/loss-functions.html",
    "notebooks/hyperparameter_optimization.html",
    "notebooks/mathematical_foundations.html",
    "reference/api/custom.html",
    "reference/api/tuning.html",
}


def loaded_files(page: Path) -> set[Path]:
    """List what a page loads: itself, scripts, stylesheets and their fonts, images."""
    soup = BeautifulSoup(page.read_bytes(), "html.parser")
    links = [tag["src"] for tag in soup.select("script[src], img[src]")]
    links += [tag["href"] for tag in soup.select("link[rel=stylesheet], link[rel=icon]")]
    files = {page, *(local(page, link) for link in links)} - {None}
    for sheet in [file for file in files if file.suffix == ".css"]:
        text = sheet.read_text("utf-8")
        # A font of the theme's is loaded where an element asks for its family, which none does.
        fonts = re.findall(r"@font-face\s*\{[^}]*?url\([\"']?([^\"')]+)", text)
        files |= {local(sheet, font) for font in fonts} - {None}
    return files


def local(place: Path, link: str) -> Path | None:
    """Find the file that a link leads to, None for data in the link itself."""
    if link.startswith("data:"):
        return None
    return (place.parent / unquote(urlsplit(link).path)).resolve()


def test_no_page_of_the_site_loads_more_than_the_limit(project_html):
    heavy = {}
    for page in project_html.rglob("*.html"):
        if page.is_relative_to(project_html / "_static"):
            continue
        files = loaded_files(page)
        name = page.relative_to(project_html).as_posix()
        limit = LIMIT
        if name in HEAVY_PAGES:
            files = {file for file in files if file.suffix != ".svg"}
            limit = HEAVY
        total = sum(file.stat().st_size for file in files)
        if total > limit:
            heavy[name] = total
    assert heavy == {}


def test_an_ordinary_page_loads_no_search_index_and_no_icon_script(built):
    names = {file.name for file in loaded_files(built.site.html / "wide.html")}
    assert not names & {"searchindex.js", "searchtools.js", "language_data.js", "fontawesome.js"}
    assert {"mathjax.css", "MathJax_Main-Regular.woff", "MathJax_Math-Italic.woff"} <= names
    assert "MathJax_Fraktur-Regular.woff" not in names
    assert "mathjax.css" not in {f.name for f in loaded_files(built.site.html / "prompts.html")}


def test_the_search_page_loads_its_index_when_somebody_searches(built):
    names = {file.name for file in loaded_files(built.site.html / "search.html")}
    assert "section-search.js" in names and "search-sections.js" not in names
    assert not names & {"searchindex.js", "searchtools.js", "language_data.js"}
    assert (built.site.html / "_static/search-sections.js").is_file()


@pytest.mark.parametrize(
    ("css", "left"),
    [
        (".used{a:b}.not{c:d}", ".used{a:b}"),
        (".used,.not p{a:b}", ".used{a:b}"),
        ("p:not(.not){a:b}", "p:not(.not){a:b}"),
        (":is(.not,.used):before{a:b}", ":is(.not,.used):before{a:b}"),
        ("@media print{.not{a:b}.used{c:d}}", "@media print{.used{c:d}}"),
        ("@media print{.not{a:b}}p{c:d}", "p{c:d}"),
        ("@keyframes k{from{a:b}to{c:d}}", "@keyframes k{from{a:b}to{c:d}}"),
    ],
)
def test_rules_without_an_element_go(css, left):
    assert used_rules(css, {"used"}) == left


def test_icons_are_read_from_the_theme():
    script = '{bell:[448,512,[],"f0f3","M1 2z"],"x-y":[8,9,["house"],"f015",["M0z","M3 4z"]]}'
    known = icons(script)
    assert "viewBox='0 0 448 512'" in known["bell"]
    assert known["bell"] == known["f0f3"]
    assert "d='M3 4z'" in known["house"]
    css = draw_icons('html{--pst-icon-bell:"\uf0f3"}', known, {"fa-bell", "fa-unknown"})
    assert f"--pst-icon-bell:{known['bell']}" in css
    assert f".fa-bell{{--icon:{known['bell']}}}" in css
    assert "fa-unknown" not in css


def test_a_formula_that_cannot_be_read_is_a_warning_with_its_place(site):
    site.write("docs/index.md", "# Home\n\nWell\n\n$\\frac{a$\n")
    result = site.build()
    assert result.code == 1
    assert "docs/index.md" in result.text
    assert r"MathJax cannot read the formula '\\frac{a'" in result.text


def test_formulas_are_typeset_once(site):
    site.write("docs/index.md", "# Home\n\n$x^2$\n")
    assert "typesetting 1 formulas" in site.build().text
    site.write("docs/index.md", "# Home\n\n$x^2$ again, and $y_1$\n")
    second = site.build()
    assert second.code == 0, second.text
    assert "typesetting 1 formulas" in second.text
    assert second.page("index.html").select("annotation")[1].get_text() == "y_1"
    site.write("docs/index.md", "# Home\n\n$y_1$ alone\n")
    assert "typesetting" not in site.build().text
