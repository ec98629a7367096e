# SPDX-License-Identifier: Apache-2.0
"""What a cell says about itself, and the table of all labelled cells and stored values.

A code cell may begin with option lines:

    #| label: dpo-curve
    #| alt: Loss over steps, ours and TRL's on top of each other.
    #| caption: The two curves differ by less than the line is wide.

A value is one line of text, longer ones go on in the next lines (`#|   and so on`). The lines
are hidden wherever the cell is shown. Nothing here needs Sphinx.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

OPTIONS = ("label", "alt", "caption")
VALUES_MIME = "application/vnd.nemo-rl-ref.values+json"
LABEL = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def split_options(source: str) -> tuple[dict[str, str], str]:
    """Take the option lines off the top of a cell.

    Args:
        source: the cell's text.

    Returns:
        The options, and the rest of the cell without the blank lines that followed them.

    Raises:
        ValueError: an option that is unknown, empty, given twice or malformed.
    """
    lines = source.split("\n")
    count = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    options: dict[str, str] = {}
    last = None
    for line in lines[:count]:
        text = line[2:].rstrip()
        if last is not None and text.startswith("  "):
            options[last] = f"{options[last]} {text.strip()}".strip()
            continue
        name, colon, value = text.strip().partition(":")
        if not colon or name not in OPTIONS:
            known = ", ".join(OPTIONS)
            raise ValueError(f"cell option {line!r} should be '#| name: text', name one of {known}")
        if name in options:
            raise ValueError(f"cell option {name!r} is given twice")
        options[name] = value.strip()
        last = name
    for name, value in options.items():
        if not value:
            raise ValueError(f"cell option {name!r} is empty")
    label = options.get("label")
    if label is not None and not LABEL.fullmatch(label):
        raise ValueError(
            f"label {label!r} should be lower-case words and digits joined by '-', like 'dpo-curve'"
        )
    return options, "\n".join(lines[count:]).lstrip("\n")


def cell_starts(source: str, count: int) -> list[int] | None:
    """Find the line on which each cell of a py:percent file starts.

    Args:
        source: the file's text.
        count: how many cells jupytext found in it.

    Returns:
        For each cell the number of lines above its text, or None where the `# %%` marks do not
        match the cells (one inside a string, for example).
    """
    marks = [i + 1 for i, line in enumerate(source.split("\n")) if re.match(r"# ?%%(?!%)", line)]
    if len(marks) == count - 1:
        marks.insert(0, 0)
    return marks if len(marks) == count else None


def digest(data: Any) -> str:
    """Return a short fingerprint of JSON data."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LabelledCell:
    """A code cell that pages can embed."""

    label: str
    notebook: str
    path: str
    line: int
    cell: dict[str, Any]

    @property
    def place(self) -> str:
        """Where the cell stands, for messages."""
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class StoredValue:
    """A piece of text, mostly a number, that a notebook gave a name."""

    name: str
    text: str
    notebook: str
    path: str
    line: int
    label: str | None

    @property
    def place(self) -> str:
        """Where the value was stored, for messages."""
        return f"{self.path}:{self.line}"


def code_cells(notebook: dict[str, Any]) -> Iterable[tuple[int, dict[str, Any]]]:
    """Yield the line (from 1) and the cell of each code cell of an executed notebook."""
    lines = notebook["metadata"]["source_map"]
    for index, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            yield lines[index] + 1, cell


def labelled_cells(name: str, path: str, notebook: dict[str, Any]) -> list[LabelledCell]:
    """List the labelled cells of an executed notebook."""
    found = []
    for line, cell in code_cells(notebook):
        label = split_options(cell["source"])[0].get("label")
        if label is not None:
            found.append(LabelledCell(label, name, path, line, cell))
    return found


def stored_values(name: str, path: str, notebook: dict[str, Any]) -> list[StoredValue]:
    """List the values that an executed notebook stored with `nemo_rl_ref.show.values.values`."""
    found = []
    for line, cell in code_cells(notebook):
        label = split_options(cell["source"])[0].get("label")
        for output in cell["outputs"]:
            for key, text in output.get("data", {}).get(VALUES_MIME, {}).items():
                found.append(StoredValue(key, text, name, path, line, label))
    return found
