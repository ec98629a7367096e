# SPDX-License-Identifier: Apache-2.0
"""Glossary terms become links where a page uses them first.

A page's first mention of each term of `{glossary}` in running text is linked, in lower case or
at the beginning of a sentence, in the singular or with an s, and shows its definition when pointed at.
Terms that are everyday words are not. Headings, links, code, formulas,
citations and captions are left alone, and so are the pages of PLAIN.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import ExtensionMetadata

GLOSSARY = "reference/glossary"
#: Pages without such links: the glossary, lists, the API, the page that stands word for word.
PLAIN = re.compile(r"index$|.*/index$|reference/|notebooks/|genindex|search")
#: Filled when the first page is written.
DEFINITIONS: dict[str, str] = {}
#: Text inside these is not running text.
CLOSED = (
    nodes.reference,
    nodes.literal,
    nodes.math,
    nodes.title,
    nodes.caption,
    nodes.raw,
    nodes.term,
    nodes.literal_block,
    addnodes.pending_xref,
    addnodes.desc,
)
#: Terms that are words of everyday language, too, or verbs: a pattern cannot tell which is meant.
EVERYDAY = {
    "answer", "bias", "chosen", "group", "prefix", "prompt", "rejected", "return", "reward", "score",
    "student", "teacher", "temperature", "token",
}  # fmt: skip
CLOSED_CLASSES = {"cell", "equation-note", "notebook-links", "embedded-from", "sd-card"}


def pattern(terms: list[str]) -> re.Pattern[str]:
    """Match any of the terms as whole words, the longest first."""
    ordered = sorted(terms, key=len, reverse=True)
    words = "|".join(re.escape(term).replace(r"\ ", r"\s+") for term in ordered)
    return re.compile(rf"(?<![\w-])({words})(?:e?s)?(?![\w-])", re.IGNORECASE)


def is_open(text: nodes.Text) -> bool:
    """Say whether a piece of text is running text."""
    node: Any = text.parent
    found_paragraph = False
    while node is not None:
        if isinstance(node, CLOSED):
            return False
        if CLOSED_CLASSES & set(getattr(node, "attributes", {}).get("classes", [])):
            return False
        found_paragraph = found_paragraph or isinstance(node, nodes.paragraph)
        node = node.parent
    return found_paragraph


def definitions(app: Sphinx) -> dict[str, str]:
    """What the glossary says of each term, as plain text; kept for the pages to come."""
    if not DEFINITIONS:
        for said in app.env.get_doctree(GLOSSARY).findall(nodes.definition):
            for term in said.parent.findall(nodes.term):
                DEFINITIONS[term.astext().lower()] = " ".join(said.astext().split())
    return DEFINITIONS


def link_terms(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Link the first use of each term on a page."""
    if app.builder.format != "html" or PLAIN.match(docname):
        return
    objects = app.env.domaindata["std"]["objects"].items()
    terms = {
        name.lower(): node_id
        for (kind, name), (page, node_id) in objects
        if kind == "term" and page == GLOSSARY and name.lower() not in EVERYDAY
    }
    if not terms:
        return
    words = pattern(list(terms))
    meanings = definitions(app)
    for text in [text for text in doctree.findall(nodes.Text) if is_open(text)]:
        content, done = text.astext(), 0
        pieces: list[nodes.Node] = []
        for match in words.finditer(content):
            term = re.sub(r"\s+", " ", match[1].lower())
            node_id = terms.get(term)
            if node_id is None:  # linked already
                continue
            terms[term] = None
            inner = nodes.Text(match[0])
            link = make_refnode(
                app.builder, docname, GLOSSARY, node_id, inner, meanings.get(term, term)
            )
            link["classes"].append("term")
            pieces += [nodes.Text(content[done : match.start()]), link]
            done = match.end()
        place = text.parent.index(text)
        text.parent[place : place + 1] = [*pieces, nodes.Text(content[done:])]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.connect("builder-inited", lambda app: DEFINITIONS.clear())
    app.connect("doctree-resolved", link_terms)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
