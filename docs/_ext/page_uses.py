# SPDX-License-Identifier: Apache-2.0
"""What each page took from elsewhere; a page is read again when that is different now.

Sphinx reads a page again when its file changed. A page here also shows what notebooks and checks
of equations computed. An extension that hands out such things says, with `offer`, how to describe
one of a kind, and notes with `note_use` that the page being read took it. What a page took is kept
as a fingerprint and compared at the next build.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.typing import ExtensionMetadata

#: By kind, what describes a thing of that name in this build, as JSON data.
OFFERED: dict[str, Callable[[str], Any]] = {}


def offer(kind: str, describe: Callable[[str], Any]) -> None:
    """Say how a thing of a kind is described, given its name."""
    OFFERED[kind] = describe


def fingerprint(kind: str, name: str) -> str:
    """Say in short what a page that takes this thing gets."""
    text = json.dumps(OFFERED[kind](name), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def uses(env: BuildEnvironment) -> dict[str, dict[tuple[str, str], str]]:
    """Return what each page took: (kind, name) and the fingerprint at that time."""
    return vars(env).setdefault("page_uses", {})


def note_use(env: BuildEnvironment, kind: str, name: str) -> None:
    """Remember that the page being read took something."""
    uses(env).setdefault(env.docname, {})[kind, name] = fingerprint(kind, name)


def outdated_pages(
    app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]
) -> list[str]:
    """List the pages that took something which is different now."""
    return [
        page
        for page, taken in uses(env).items()
        if any(fingerprint(kind, name) != was for (kind, name), was in taken.items())
    ]


def forget_page(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    """Drop what a page took, before it is read again."""
    uses(env).pop(docname, None)


def merge_pages(
    app: Sphinx, env: BuildEnvironment, docnames: Iterable[str], other: BuildEnvironment
) -> None:
    """Take over what a parallel reader noted."""
    for docname in docnames:
        if docname in uses(other):
            uses(env)[docname] = uses(other)[docname]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.connect("env-get-outdated", outdated_pages)
    app.connect("env-purge-doc", forget_page)
    app.connect("env-merge-info", merge_pages)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
