# SPDX-License-Identifier: Apache-2.0
"""Glossary terms become links where a page uses them first.

A page's first mention of each term of `{glossary}` in running text is linked, in lower case or
at the beginning of a sentence, in the singular or with an s. Headings, links, code, formulas,
citations and captions are left alone, and so are the pages of PLAIN.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import ExtensionMetadata

GLOSSARY = "reference/glossary"
#: Pages without such links: the glossary, lists, the API, the page that stands word for word.
PLAIN = re.compile(r"index$|.*/index$|reference/|notebooks/|genindex|search")
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


class GlossaryLinks(SphinxPostTransform):
    """Link the first use of each term."""

    default_priority = 600
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Walk over the page's text."""
        if PLAIN.match(self.env.docname):
            return
        terms = self.terms()
        if not terms:
            return
        words = pattern(list(terms))
        used: set[str] = set()
        for text in list(self.document.findall(nodes.Text)):
            if is_open(text):
                pieces = self.linked(text, words, terms, used)
                place = text.parent.index(text)
                text.parent[place : place + 1] = pieces

    def terms(self) -> dict[str, str]:
        """Return the id of each term of the glossary, by the term in lower case."""
        objects = self.env.domaindata["std"]["objects"]
        return {
            name.lower(): node_id
            for (kind, name), (docname, node_id) in objects.items()
            if kind == "term" and docname == GLOSSARY
        }

    def linked(
        self, text: nodes.Text, words: re.Pattern[str], terms: dict[str, str], used: set[str]
    ) -> list[nodes.Node]:
        """Split a piece of text at terms that were not used yet, and link those."""
        content = text.astext()
        pieces: list[nodes.Node] = []
        done = 0
        for match in words.finditer(content):
            term = re.sub(r"\s+", " ", match[1].lower())
            node_id = terms[term]
            if node_id in used:
                continue
            used.add(node_id)
            if match.start() > done:
                pieces.append(nodes.Text(content[done : match.start()]))
            builder = self.env._app.builder
            inner = nodes.Text(match[0])
            link = make_refnode(builder, self.env.docname, GLOSSARY, node_id, inner, term)
            link["classes"].append("term")
            pieces.append(link)
            done = match.end()
        return [*pieces, nodes.Text(content[done:])]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.add_post_transform(GlossaryLinks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
