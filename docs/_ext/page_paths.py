# SPDX-License-Identifier: Apache-2.0
"""Page addresses without the name of the folder that the sources live in.

The repository's top level is Sphinx's source folder, so that pages can take listings from the
package and from the notebooks. A reader should not see that: `docs/index.md` is the page
`/index.html`, `docs/advanced/index.md` is `/advanced/index.html`, and only notebooks keep
their folder: `notebooks/custom_dpo.py` is `/notebooks/custom_dpo.html`.

Sphinx asks one object, its `Project`, for the files that are pages and for the way between a
page's name and its file. This extension gives it one that knows the two folders above. It
looks into no other folder, so a virtual environment beside them costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from sphinx.application import Sphinx
from sphinx.project import Project
from sphinx.util import logging
from sphinx.util.matching import compile_matchers
from sphinx.util.typing import ExtensionMetadata

logger = logging.getLogger(__name__)

PAGES = "docs"
NOTEBOOKS = "notebooks"


def docname_of(path: PurePosixPath) -> str | None:
    """Name the page that a file holds.

    Args:
        path: the file, relative to the top of the repository.

    Returns:
        The page's name (`advanced/index`), or None where the file is no page: another suffix,
        another folder, or a name (of the file or of a folder above it) with a leading `_` or `.`.
    """
    if any(part.startswith(("_", ".")) for part in path.parts):
        return None
    match path.parts:
        case [folder, *inner] if folder == PAGES and path.suffix == ".md" and inner:
            return str(PurePosixPath(*inner).with_suffix(""))
        case [folder, _] if folder == NOTEBOOKS and path.suffix == ".py":
            return str(path.with_suffix(""))
    return None


def source_files(top: Path) -> Iterator[PurePosixPath]:
    """Yield every file in the two source folders, in a stable order, relative to `top`."""
    for folder in (PAGES, NOTEBOOKS):
        for directory, subfolders, files in os.walk(top / folder, followlinks=True):
            subfolders.sort()
            relative = Path(directory).relative_to(top)
            yield from (PurePosixPath((relative / name).as_posix()) for name in sorted(files))


class PageProject(Project):
    """Sphinx's table of pages, with the addresses described above."""

    def discover(
        self, exclude_paths: Iterable[str] = (), include_paths: Iterable[str] = ("**",)
    ) -> set[str]:
        """Find all pages; `include_paths` is not used, the two folders say what is a page."""
        self.docnames.clear()
        self._path_to_docname.clear()
        self._docname_to_path.clear()
        excluded = compile_matchers(exclude_paths)
        for path in source_files(Path(self.srcdir)):
            docname = docname_of(path)
            if docname is None or any(matches(str(path)) for matches in excluded):
                continue
            if docname in self.docnames:
                first = self._docname_to_path[docname]
                logger.warning("%s and %s are both the page %r", first, path, docname)
                continue
            self.docnames.add(docname)
            self._path_to_docname[Path(path)] = docname
            self._docname_to_path[docname] = Path(path)
        return self.docnames

    def path2doc(self, filename: str | os.PathLike[str]) -> str | None:
        """Return the page of a file given absolutely or relative to the source folder."""
        path = Path(filename)
        if path.is_absolute():
            if not path.is_relative_to(self.srcdir):
                return None
            path = path.relative_to(self.srcdir)
        return docname_of(PurePosixPath(path.as_posix()))

    def doc2path(self, docname: str, absolute: bool) -> Path:
        """Return the file of a page; for a page that is gone, the file it would have."""
        path = self._docname_to_path.get(docname)
        if path is None:
            is_notebook = docname.startswith(f"{NOTEBOOKS}/")
            path = Path(f"{docname}.py" if is_notebook else f"{PAGES}/{docname}.md")
        return type(self.srcdir)(self.srcdir / path if absolute else path)


def use_page_paths(app: Sphinx) -> None:
    """Replace the project that Sphinx made, keeping what it restored from the last build."""
    project = PageProject(app.srcdir, app.config.source_suffix)
    project.restore(app.project)
    app.project = app.env.project = project
    if app.fresh_env_used:
        app.env.find_files(app.config, app.builder)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension; it must run before anything that asks for a page's file."""
    app.connect("builder-inited", use_page_paths, priority=1)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
