# SPDX-License-Identifier: Apache-2.0
"""A build that failed on warnings fails again until they are mended.

Sphinx warns while it reads a page, and reads a page again only when it changed. So with
warnings as errors a first build fails and a second one, with nothing mended, passes. Here a
failed build leaves no memory of the pages it read, and the next one reads them all.
"""

from __future__ import annotations

from sphinx.application import ENV_PICKLE_FILENAME, Sphinx
from sphinx.util.typing import ExtensionMetadata


def forget_failed_build(app: Sphinx, exception: Exception | None) -> None:
    """Remove the saved environment after warnings, where warnings are errors."""
    if exception is None and app._warncount and app._fail_on_warnings:
        (app.doctreedir / ENV_PICKLE_FILENAME).unlink(missing_ok=True)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.connect("build-finished", forget_failed_build, priority=999)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
