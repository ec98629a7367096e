# SPDX-License-Identifier: Apache-2.0
"""Buttons that copy a loss, complete: with its bases and helpers, for NeMo RL and for this project.

    {copy-loss}`nemo_rl_ref.custom.pairwise.IPOLossFn`

Every class of `nemo_rl_ref.custom` also has them at the end of its entry in the API reference. The
text is made by `nemo_rl_ref.export.slice` from the file, which is not imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from embed import copy_button
from listings import SLICING_CODE
from page_uses import note_use, offer
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.typing import ExtensionMetadata

from nemo_rl_ref.export.slice import NotAlone, whole_class

logger = logging.getLogger(__name__)

TOP = Path(__file__).parents[2]
FOLDER = "nemo_rl_ref.custom."
PREFIXES = ("nemo_rl", "nemo_rl_ref")


def source_of(name: str, prefix: str = "nemo_rl_ref") -> str:
    """Return a class by its full name as a text that runs alone.

    Raises:
        NotAlone: there is no such class.
    """
    path = file_of(name)
    if not path.is_file():
        raise NotAlone(f"{name}: there is no module {name.rpartition('.')[0]}")
    return whole_class(path.read_text(encoding="utf-8"), name.rpartition(".")[2], prefix)


def file_of(name: str) -> Path:
    """Return the file that a class by its full name is in."""
    return TOP / f"{name.rpartition('.')[0].replace('.', '/')}.py"


def stands_on(name: str) -> list[str]:
    """Return what decides about the text, without making it: the file, and how it is cut."""
    path = file_of(name)
    return [SLICING_CODE, path.read_text(encoding="utf-8") if path.is_file() else ""]


def buttons(name: str, says: str) -> str:
    """Return the HTML of a button for each prefix, after a few words."""
    both = " ".join(copy_button(prefix, source_of(name, prefix)) for prefix in PREFIXES)
    return f'<span class="copy-loss">{says} {both}</span>'


class CopyLoss(SphinxRole):
    """The buttons in a line of text or a cell of a table."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Make the buttons, or warn."""
        note_use(self.env, "loss", self.text)
        try:
            return [nodes.raw("", buttons(self.text, "copy for"), format="html")], []
        except NotAlone as why:
            logger.warning("copy-loss: %s", why, location=self.get_location(), type="embed")
            return [], []


class CopyLossLine(SphinxDirective):
    """The buttons as a paragraph, in a class's entry."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Make the buttons."""
        note_use(self.env, "loss", self.arguments[0])
        html = buttons(self.arguments[0], "Copy the whole loss, written for")
        return [nodes.raw("", f"<p>{html}</p>", format="html")]


def add_to_entry(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Add the buttons to a class's docstring."""
    if what == "class" and name.startswith(FOLDER):
        lines += ["", f".. copy-loss:: {name}", ""]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.setup_extension("embed")
    app.setup_extension("sphinx.ext.autodoc")
    offer("loss", stands_on)
    app.add_role("copy-loss", CopyLoss())
    app.add_directive("copy-loss", CopyLossLine)
    app.connect("autodoc-process-docstring", add_to_entry, priority=900)  # after Napoleon
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
