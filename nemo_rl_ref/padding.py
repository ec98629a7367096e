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
    longest = max(width, *map(len, rows))
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)
    missing = -(-longest // multiple) * multiple - padded.shape[1]
    return torch.nn.functional.pad(padded, (0, missing), value=fill) if missing else padded
