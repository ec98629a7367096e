# SPDX-License-Identifier: Apache-2.0
"""MathJax from our own site, so that equations need no other host.

The files come from the installed package `sphinx-mathjax-offline` (MathJax 3.2.2). Its own
extension would copy every build of MathJax into the site, 24 MB. A page loads one of them and its
fonts; the other folders are for what a reader may choose in MathJax's menu (speech, another
renderer), which is loaded when it is chosen.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ConfigError
from sphinx.util.fileutil import copy_asset
from sphinx.util.typing import ExtensionMetadata

PACKAGE = "sphinx-mathjax-offline"
SCRIPT = "tex-chtml-full.js"
NEEDED = (SCRIPT, "a11y", "input", "output", "sre", "ui")


def mathjax_folder() -> Path:
    """Find the installed MathJax files.

    Raises:
        ConfigError: the package is not installed or holds no MathJax.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the package {PACKAGE!r} is not installed; see requirements.txt")
    folder = Path(spec.origin).parent / "static" / "mathjax"
    if not (folder / SCRIPT).is_file():
        raise ConfigError(f"the package {PACKAGE!r} has no {SCRIPT} in {folder}")
    return folder


def point_to_own_files(app: Sphinx, config: Config) -> None:
    """Make pages load MathJax from `_static`."""
    config.mathjax_path = f"mathjax/{SCRIPT}"
    config.mathjax3_config = {"chtml": {"mtextInheritFont": True}} | (config.mathjax3_config or {})


def copy_files(app: Sphinx, exception: Exception | None) -> None:
    """Copy the files that a page may ask for, once per output folder."""
    if exception is not None or app.builder.format != "html":
        return
    source, target = mathjax_folder(), Path(app.outdir) / "_static" / "mathjax"
    for name in NEEDED:
        if not (target / name).exists():
            copy_asset(source / name, (target / name) if (source / name).is_dir() else target)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.setup_extension("sphinx.ext.mathjax")
    app.connect("config-inited", point_to_own_files)
    app.connect("build-finished", copy_files)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
