# SPDX-License-Identifier: Apache-2.0
"""A notebook that leaves the site: it installs what it needs, and its links lead somewhere.

The first cell installs the package from the repository's address at the commit that the site was
built from, or says how to install it from a clone where no address is known. Links to pages lead to
the site's address if `html_baseurl` has one, else to the file in the repository, else they become
the file's name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import repository

EXTRA = "notebooks"
LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def install_cell(where: str | None, commit: str | None) -> dict[str, Any]:
    """Return the cell that installs the package where it is not there.

    Args:
        where: the repository's address, None where it is not known.
        commit: the commit, None where it is not known.
    """
    if where is None:
        what = [
            "    raise ModuleNotFoundError(",
            f"        \"install nemo-rl-ref from a clone of its repository: pip install '.[{EXTRA}]'\"",
            "    )",
        ]
    else:
        at = f"@{commit}" if commit else ""
        what = [f'    %pip install "nemo-rl-ref[{EXTRA}] @ git+{where}{at}"']
    lines = [
        "# Installs what this notebook needs, unless it is there.",
        "import importlib.util",
        "",
        'if importlib.util.find_spec("nemo_rl_ref") is None:',
        *what,
    ]
    cell = {"cell_type": "code", "id": "install", "metadata": {}, "source": "\n".join(lines)}
    return cell | {"execution_count": None, "outputs": []}


def link_elsewhere(text: str, site: str, where: str | None, commit: str | None) -> str:
    """Rewrite the links of a Markdown text of a notebook that are relative to `notebooks/`."""

    def rewrite(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ""
        file = posixpath.normpath(posixpath.join("notebooks", target))
        if site:
            page = file.removeprefix("docs/")
            page = re.sub(r"\.(md|py)$", ".html", page)
            return f"[{label}]({site.rstrip('/')}/{page}{anchor})"
        if where:
            return f"[{label}]({where}/blob/{commit or 'HEAD'}/{file})"
        return f"{label} (`{file}`)"

    return LINK.sub(rewrite, text)


def portable(content: dict[str, Any], root: Path, site: str = "") -> dict[str, Any]:
    """Return a notebook as it is offered for download.

    Args:
        content: the notebook, as JSON data.
        root: the repository's folder.
        site: the address of the site, empty where it is not known.
    """
    where, commit = repository.address(root), repository.commit(root)
    cells = [
        cell | {"source": link_elsewhere(cell["source"], site, where, commit)}
        if cell["cell_type"] == "markdown"
        else cell
        for cell in content["cells"]
    ]
    metadata = {key: value for key, value in content["metadata"].items() if key != "source_map"}
    return content | {"cells": [install_cell(where, commit), *cells], "metadata": metadata}
