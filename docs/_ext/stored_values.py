# SPDX-License-Identifier: Apache-2.0
"""The role `{num}`: a number in prose that a notebook computed.

A notebook stores it, already formatted:

    values(dpo_max_diff=f"{difference:.1e}")

and a page prints it: ``at most {num}`dpo-max-diff` apart``. The number links to the cell that
made it.
"""

from __future__ import annotations

from docutils import nodes
from embed import link_to_cell, nearest
from notebook_pages import executed, note_use
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole
from sphinx.util.typing import ExtensionMetadata

logger = logging.getLogger(__name__)


class StoredNumber(SphinxRole):
    """Print a value that a notebook stored."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Find the value."""
        name = self.text.strip()
        values = executed(self.env).values
        note_use(self.env, "value", name)
        found = values.get(name, [])
        if not found:
            return self.refuse(f"no value is named {name!r}; {nearest(name, list(values))}")
        if len(found) > 1:
            places = " and ".join(value.place for value in found)
            return self.refuse(f"value {name!r} is ambiguous, it is stored at {places}")
        value = found[0]
        link = link_to_cell(value.label, value.notebook, nodes.Text(value.text))
        link["classes"].append("stored-value")
        return [link], []

    def refuse(self, message: str) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Warn, naming the page and the line; warnings are errors in this project's builds."""
        logger.warning(message, location=self.get_location(), type="embed", subtype="value")
        return [], []


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.setup_extension("notebook_pages")
    app.add_role("num", StoredNumber())
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
