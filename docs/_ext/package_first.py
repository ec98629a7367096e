# SPDX-License-Identifier: Apache-2.0
"""Import the whole package before autodoc imports parts of it.

Autodoc turns on `typing.TYPE_CHECKING` while it imports. A pydantic class that is first imported
then sees types that are there for type checkers only, and fails. Nothing is imported in a build
that reads no page.
"""

from __future__ import annotations

import importlib

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.typing import ExtensionMetadata

MODULES = (
    "nemo_rl_ref.algorithms.loss",
    "nemo_rl_ref.algorithms.advantage_estimator",
    "nemo_rl_ref.algorithms.grpo",
    "nemo_rl_ref.algorithms.ppo",
    "nemo_rl_ref.rl.settings",
)


def import_package(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Import what holds pydantic classes, if there are API pages to read."""
    if any(name.startswith("reference/api/") for name in docnames):
        for module in MODULES:
            importlib.import_module(module)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.connect("env-before-read-docs", import_package)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
