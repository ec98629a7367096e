# SPDX-License-Identifier: Apache-2.0
"""The options of notebook cells, and the tables of labeled cells and stored values.

A code cell may begin with option lines:

    #| label: dpo-curve
    #| alt: Loss over steps, ours and TRL's on top of each other.
    #| caption: The two curves differ by less than the line is wide.
    #| num: dpo-max-diff = {difference:.1e}
    #| num: dpo-pairs = {len(pairs):,}

A text is one line; a longer one goes on in the next lines (`#|   and so on`). `num` stores a value
for the role `{num}`: a name, and what an f-string would hold, evaluated after the cell. Option
lines are read here, when a notebook is read to be executed. In the executed copy the lines are
gone, and what they said is in the cell's metadata. Nothing here needs Sphinx.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TEXTS = ("label", "alt", "caption")
VALUES_MIME = "application/vnd.nemo-rl-ref.values+json"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Num:
    """A value that a cell stores: its name, its text with `{expressions}`, its line in the cell."""

    name: str
    text: str
    line: int

    @property
    def expression(self) -> str:
        """The text as a Python f-string."""
        quotes = "'''" if '"' in self.text[-1:] or '"""' in self.text else '"""'
        return f"f{quotes}{self.text}{quotes}"


def parse_options(source: str) -> tuple[dict[str, str], list[Num], int]:
    """Read the option lines at the top of a cell.

    Args:
        source: the cell's text.

    Returns:
        The texts by option, the values to store, and how many lines stand above the cell's code.

    Raises:
        ValueError: an option is unknown, empty, given twice or malformed. The second argument of
            the error is the line in the cell, from 0.
    """
    lines = source.split("\n")
    above = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    given: list[tuple[int, str, str]] = []
    for number, line in enumerate(lines[:above]):
        text = line[2:].rstrip()
        if given and text.startswith("  "):
            first, name, value = given[-1]
            given[-1] = first, name, f"{value} {text.strip()}".strip()
            continue
        name, colon, value = text.strip().partition(":")
        if not colon or name not in (*TEXTS, "num"):
            known = ", ".join((*TEXTS, "num"))
            message = f"cell option {line!r} should be '#| name: text', name one of {known}"
            raise ValueError(message, number)
        given.append((number, name, value.strip()))
    texts: dict[str, str] = {}
    nums: list[Num] = []
    for number, name, value in given:
        if not value:
            raise ValueError(f"cell option {name!r} is empty", number)
        if name in TEXTS and value[0] == value[-1] == '"':
            raise ValueError(f"cell option {name!r} should stand without quotes", number)
        if name == "num":
            num = parse_num(value, number)
            if num.name in (other.name for other in nums):
                raise ValueError(f"value {num.name!r} is stored twice", number)
            nums.append(num)
        elif name in texts:
            raise ValueError(f"cell option {name!r} is given twice", number)
        elif name == "label" and not NAME.fullmatch(value):
            raise ValueError(
                f"label {value!r} should be lower-case words and digits joined by '-', like "
                "'dpo-curve'",
                number,
            )
        else:
            texts[name] = value
    while above < len(lines) and not lines[above].strip():
        above += 1
    return texts, nums, above


def parse_num(value: str, line: int) -> Num:
    """Read what stands behind `num:`, a name and a text with at least one `{expression}`.

    Raises:
        ValueError: it is something else.
    """
    name, equals, text = (part.strip() for part in value.partition("="))
    num = Num(name, text, line)
    try:
        if not (equals and NAME.fullmatch(name)):
            raise ValueError("a name is lower-case words and digits joined by '-'")
        tree = ast.parse(num.expression, mode="eval")
        if not any(isinstance(node, ast.FormattedValue) for node in ast.walk(tree)):
            raise ValueError("it computes nothing")
    except (SyntaxError, ValueError) as error:
        why = error.msg if isinstance(error, SyntaxError) else error
        message = f"cell option 'num: {value}' should be 'num: some-name = {{expression:format}}'"
        raise ValueError(f"{message}; {why}", line) from None
    return num


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


# ---- executed notebooks -----------------------------------------------------------------------


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


def options_of(cell: dict[str, Any]) -> dict[str, str]:
    """Return the options of an executed cell by name: `label`, `alt`, `caption`."""
    return cell["metadata"]["options"]


def code_cells(notebook: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line (from 1) and the cell of each code cell of an executed notebook."""
    lines = notebook["metadata"]["source_map"]
    for line, cell in zip(lines, notebook["cells"], strict=True):
        if cell["cell_type"] == "code":
            yield line + 1, cell


def labelled_cells(name: str, path: str, notebook: dict[str, Any]) -> list[LabelledCell]:
    """List the labeled cells of an executed notebook."""
    return [
        LabelledCell(options_of(cell)["label"], name, path, line, cell)
        for line, cell in code_cells(notebook)
        if "label" in options_of(cell)
    ]


def stored_values(name: str, path: str, notebook: dict[str, Any]) -> list[StoredValue]:
    """List the values that the cells of an executed notebook stored."""
    return [
        StoredValue(key, text, name, path, line, options_of(cell).get("label"))
        for line, cell in code_cells(notebook)
        for output in cell["outputs"]
        for key, text in output.get("data", {}).get(VALUES_MIME, {}).items()
    ]
