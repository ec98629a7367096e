# SPDX-License-Identifier: Apache-2.0
"""A sequence drawn token by token: one column a position, one row a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch

#: What stands where a tensor has no entry for a position.
NONE = "–"

_NAME = (
    "position:sticky;left:0;text-align:left;font-weight:normal;white-space:normal;"
    "overflow-wrap:anywhere;min-width:8rem;max-width:9rem;padding:0.2rem 0.5rem;"
    "color:inherit;background:var(--pst-color-background,Canvas)"
)
_CELL = "color:inherit;min-width:0;white-space:nowrap;text-align:center;padding:0.2rem 0.45rem"
_CAPTION = "caption-side:top;text-align:left;color:inherit"
_MARK = ";font-weight:bold;background:rgba(127,127,127,0.25)"


@dataclass(frozen=True)
class TokenTable:
    """Tensors over the positions of one sequence, drawn in a notebook, or printed as text.

    Attributes:
        caption: What the table shows.
        rows: For each name a value a position: a tensor ``(S,)`` or a sequence. Floating values
            get two decimals, ``None`` a dash.
        marked: Which positions are bold and shaded; none if not given.

    Raises:
        ValueError: If a row has another number of positions than the first.
    """

    caption: str
    rows: dict[str, Sequence[Any] | torch.Tensor]
    marked: Sequence[Any] | torch.Tensor | None = None
    _texts: dict[str, list[str]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        texts = {name: [_text(value) for value in row] for name, row in self.rows.items()}
        width = len(next(iter(texts.values()), []))
        marked = {} if self.marked is None else {"marked": self.marked}
        for name, row in {**texts, **marked}.items():
            if len(row) != width:
                raise ValueError(f"{name}: got {len(row)} positions, expected {width}")
        object.__setattr__(self, "_texts", texts)

    def __repr__(self) -> str:
        names = max(map(len, self._texts))
        columns = [max(map(len, column)) for column in zip(*self._texts.values(), strict=True)]
        lines = [
            f"{name:<{names}}  " + " ".join(f"{t:>{w}}" for t, w in zip(row, columns, strict=True))
            for name, row in self._texts.items()
        ]
        return "\n".join([self.caption, *lines])

    def _repr_html_(self) -> str:
        lines = []
        for name, row in self._texts.items():
            marked = [False] * len(row) if self.marked is None else self.marked
            cells = "".join(
                f'<td style="{_CELL}{_MARK if mark else ""}">{escape(text)}</td>'
                for text, mark in zip(row, marked, strict=True)
            )
            name = escape(name).replace("_", "_<wbr>")  # long names break at their underscores
            lines.append(f'<tr><th scope="row" style="{_NAME}">{name}</th>{cells}</tr>')
        body = "".join(lines)
        caption = f'<caption style="{_CAPTION}">{escape(self.caption)}</caption>'
        # Themes know this class from pandas and leave the page's ground behind it.
        return f'<table class="dataframe">{caption}<tbody>{body}</tbody></table>'


def after_first(values: torch.Tensor) -> list[Any]:
    """Lay a row of ``S-1`` next-token values under the ``S`` tokens that they belong to.

    Args:
        values: ``(S-1,)``; entry t belongs to token t + 1.

    Returns:
        ``S`` values, the first of them ``None``: no token comes before token 0.
    """
    return [None, *values.tolist()]


def _text(value: Any) -> str:
    if value is None:
        return NONE
    value = value.item() if isinstance(value, torch.Tensor) else value
    if not isinstance(value, float):
        return str(value)
    return f"{value:z.2f}".replace("-", "−")  # z: no sign on what rounds to zero
