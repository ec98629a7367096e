# SPDX-License-Identifier: Apache-2.0
"""Rows of different lengths as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_right(
    rows: Sequence[Tensor], fill: float = 0, *, multiple: int = 1, width: int = 0
) -> Tensor:
    """Pad rows on the right and stack them.

    Args:
        rows: At least one, each ``(T,)``, of one dtype.
        fill: The value of the padding.
        multiple: ``S`` is rounded up to a multiple of this.
        width: ``S`` is at least this.

    Returns:
        ``(B, S)``, with ``S`` the length of the longest row unless it is made larger as above.
    """
    lengths = [row.shape[0] for row in rows]
    columns = -(-max(width, *lengths) // multiple) * multiple
    filled = torch.arange(columns) < torch.tensor(lengths).unsqueeze(1)
    padded = torch.full(filled.shape, fill, dtype=rows[0].dtype)
    # In one piece: many short rows, written one by one, take longer.
    return padded.masked_scatter_(filled, torch.cat(list(rows)))


class PackedRows:
    """Rows of different lengths in one tensor, out of which padded batches are cut.

    Args:
        rows: At least one, each ``(T,)``, of one dtype.
        more: Other columns of the same rows: as many rows, of the same lengths.
    """

    def __init__(self, rows: Sequence[Tensor], *more: Sequence[Tensor]):
        self.flat = [torch.cat(list(column)) for column in (rows, *more)]
        self.lengths = torch.tensor([row.shape[0] for row in rows])
        self.starts = self.lengths.cumsum(0) - self.lengths

    def padded(self, numbers: Tensor, fills: Sequence[float], *, multiple: int = 1, width: int = 0):
        """Some of the rows, padded on the right as `pad_right` does it.

        Args:
            numbers: Which rows, int64 ``(B,)``.
            fills: The value of the padding, for each column.
            multiple: See `pad_right`.
            width: See `pad_right`.

        Returns:
            A list with a tensor ``(B, S)`` for each column, and the lengths, int64 ``(B,)``.
        """
        lengths = self.lengths[numbers]
        columns = torch.arange(-(-max(width, int(lengths.max())) // multiple) * multiple)
        padding = columns >= lengths.unsqueeze(1)
        places = (self.starts[numbers].unsqueeze(1) + columns).masked_fill_(padding, 0)
        cut = zip(self.flat, fills, strict=True)
        return [flat[places].masked_fill_(padding, fill) for flat, fill in cut], lengths
