# SPDX-License-Identifier: Apache-2.0
"""What a page takes from notebooks: a cell with the directive `{embed}`, a number with `{num}`.

    ```{embed} #dpo-curve
    :remove-input:
    ```

takes the code cell whose first line is `#| label: dpo-curve`, in whichever notebook it stands.
`remove-input` leaves out its code, `remove-output` its outputs. The cell is drawn by MyST-NB,
as on the notebook's own page, and links back to it. Code that is shown says whether it runs alone;
if not, a button copies it with what it needs (`listings.py`).

    The two curves are at most {num}`dpo-max-diff` apart.

prints the value that a cell stored with `#| num: dpo-max-diff = {difference:.1e}`. The number
links to the cell that made it.
"""

from __future__ import annotations

import difflib
from html import escape
from typing import Any, ClassVar

import nbformat
from docutils import nodes
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode
from myst_nb.core.execute import NotebookClientBase
from myst_nb.core.loggers import SphinxDocLogger
from myst_nb.core.render import load_renderer
from myst_nb.sphinx_ import SphinxNbRenderer
from myst_parser.parsers.mdit import create_md_parser
from notebook_cells import VALUES_MIME, LabelledCell
from notebook_pages import EXECUTED, prepared_cell
from page_uses import note_use, offer
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.typing import ExtensionMetadata

logger = logging.getLogger(__name__)


def nearest(name: str, known: list[str]) -> str:
    """Suggest what a name that is not known may have meant."""
    if not known:
        return "there is none in any notebook"
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(known))}"


def switch(argument: str | None) -> bool:
    """Read an option that is on when it is there: empty, 'true' or 'false'."""
    match (argument or "true").strip().lower():
        case "true":
            return True
        case "false":
            return False
    raise ValueError(f"should be empty, 'true' or 'false', got {argument!r}")


def draw_cell(
    cell: LabelledCell, document: nodes.document, line: int, hidden_tags: list[str]
) -> list[nodes.Node]:
    """Draw a cell with MyST-NB's own renderer.

    Args:
        cell: the cell.
        document: the page that is being read.
        line: the page's line that warnings are to name.
        hidden_tags: MyST-NB's tags that hide a part, 'remove-input' or 'remove-output'.
    """
    env = document.settings.env
    # Stored values are printed by the page's sentences; the notebook's page lists them.
    outputs = [o for o in cell.cell["outputs"] if VALUES_MIME not in o.get("data", {})]
    shown = prepared_cell(cell.cell | {"outputs": outputs})
    tags = [*shown["metadata"].get("tags", []), *hidden_tags]
    shown = shown | {"metadata": shown["metadata"] | {"tags": tags}}
    notebook = nbformat.from_dict(
        {
            "cells": [shown],
            "metadata": {"language_info": {"name": "python", "pygments_lexer": "ipython3"}},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
    )
    log = SphinxDocLogger(document)
    parser = create_md_parser(env.myst_config, SphinxNbRenderer)
    renderer: Any = parser.renderer
    place = nodes.container()
    parser.options["document"] = document
    parser.options["current_node"] = place
    parser.options["nb_config"] = env.mystnb_config
    parser.options["nb_client"] = NotebookClientBase(notebook, None, env.mystnb_config, log)
    renderer.setup_render(parser.options, {})
    token = Token("nb_cell_code", "code", 0, content=shown["source"], map=[line, line])
    token.meta = {"index": 0, "metadata": shown["metadata"]}
    before = document.attributes.get("nb_renderer")
    document.attributes["nb_renderer"] = load_renderer(env.mystnb_config.render_plugin)(
        renderer, log
    )
    try:
        renderer.render_nb_cell_code(SyntaxTreeNode([token], create_root=False))
    finally:
        document.attributes.pop("nb_renderer")
        if before is not None:
            document.attributes["nb_renderer"] = before
    return place.children


def copy_button(label: str, text: str) -> str:
    """Return the HTML of a button that copies a text, and says in a tooltip how long it is."""
    lines = text.count("\n")
    return (
        f'<button type="button" class="copy-text" title="{lines} lines" data-clipboard-text='
        f'"{escape(text).replace(chr(10), "&#10;")}">{escape(label)}</button>'
        '<span class="copy-done" role="status"></span>'
    )


def link_to_cell(cell_label: str | None, notebook: str, *content: nodes.Node) -> nodes.Node:
    """Link to a labeled cell on its notebook's page, or to the page where it has no label."""
    inner = nodes.inline("", "", *content)
    if cell_label is None:
        kind, target = "doc", f"/notebooks/{notebook}"
    else:
        kind, target = "ref", cell_label
    return addnodes.pending_xref(
        "", inner, refdomain="std", reftype=kind, reftarget=target, refexplicit=True, refwarn=True
    )


class Embed(SphinxDirective):
    """Put a labeled notebook cell into the page."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {"remove-input": switch, "remove-output": switch}

    def run(self) -> list[nodes.Node]:
        """Find the cell and draw it."""
        argument = self.arguments[0].strip()
        if not argument.startswith("#"):
            return self.refuse(f"embed takes a label, written '#label', got {argument!r}")
        label = argument[1:]
        labels = EXECUTED.labels
        note_use(self.env, "cell", label)
        found = labels.get(label, [])
        if not found:
            return self.refuse(f"no cell is labeled {label!r}; {nearest(label, list(labels))}")
        if len(found) > 1:
            places = " and ".join(cell.place for cell in found)
            return self.refuse(f"label {label!r} is ambiguous, it stands at {places}")
        cell = found[0]
        hidden = [name for name, on in self.options.items() if on]
        if len(hidden) == 2:
            return self.refuse("remove-input and remove-output together leave nothing of the cell")
        content = draw_cell(cell, self.state.document, self.lineno, hidden)
        if "remove-input" not in hidden:
            content = [*self.copy_note(label), *content]
        text = nodes.Text(f"from notebooks/{cell.notebook}")
        link: Any = link_to_cell(label, cell.notebook, text)
        self.set_source_info(link)
        origin = nodes.paragraph("", "", link, classes=["embedded-from"])
        return [nodes.container("", *content, origin, classes=["embedded-cell"])]

    def copy_note(self, label: str) -> list[nodes.Node]:
        """Say that the listing runs alone, or offer it with what it needs."""
        note_use(self.env, "listing", label)
        listing = EXECUTED.listing(label)
        if listing is None:  # not plain Python
            return []
        if listing.missing:
            names = ", ".join(sorted(listing.missing))
            return self.refuse(
                f"the listing {label!r} uses names that no cell above binds: {names}"
            )
        if listing.alone:
            html = "<span>runs alone</span>"
        else:
            html = copy_button("copy with what it needs", listing.text)
        return [nodes.raw("", f'<p class="listing-copy">{html}</p>', format="html")]

    def refuse(self, message: str) -> list[nodes.Node]:
        """Warn, naming the page and the line; warnings are errors in this project's builds."""
        logger.warning(message, location=self.get_location(), type="embed", subtype="label")
        return []


class StoredNumber(SphinxRole):
    """Print a value that a notebook stored."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Find the value."""
        name = self.text.strip()
        note_use(self.env, "value", name)
        found = EXECUTED.values.get(name, [])
        if not found:
            known = list(EXECUTED.values)
            return self.refuse(f"no value is named {name!r}; {nearest(name, known)}")
        if len(found) > 1:
            places = " and ".join(value.place for value in found)
            return self.refuse(f"value {name!r} is ambiguous, it is stored at {places}")
        value = found[0]
        link: Any = link_to_cell(value.label, value.notebook, nodes.Text(value.text))
        link["classes"].append("stored-value")
        return [link], []

    def refuse(self, message: str) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Warn, naming the page and the line; warnings are errors in this project's builds."""
        logger.warning(message, location=self.get_location(), type="embed", subtype="value")
        return [], []


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.setup_extension("notebook_pages")
    app.add_js_file("copy_text.js", loading_method="defer")
    offer("listing", EXECUTED.listing_stands_on)
    offer("cell", lambda name: [[c.notebook, c.cell] for c in EXECUTED.labels.get(name, [])])
    offer(
        "value", lambda name: [[v.notebook, v.text, v.label] for v in EXECUTED.values.get(name, [])]
    )
    app.add_directive("embed", Embed)
    app.add_role("num", StoredNumber())
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
