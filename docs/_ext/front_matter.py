# SPDX-License-Identifier: Apache-2.0
"""Front matter for search engines: a page's `description` and `tags` become meta tags."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata


def as_list(value: Any) -> list[str]:
    """Read a front matter list, which MyST hands on as the text of a JSON list."""
    items = json.loads(value) if isinstance(value, str) else value
    return [str(item) for item in items]


def add_meta_tags(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Write the meta tags of one page."""
    matter = app.env.metadata.get(page, {})
    tags = {"description": matter.get("description")}
    if matter.get("tags"):
        tags["keywords"] = ", ".join(as_list(matter["tags"]))
    for name, text in tags.items():
        if text:
            meta = f'<meta name="{name}" content="{escape(text)}" />\n'
            context["metatags"] = context.get("metatags", "") + meta


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.connect("html-page-context", add_meta_tags)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
