# SPDX-License-Identifier: Apache-2.0
"""Search by section: an index of every section of the site, read by section-search.js.

Written as a script, `_static/search-sections.js`, so that it can be loaded from a folder as from a
server, and only when somebody searches. `docs/search_words.toml` has the words that people use for what
a page or a section says in others. Words are reduced to stems as Sphinx does, in Python here and by
Sphinx's own stemmer in the browser, after British spelling is turned into American.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import ENV_PICKLE_FILENAME, Sphinx
from sphinx.search.en import SearchEnglish
from sphinx.util.typing import ExtensionMetadata

INDEX = "_static/search-sections.js"
WORDS = "docs/search_words.toml"
EXCERPT = 150
#: How much a place of a page counts: what people call it, its own heading, those above, its text.
WEIGHTS = {"words": 14.0, "title": 9.0, "above": 2.5, "text": 1.0}
#: Guides come before the reference, that before API members, those before notebooks.
KINDS = (
    ("notebooks/", "notebook", 0.45),
    ("reference/api/", "API", 0.6),
    ("reference/", "reference", 0.8),
)
GUIDE = ("guide", 1.0)
#: British endings and their American ones, also in section-search.js.
AMERICAN = (
    (r"isation", "ization"), (r"is(e|ed|es|er|ing)\b", r"iz\1"), (r"yse(d|s)?\b", r"yze\1"),
    (r"our(s|ed|ing|able|al)?\b", r"or\1"), (r"lled\b", "led"), (r"lling\b", "ling"), (r"tre\b", "ter"),
)  # fmt: skip
WORD = re.compile(r"[a-zα-ωA-ZΑ-Ω0-9]+(?:[_.][a-zA-Z0-9]+)*")
_ENGLISH = SearchEnglish({})


@dataclass
class Entry:
    """A section, or a member of the API.

    Attributes:
        page: The page's address from the top.
        anchor: The id on it; empty for the page's first section.
        title: Its heading.
        above: The headings above it, the page's first.
        text: What it says, without what its subsections say.
        words: What people call it.
    """

    page: str
    anchor: str
    title: str
    above: list[str]
    text: str = ""
    words: str = ""
    kind: tuple[str, float] = field(default=GUIDE)


@cache
def stem(word: str) -> str:
    """Reduce a word to its stem, in American spelling."""
    word = word.lower()
    for british, american in AMERICAN:
        word = re.sub(british, american, word)
    return _ENGLISH.stem(word)


def stems(text: str) -> Iterator[str]:
    """List the stems of a text; of ``dpo.sft_loss_weight`` the whole and its parts."""
    for word in WORD.findall(text):
        parts = re.split(r"[_.]", word)
        if len(parts) > 1:
            yield word.lower()
        for part in parts:
            if part.lower() not in _ENGLISH.stopwords:
                yield stem(part)


def kind_of(page: str) -> tuple[str, float]:
    """Say what a page is, and how much a hit on it counts."""
    return next(((name, weight) for top, name, weight in KINDS if page.startswith(top)), GUIDE)


def text_of(section: nodes.Element) -> str:
    """Collect what a section says to a reader, without subsections, code and formulas."""
    parts: list[str] = []

    def collect(node: nodes.Node) -> None:
        if isinstance(node, nodes.section | addnodes.desc | nodes.math_block | nodes.raw):
            return
        if isinstance(node, nodes.literal_block | nodes.math | nodes.title | nodes.comment):
            return
        if isinstance(node, nodes.TextElement):
            shown = node.deepcopy()
            for formula in list(shown.findall(nodes.math)):
                formula.parent.remove(formula)
            parts.append(shown.astext())
            return
        for child in node.children:
            collect(child)

    for child in section.children:
        collect(child)
    return " ".join(" ".join(parts).split())


def entries_of(page: str, doctree: nodes.document) -> Iterator[Entry]:
    """List the sections of a page, and the members that it describes."""
    kind = kind_of(page)

    def walk(node: nodes.Element, above: list[str]) -> Iterator[Entry]:
        for child in node.children:
            if isinstance(child, nodes.section):
                heading = child.next_node(nodes.title)
                title = heading.astext() if heading is not None else ""
                anchor = child["ids"][0] if above else ""
                yield Entry(page, anchor, title, above, text_of(child), kind=kind)
                yield from walk(child, [*above, title])
            elif isinstance(child, addnodes.desc):
                signature = child.next_node(addnodes.desc_signature)
                if signature is not None and signature["ids"]:
                    name = signature.get("fullname") or signature["ids"][0]
                    content = child.next_node(addnodes.desc_content)
                    text = text_of(content) if content is not None else ""
                    yield Entry(page, signature["ids"][0], name, above, text, kind=kind)
            elif isinstance(child, nodes.Element):
                yield from walk(child, above)

    yield from walk(doctree, [])


def make_index(entries: list[Entry]) -> dict[str, Any]:
    """Weigh every stem in every section: BM25 over weighted places.

    Returns:
        ``sections``, each a list of page, anchor, title, page's title, kind and excerpt; ``terms``, by
        stem a flat list of section and weight.
    """
    counts: list[dict[str, float]] = []
    for entry in entries:
        found: dict[str, float] = defaultdict(float)
        for place, weight in WEIGHTS.items():
            text = " ".join(entry.above) if place == "above" else getattr(entry, place)
            for word, count in Counter(stems(text)).items():
                found[word] += weight * (1 + math.log(count))
        counts.append(found)
    documents = Counter(word for found in counts for word in found)
    length = [max(1, len(entry.text.split())) for entry in entries]
    mean = sum(length) / len(length)
    terms: dict[str, list[int]] = defaultdict(list)
    for number, found in enumerate(counts):
        for word, weight in found.items():
            rare = math.log(1 + (len(entries) - documents[word] + 0.5) / (documents[word] + 0.5))
            saturated = weight * 2.2 / (weight + 1.2 * (0.6 + 0.4 * length[number] / mean))
            boost = 1 + 0.12 * min(weight, 20)  # a heading counts beyond what a text can reach
            score = round(20 * rare * saturated * boost * entries[number].kind[1])
            if score > 0:
                terms[word] += [number, score]
    return {
        "sections": [
            [e.page, e.anchor, e.title, e.above[0] if e.above else "", e.kind[0], excerpt(e.text)]
            for e in entries
        ],
        "terms": dict(sorted(terms.items())),
        "stopwords": sorted(_ENGLISH.stopwords),
        "american": [[british, american.replace("\\", "$")] for british, american in AMERICAN],
    }


def excerpt(text: str) -> str:
    """Cut a text for the list of hits, at a word."""
    return text if len(text) <= EXCERPT else text[:EXCERPT].rpartition(" ")[0] + " …"


def all_entries(app: Sphinx) -> list[Entry]:
    """List the sections of all pages, with what people call them.

    Raises:
        ValueError: `docs/search_words.toml` names a section that is not there.
    """
    file = Path(app.srcdir, WORDS)
    words = tomllib.loads(file.read_text("utf-8")) if file.is_file() else {}
    entries = []
    for page in sorted(app.env.found_docs):
        entries += entries_of(page, app.env.get_doctree(page))
    for place, names in words.items():
        page, _, anchor = place.partition("#")
        entry = next((e for e in entries if (e.page, e.anchor) == (page, anchor)), None)
        if entry is None:
            known = [f"{e.page}#{e.anchor}" for e in entries if e.page == page]
            raise ValueError(f"{WORDS}: no section {place!r}; of that page: {', '.join(known)}")
        entry.words = " ".join(names)
    return entries


def is_current(app: Sphinx) -> bool:
    """Say whether the index is newer than the pages as they were read, and all else it is made of."""
    index = Path(app.outdir, INDEX)
    made_of = (Path(app.doctreedir, ENV_PICKLE_FILENAME), Path(app.srcdir, WORDS), Path(__file__))
    newest = max(path.stat().st_mtime for path in made_of if path.is_file())
    return index.is_file() and index.stat().st_mtime > newest


def write_index(app: Sphinx, error: Exception | None) -> None:
    """Write the index into the site, when it is built and a page has changed."""
    if error is None and app.builder.format == "html" and not is_current(app):
        index = make_index(all_entries(app))
        text = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
        Path(app.outdir, INDEX).write_text(f"window.searchSections = {text};\n", "utf-8")


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.connect("build-finished", write_index)
    app.add_js_file("section-search.js", loading_method="defer")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
