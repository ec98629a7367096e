# SPDX-License-Identifier: Apache-2.0
"""The package's source files for viewcode, read from disk.

Left alone, viewcode imports the packages above a module to find its file, in every build, and
importing torch takes longer than all the rest of a build in which nothing changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.typing import ExtensionMetadata


def find_source(app: Sphinx, module: str) -> tuple[str, dict[str, Any]] | None:
    """Return a module's text and where in it each name is defined, or None for other modules."""
    path = Path(app.srcdir).joinpath(*module.split("."))
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            return text, ModuleAnalyzer.for_string(text, module).find_tags()
    return None


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.setup_extension("sphinx.ext.viewcode")
    app.connect("viewcode-find-source", find_source)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
