# SPDX-License-Identifier: Apache-2.0
"""Links to the code in header and footer, the commit, and "edit this page".

Where nothing names an address that a reader can open (see `repository.py`), there are none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import repository
from nemo_rl_facts import FACTS, FILES, read_facts
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

#: Branch that "edit this page" leads to.
BRANCH = "main"


def describe(app: Sphinx, config: Any) -> None:
    """Give the templates the address, the commit with its date, and NeMo RL's commit."""
    root = Path(app.srcdir)
    address = repository.address(root)
    facts = root / FACTS
    pinned = read_facts(facts).commit if (facts / FILES[0]).is_file() else ""
    commit, _, date = (repository.git(root, "log", "-1", "--format=%h %cs") or "").partition(" ")
    config.html_context |= {
        "repository": address,
        "commit": commit,
        "commit_date": date,
        "nemo_rl_commit": pinned[:7],
    }
    if address:
        config.html_context |= {
            "edit_page_url_template": f"{address}/edit/{BRANCH}/"
            + "{{ source_file or file_name }}",
            "edit_page_provider_name": "",
        }
        config.html_theme_options |= {
            "use_edit_page_button": True,
            "external_links": [{"name": "Source code", "url": address}],
            "secondary_sidebar_items": ["page-toc", "edit-this-page"],
        }


def name_source(app: Sphinx, page: str, template: str, context: Any, doctree: Any) -> None:
    """Tell "edit this page" which file it is."""
    if page in app.env.found_docs:
        context["source_file"] = str(app.env.doc2path(page, base=False))


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.connect("config-inited", describe)
    app.connect("html-page-context", name_source)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
