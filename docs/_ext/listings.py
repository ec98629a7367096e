# SPDX-License-Identifier: Apache-2.0
"""What a reader gets who copies a listing: its cell, with what it needs of the cells before it.

Which statements of the earlier cells those are, hidden cells included, is computed from the names
that statements give a value and use (`nemo_rl_ref.export.slice`). Option lines are no code, and
what only displays or checks is needed by nothing, so neither is in the text. Nothing here needs
Sphinx.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from notebook_cells import options_of

from nemo_rl_ref.export import slice as slicing
from nemo_rl_ref.export.slice import needed, statements, text_of

#: Another value where listings may be made in another way.
SLICING_CODE = hashlib.sha256(
    Path(__file__).read_bytes() + Path(slicing.__file__).read_bytes()
).hexdigest()


@dataclass(frozen=True)
class Listing:
    """A cell as a text of its own.

    Attributes:
        text: the cell alone, or with what it needs above.
        alone: whether the cell needs nothing.
        missing: names that no cell above gives a value.
    """

    text: str
    alone: bool
    missing: frozenset[str]

    @property
    def lines(self) -> int:
        """How many lines the text has."""
        return self.text.count("\n")


def listings_of(cells: Iterable[Any]) -> dict[str, Listing]:
    """Make the listing of each labeled code cell of a notebook, option lines taken off.

    Args:
        cells: all cells of the notebook in order, as `.ipynb` files have them.
    """
    program, cell_of, places = [], [], {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        try:
            found = statements(cell["source"])
        except SyntaxError:  # a line of IPython's
            continue
        if label := options_of(cell).get("label"):
            places[label] = range(len(program), len(program) + len(found)), cell["source"]
        program += found
        cell_of += [number] * len(found)
    listings = {}
    for label, (own, source) in places.items():
        kept, missing = needed(program, own)
        parts: dict[int, list[Any]] = {}
        for place in kept:
            parts.setdefault(cell_of[place], []).append(program[place])
        alone = len(parts) == 1
        text = source.strip("\n") + "\n" if alone else text_of(list(parts.values()))
        listings[label] = Listing(text, alone, frozenset(missing))
    return listings
