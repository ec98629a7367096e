# SPDX-License-Identifier: Apache-2.0
"""Notebooks as pages: executed before any page is read, shown with their outputs.

At the start of a build every notebook that changed is executed (`execution.py`), and the table
of labelled cells and stored values is made. When Sphinx then reads the page
`notebooks/NAME.py`, it is given the executed copy instead of the source, so that MyST-NB never
executes anything and pages can be read in parallel.

What a page took from a notebook is remembered with a fingerprint. At the next build a page is
read again when one of its fingerprints is no longer right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from docutils import nodes
from execution import NotebookFailure, ensure_executed, write_atomically
from notebook_cells import (
    VALUES_MIME,
    LabelledCell,
    StoredValue,
    code_cells,
    digest,
    labelled_cells,
    split_options,
    stored_values,
)
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.osutil import relative_uri
from sphinx.util.typing import ExtensionMetadata

logger = logging.getLogger(__name__)

FOLDER = "notebooks"


@dataclass
class Executed:
    """All executed notebooks of a build, and what is in them.

    Attributes:
        copies: the executed copy of each notebook, by name.
        contents: the same as JSON data.
        labels: the cells of each label; more than one is an error.
        values: the stored values of each name; more than one is an error.
        equations: what the checks of the equations found (`equations.py`).
    """

    copies: dict[str, Path] = field(default_factory=dict)
    contents: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: dict[str, list[LabelledCell]] = field(default_factory=dict)
    values: dict[str, list[StoredValue]] = field(default_factory=dict)
    equations: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"checked": {}, "unchecked": {}}
    )

    def implemented_by(self, name: str) -> list[tuple[str, str]]:
        """List the equations, label and title, that a function or class implements."""
        checked = self.equations["checked"].items()
        return [(label, e["title"]) for label, e in checked if name in e["implementations"]]

    def fingerprint(self, kind: str, name: str) -> str:
        """Say in short what a page that uses this name gets; '' where there is nothing.

        Args:
            kind: 'page' (a notebook as a page), 'cell' (a label), 'value', 'equation' (a label),
                'equations' (all of them) or 'implementation' (a dotted name).
            name: the notebook's name, the label, or the value's name.
        """
        match kind:
            case "page":
                return digest(self.contents[name]) if name in self.contents else ""
            case "cell":
                return digest([[c.notebook, c.cell] for c in self.labels.get(name, [])])
            case "value":
                return digest([[v.notebook, v.text, v.label] for v in self.values.get(name, [])])
            case "equation":
                return digest(self.equations["checked"].get(name))
            case "equations":
                return digest(self.equations)
            case "implementation":
                return digest(self.implemented_by(name))
        raise ValueError(f"kind {kind!r} is not known")


def collect(copies: dict[str, Path]) -> Executed:
    """Read executed notebooks and list what pages can use of them."""
    result = Executed(copies)
    for name, path in copies.items():
        content = json.loads(path.read_text(encoding="utf-8"))
        result.contents[name] = content
        source = f"{FOLDER}/{name}.py"
        for cell in labelled_cells(name, source, content):
            result.labels.setdefault(cell.label, []).append(cell)
        for value in stored_values(name, source, content):
            result.values.setdefault(value.name, []).append(value)
    return result


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
    app.executed_notebooks = collect(copies)
    warn_of_duplicates("label", app.executed_notebooks.labels)
    warn_of_duplicates("value", app.executed_notebooks.values)


def executed(env: BuildEnvironment) -> Executed:
    """Return the executed notebooks of this build.

    They hang on the application, which Sphinx does not pickle with the environment. `env.app` is
    deprecated from Sphinx 9 on, without another public way to it.
    """
    return env._app.executed_notebooks


def warn_of_duplicates(kind: str, found: dict[str, list[Any]]) -> None:
    """Warn of each label or value name that stands in more than one place."""
    for name, items in found.items():
        for item in items[1:]:
            first = items[0].place
            message = f"duplicate {kind} {name!r}, which stands at {first} already"
            logger.warning(message, location=item.place, type="embed", subtype="duplicate")


# ---- what a page took from notebooks ----------------------------------------------------------


def uses(env: BuildEnvironment) -> dict[str, dict[tuple[str, str], str]]:
    """Return what each page took: (kind, name) and the fingerprint at that time."""
    if not hasattr(env, "notebook_uses"):
        env.notebook_uses = {}
    return env.notebook_uses


def note_use(env: BuildEnvironment, kind: str, name: str) -> None:
    """Remember that the page being read took something from a notebook."""
    fingerprint = executed(env).fingerprint(kind, name)
    uses(env).setdefault(env.docname, {})[kind, name] = fingerprint


def outdated_pages(
    app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]
) -> list[str]:
    """List the pages that took something which is different now."""
    now = app.executed_notebooks.fingerprint
    return [
        page
        for page, taken in uses(env).items()
        if any(now(kind, name) != was for (kind, name), was in taken.items())
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


# ---- a notebook as a page ---------------------------------------------------------------------


def prepared_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Return a code cell as MyST-NB is to show it.

    Its option lines are gone; `alt` and `caption` are where MyST-NB looks for them; stored
    values, which are meant for pages, are left out (their text stays).
    """
    options, source = split_options(cell["source"])
    show = {}
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
    return cell | {"source": source, "outputs": outputs, "metadata": metadata}


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
            label = split_options(cell["source"])[0].get("label")
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
    if folder != FOLDER or name not in app.executed_notebooks.contents:
        return
    content = app.executed_notebooks.contents[name]
    for line, cell in code_cells(content):
        if has_image(cell) and "alt" not in split_options(cell["source"])[0]:
            message = "a cell that shows an image needs a line '#| alt: what the image shows'"
            logger.warning(message, location=(docname, line), type="embed", subtype="alt")
    note_use(app.env, "page", name)
    source[0] = json.dumps(page_notebook(content))


# ---- links and downloads ----------------------------------------------------------------------


class NotebookLinks(SphinxPostTransform):
    """One small line under the title: the notebooks behind a page, and their downloads."""

    default_priority = 500
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Insert the line."""
        docname = self.env.docname
        cells, values = executed(self.env).labels, executed(self.env).values
        taken = uses(self.env).get(docname, {})
        names = {name for kind, name in taken if kind == "page"}
        for kind, name in taken:
            found = {"cell": cells, "value": values}.get(kind, {}).get(name, [])
            names |= {item.notebook for item in found}
        title = next(self.document.findall(nodes.title), None)
        if names and title is not None:
            own = docname if docname.startswith(f"{FOLDER}/") else None
            lines = [self.line(docname, f"{FOLDER}/{name}", own) for name in sorted(names)]
            box = nodes.container("", *lines, classes=["notebook-links"])
            title.parent.insert(title.parent.index(title) + 1, box)

    def line(self, docname: str, notebook: str, own: str | None) -> nodes.paragraph:
        """Write one notebook's links; on the notebook's own page only the downloads."""
        builder = self.env._app.builder
        here = builder.get_target_uri(docname)
        line = nodes.paragraph()
        if notebook == own:
            line += nodes.Text("Download this notebook: ")
        else:
            page = nodes.reference("", notebook, internal=True)
            page["refuri"] = builder.get_relative_uri(docname, notebook)
            line += [nodes.Text("Code and results: "), page, nodes.Text(", download ")]
        for suffix, after in ((".ipynb", ", "), (".py", "")):
            target = relative_uri(here, notebook + suffix)
            line += [nodes.reference("", suffix, refuri=target, internal=True), nodes.Text(after)]
        return line


def copy_downloads(app: Sphinx, exception: Exception | None) -> None:
    """Put the executed `.ipynb` and the `.py` of every notebook beside its page."""
    if exception is not None or app.builder.format != "html":
        return
    for name, copy in app.executed_notebooks.copies.items():
        script = Path(app.srcdir) / FOLDER / f"{name}.py"
        for source, suffix in ((copy, ".ipynb"), (script, ".py")):
            target = Path(app.outdir) / FOLDER / f"{name}{suffix}"
            content = source.read_bytes()
            if not target.is_file() or target.read_bytes() != content:
                write_atomically(target, content)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.connect("builder-inited", execute_all, priority=900)
    app.connect("env-get-outdated", outdated_pages)
    app.connect("env-purge-doc", forget_page)
    app.connect("env-merge-info", merge_pages)
    app.connect("source-read", give_executed_copy)
    app.add_post_transform(NotebookLinks)
    app.connect("build-finished", copy_downloads)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
