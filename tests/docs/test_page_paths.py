# SPDX-License-Identifier: Apache-2.0
"""Addresses of pages: no `docs/` in them, and everything that names a page or file agrees."""

import json
from pathlib import PurePosixPath

import pytest
from page_paths import docname_of


@pytest.mark.parametrize(
    ("path", "docname"),
    [
        ("docs/index.md", "index"),
        ("docs/advanced/index.md", "advanced/index"),
        ("docs/reference/api/algorithms.loss.md", "reference/api/algorithms.loss"),
        ("notebooks/custom_dpo.py", "notebooks/custom_dpo"),
        ("docs/_ext/embed.py", None),
        ("docs/_ext/README.md", None),
        ("docs/_draft.md", None),
        ("docs/figure.png", None),
        ("notebooks/data/make.py", None),
        ("notebooks/README.md", None),
        ("README.md", None),
        ("nemo_rl_ref/logprobs.py", None),
        (".venv/lib/python3.11/site-packages/docs/index.md", None),
    ],
)
def test_names_of_pages(path, docname):
    assert docname_of(PurePosixPath(path)) == docname


def test_built_addresses(built):
    pages = {p.relative_to(built.site.html).as_posix() for p in built.site.html.rglob("*.html")}
    ours = {"index.html", "deep/index.html", "deep/down/losses.html"}
    assert ours | {"notebooks/first.html", "notebooks/second.html"} <= pages
    assert not [page for page in pages if page.startswith("docs/")]
    assert not {"README.html", "venv/pkg/readme.html"} & pages  # beside the sources, not read


def test_links_between_folders(built):
    def targets(page):
        return {a["href"] for a in built.page(page).select("article a.reference.internal")}

    assert {"deep/down/losses.html", "notebooks/first.html"} <= targets("index.html")
    assert "notebooks/first.html#picture" in targets("index.html")
    assert {"../index.html", "../../notebooks/second.html"} <= targets("deep/down/losses.html")
    assert "../deep/down/losses.html" in targets("notebooks/first.html")


def test_every_internal_link_has_a_target(built):
    for page in built.site.html.rglob("*.html"):
        name = page.relative_to(built.site.html).as_posix()
        for link in built.page(name).select("article a[href]"):
            path, _, anchor = link["href"].partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), f"{name} links to {link['href']}"
            if anchor and target.suffix == ".html":
                at = built.page(target.relative_to(built.site.html.resolve()).as_posix())
                assert at.find(id=anchor), f"{name} links to {link['href']}"


def test_files_beside_a_page_and_from_the_top(built):
    page = built.page("deep/down/losses.html")
    listings = [block.get_text() for block in page.select("article div.highlight")]
    assert any("NUMBER = 17" in text for text in listings)
    assert any("a listing beside the page" in text for text in listings)
    image = page.find("img", alt="a dot")
    assert built.site.html.joinpath("deep/down", image["src"]).is_file()


def test_search_index_has_the_same_names(built):
    text = built.site.html.joinpath("searchindex.js").read_text("utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    assert "deep/down/losses" in index["docnames"]
    assert not [name for name in index["docnames"] if name.startswith("docs/")]
    assert index["docnames"][index["terms"]["wombat"]] == "deep/down/losses"


def test_a_description_in_front_matter_becomes_a_meta_tag(built):
    home = built.page("index.html")
    assert home.find("meta", attrs={"name": "description"})["content"] == 'A "test" site & more'


def test_two_files_for_one_page_are_refused(site):
    site.write("docs/notebooks/same.md", "# Page\n")
    site.write("notebooks/same.py", "# %% [markdown]\n# # Notebook\n")
    site.write("docs/index.md", "# Home\n\n```{toctree}\nnotebooks/same\n```\n")
    result = site.build(builder="dummy")
    assert result.code != 0
    assert "docs/notebooks/same.md and notebooks/same.py are both the page" in result.text
