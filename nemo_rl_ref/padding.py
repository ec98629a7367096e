# SPDX-License-Identifier: Apache-2.0
"""Rows of different lengths as one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


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
    """

    def __init__(self, rows: Sequence[Tensor]):
        self.flat = torch.cat(list(rows))
        self.lengths = torch.tensor([row.shape[0] for row in rows])
        self.starts = self.lengths.cumsum(0) - self.lengths

    def padded(self, numbers: Tensor, width: int) -> Tensor:
        """Some of the rows, with zeros on the right.

        Args:
            numbers: Which rows, int64 ``(B,)``.
            width: ``S``, at least the length of the longest of them.

        Returns:
            ``(B, S)``.
        """
        columns = torch.arange(width)
        places = self.starts[numbers].unsqueeze(1) + columns
        padding = columns >= self.lengths[numbers].unsqueeze(1)
        return self.flat[places.masked_fill_(padding, 0)].masked_fill_(padding, 0)


def flat_pair(datum: Mapping[str, Any]) -> dict[str, Any]:
    """Join the messages of a pair, once for all batches that it will be in.

    Args:
        datum: From `nemo_rl_ref.data.processors.preference_preprocessor`.

    Returns:
        ``rows``, the tokens of the chosen and of the rejected answer with what comes before them,
        int64 ``(T,)``; ``answers``, the number of tokens of the last message of each; and
        ``loss_multiplier``.
    """
    logs = [datum[f"message_log_{side}"] for side in ("chosen", "rejected")]
    return {
        "rows": [torch.cat([message["token_ids"] for message in log]) for log in logs],
        "answers": [len(log[-1]["token_ids"]) for log in logs],
        "loss_multiplier": datum["loss_multiplier"],
    }


def pad_pairs(
    pairs: Sequence[Mapping[str, Any]], fill: int, multiple: int, add_loss_mask: bool
) -> BatchedDataDict[Any]:
    """Pad pairs into one batch, as `nemo_rl_ref.data.collate_fn.preference_collate_fn` does.

    Args:
        pairs: From `flat_pair`, at least one.
        fill: Fills ``input_ids``.
        multiple: ``S`` is rounded up to a multiple of this.
        add_loss_mask: Whether to add ``token_mask``.
    """
    rows = [row for pair in pairs for row in pair["rows"]]
    lengths = torch.tensor([row.shape[0] for row in rows])
    weights = torch.tensor([pair["loss_multiplier"] for pair in pairs]).repeat_interleave(2)
    data: BatchedDataDict[Any] = BatchedDataDict(
        {
            "input_ids": pad_right(rows, fill, multiple=multiple),
            "input_lengths": lengths,
            "sample_mask": weights,
        }
    )
    if add_loss_mask:
        answers = torch.tensor([number for pair in pairs for number in pair["answers"]])
        column = torch.arange(data["input_ids"].shape[1])
        before, end = (lengths - answers).unsqueeze(-1), lengths.unsqueeze(-1)
        data["token_mask"] = ((column >= before) & (column < end)).long()
    return data
