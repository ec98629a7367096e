# SPDX-License-Identifier: Apache-2.0
"""One build of a folder at a time: a second one waits until the first has ended, and says so.

Builds share what they leave below `_build`: executed notebooks, results of checks, pages that were
read. The lock is held from before Sphinx looks at any of it until the process ends, however it ends.
"""

from __future__ import annotations

import atexit
from pathlib import Path

from execution import hold
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging
from sphinx.util.typing import ExtensionMetadata

logger = logging.getLogger(__name__)


def begin(app: Sphinx, config: Config) -> None:
    """Hold the lock; when the process ends, forget the pages of a build that failed.

    Of pages read in a failed build Sphinx would remember the pages and not the warnings.
    """
    hold(Path(app.outdir).parent / "notebooks", logger.info)
    pages = Path(app.doctreedir, "environment.pickle")
    atexit.register(lambda: app.statuscode and pages.unlink(missing_ok=True))


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.connect("config-inited", begin, priority=1)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
