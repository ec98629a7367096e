# SPDX-License-Identifier: Apache-2.0
"""Notebooks as pages: executed before any page is read, shown with their outputs.

At the start of a build every notebook that changed is executed (`execution.py`), and the table
of labeled cells and stored values is made. When Sphinx then reads the page
`notebooks/NAME.py`, it is given the executed copy instead of the source, so that MyST-NB never
executes anything and pages can be read in parallel.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from docutils import nodes
from execution import ensure_executed, write_atomically
from listings import SLICING_CODE, Listing, listings_of
from notebook_cells import (
    VALUES_MIME,
    LabelledCell,
    StoredValue,
    code_cells,
    labelled_cells,
    options_of,
    stored_values,
)
from notebook_kernel import NotebookFailure
from page_uses import note_use, offer, uses
from portable import portable
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.osutil import relative_uri
from sphinx.util.typing import ExtensionMetadata

logger = logging.getLogger(__name__)

FOLDER = "notebooks"


@dataclass
class Executed:
    """All executed notebooks of this build, and what is in them.

    Attributes:
        copies: the executed copy of each notebook, by name.
        contents: the same as JSON data.
        labels: the cells of each label; more than one is an error.
        values: the stored values of each name; more than one is an error.
        listings: of the notebooks that a page has asked for, see `listing`.
    """

    copies: dict[str, Path] = field(default_factory=dict)
    contents: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: dict[str, list[LabelledCell]] = field(default_factory=dict)
    values: dict[str, list[StoredValue]] = field(default_factory=dict)
    listings: dict[str, dict[str, Listing]] = field(default_factory=dict)

    def collect(self, copies: dict[str, Path]) -> None:
        """Read executed notebooks and list what pages can use of them."""
        self.copies, self.contents, self.labels, self.values = copies, {}, {}, {}
        self.listings = {}
        for name, path in copies.items():
            content = json.loads(path.read_text(encoding="utf-8"))
            self.contents[name] = content
            source = f"{FOLDER}/{name}.py"
            for cell in labelled_cells(name, source, content):
                self.labels.setdefault(cell.label, []).append(cell)
            for value in stored_values(name, source, content):
                self.values.setdefault(value.name, []).append(value)

    def listing(self, label: str) -> Listing | None:
        """What a reader gets who copies a labeled cell; None if it is no plain Python."""
        if label not in self.labels:
            return None
        name = self.labels[label][0].notebook
        if name not in self.listings:
            self.listings[name] = listings_of(self.contents[name]["cells"])
        return self.listings[name].get(label)

    def listing_stands_on(self, label: str) -> list[str]:
        """What decides about a listing, without making it: the code up to its cell."""
        if label not in self.labels:
            return []
        labeled = self.labels[label][0]
        cells = self.contents[labeled.notebook]["cells"]
        code = [cell["source"] for cell in cells[: cells.index(labeled.cell) + 1]]
        return [SLICING_CODE, *code]


#: Filled at the start of a build. A process builds one site; its parallel readers are forks.
EXECUTED = Executed()


def execute_all(app: Sphinx) -> None:
    """Execute the notebooks and put the result where the rest of the build finds it.

    A failure ends the build here and now: an exception would have Sphinx bury the message
    between a list of versions and a request to report a bug.
    """
    store = Path(app.outdir).parent / FOLDER
    try:
        copies = ensure_executed(Path(app.srcdir), store, logger.info)
    except NotebookFailure as failure:
        raise SystemExit(f"\nNotebook error: {failure}") from None
    EXECUTED.collect(copies)
    warn_of_duplicates("label", EXECUTED.labels)
    warn_of_duplicates("value", EXECUTED.values)


def warn_of_duplicates(kind: str, found: dict[str, list[Any]]) -> None:
    """Warn of each label or value name that stands in more than one place."""
    for name, items in found.items():
        for item in items[1:]:
            first = items[0].place
            message = f"duplicate {kind} {name!r}, which stands at {first} already"
            logger.warning(message, location=item.place, type="embed", subtype="duplicate")


# ---- a notebook as a page ---------------------------------------------------------------------


def prepared_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Return a code cell as MyST-NB is to show it.

    `alt` and `caption` are where MyST-NB looks for them; stored values are left out, their list
    stays.
    """
    options, show = options_of(cell), {}
    if "alt" in options:
        show["image"] = {"alt": options["alt"]}
    if "caption" in options:
        show["figure"] = {"caption": options["caption"]}
    outputs = []
    for output in cell["outputs"]:
        if "data" in output:
            data = {mime: value for mime, value in output["data"].items() if mime != VALUES_MIME}
            output = output | {"data": data}
        outputs.append(output)
    metadata = cell["metadata"] | ({"mystnb": show} if show else {})
    return cell | {"outputs": outputs, "metadata": metadata}


def has_image(cell: dict[str, Any]) -> bool:
    """Say whether an output of a code cell is shown as an image."""
    return any(
        mime.startswith("image/") for output in cell["outputs"] for mime in output.get("data", {})
    )


def anchor_cell(label: str) -> dict[str, Any]:
    """Return a Markdown cell that makes the next cell a target with this label."""
    text = {"cell_type": "markdown", "metadata": {}, "source": f"({label})="}
    return text | {"id": f"anchor-{label}"}


def page_notebook(content: dict[str, Any]) -> dict[str, Any]:
    """Return an executed notebook as its page shows it.

    MyST-NB names lines of the source in its warnings. It takes the number of lines above a cell's
    mark, `# %%`, where ours is of lines above the cell's text.
    """
    cells, lines = [], []
    for line, cell in zip(content["metadata"]["source_map"], content["cells"], strict=True):
        if cell["cell_type"] == "code":
            label = options_of(cell).get("label")
            if label is not None and "remove-cell" not in cell["metadata"].get("tags", []):
                cells.append(anchor_cell(label))
                lines.append(line - 1)
            cell = prepared_cell(cell)
        cells.append(cell)
        lines.append(line - 1)
    return content | {"cells": cells, "metadata": content["metadata"] | {"source_map": lines}}


def give_executed_copy(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace a notebook's text by its executed copy when Sphinx reads it."""
    folder, _, name = docname.rpartition("/")
    if folder != FOLDER or name not in EXECUTED.contents:
        return
    content = EXECUTED.contents[name]
    for line, cell in code_cells(content):
        if has_image(cell) and "alt" not in options_of(cell):
            message = "a cell that shows an image needs a line '#| alt: what the image shows'"
            logger.warning(message, location=(docname, line), type="embed", subtype="alt")
    note_use(app.env, "page", name)
    source[0] = json.dumps(page_notebook(content))


# ---- links and downloads ----------------------------------------------------------------------


def add_links(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put one small line under a page's title: the notebooks behind it, and their downloads."""
    title = next(doctree.findall(nodes.title), None)
    if app.builder.format != "html" or title is None:
        return
    taken = uses(app.env).get(docname, {})
    names = {name for kind, name in taken if kind == "page"}
    for kind, name in taken:
        found = {"cell": EXECUTED.labels, "value": EXECUTED.values}.get(kind, {}).get(name, [])
        names |= {item.notebook for item in found}
    if names:
        lines = [notebook_line(app, docname, name) for name in sorted(names)]
        box = nodes.container("", *lines, classes=["notebook-links"])
        title.parent.insert(title.parent.index(title) + 1, box)


def notebook_line(app: Sphinx, docname: str, name: str) -> nodes.paragraph:
    """Write one notebook's links; on the notebook's own page only the downloads."""
    notebook = f"{FOLDER}/{name}"
    here = app.builder.get_target_uri(docname)
    line = nodes.paragraph()
    if notebook == docname:
        line += nodes.Text("Download this notebook: ")
    else:
        page = nodes.reference("", notebook, internal=True)
        page["refuri"] = app.builder.get_relative_uri(docname, notebook)
        line += [nodes.Text("Code and results: "), page, nodes.Text(", download ")]
    for suffix, after in ((".ipynb", ", "), (".py", "")):
        target = relative_uri(here, notebook + suffix)
        line += [nodes.reference("", suffix, refuri=target, internal=True), nodes.Text(after)]
    return line


def copy_downloads(app: Sphinx, exception: Exception | None) -> None:
    """Put the executed `.ipynb`, made portable, and the `.py` of every notebook beside its page."""
    if exception is not None or app.builder.format != "html":
        return
    root = Path(app.srcdir)
    for name, notebook in EXECUTED.contents.items():
        carried = portable(notebook, root, app.config.html_baseurl)
        text = json.dumps(carried, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
        script = root / FOLDER / f"{name}.py"
        for content, suffix in ((text.encode(), ".ipynb"), (script.read_bytes(), ".py")):
            target = Path(app.outdir) / FOLDER / f"{name}{suffix}"
            if not target.is_file() or target.read_bytes() != content:
                write_atomically(target, content)


def remove_old_pages(app: Sphinx, exception: Exception | None) -> None:
    """Remove what an earlier build left of pages and notebooks that are gone, downloads too."""
    if exception is not None or app.builder.format != "html":
        return
    top = Path(app.outdir)
    made = {"genindex", "search", "py-modindex", *app.config.html_additional_pages}
    for path in top.rglob("*.html"):
        name = path.relative_to(top).with_suffix("").as_posix()
        if name.startswith("_") or name in made or name in app.env.found_docs:
            continue
        path.unlink()
        if path.parent == top / FOLDER:
            for suffix in (".ipynb", ".py"):
                path.with_suffix(suffix).unlink(missing_ok=True)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.setup_extension("page_uses")
    offer("page", lambda name: EXECUTED.contents.get(name))
    app.connect("builder-inited", execute_all, priority=900)
    app.connect("source-read", give_executed_copy)
    app.connect("doctree-resolved", add_links)
    app.connect("build-finished", copy_downloads)
    app.connect("build-finished", remove_old_pages)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
