# SPDX-License-Identifier: Apache-2.0
"""From tokenized records to a padded batch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


def preference_collate_fn(
    data_batch: list[dict[str, Any]],
    tokenizer: Any,
    make_sequence_length_divisible_by: int,
    add_loss_mask: bool,
) -> BatchedDataDict[Any]:
    """Pad pairs into one batch, chosen and rejected answers interleaved.

    Row ``2 i`` is the chosen answer of pair ``i`` and row ``2 i + 1`` the rejected one. Padding is
    on the right.

    Args:
        data_batch: Pairs from :func:`~nemo_rl_ref.data.processors.preference_preprocessor`.
        tokenizer: Its ``pad_token_id`` fills ``input_ids``.
        make_sequence_length_divisible_by: ``S`` is rounded up to a multiple of this.
        add_loss_mask: Whether to add ``token_mask``.

    Returns:
        A batch of ``2 len(data_batch)`` rows: ``input_ids`` int64 ``(B, S)``, ``input_lengths``
        int64 ``(B,)`` in tokens, ``sample_mask`` float32 ``(B,)``, and with ``add_loss_mask``
        ``token_mask`` int64 ``(B, S)``, 1 on the tokens of the last message.

    Raises:
        ValueError: If ``data_batch`` is empty.
    """
    if not data_batch:
        raise ValueError("data_batch: got no pairs, expected at least one")
    logs = [datum[f"message_log_{side}"] for datum in data_batch for side in ("chosen", "rejected")]
    rows = [torch.cat([message["token_ids"] for message in log]) for log in logs]
    lengths = torch.tensor([len(row) for row in rows])
    multiple = make_sequence_length_divisible_by
    width = -(-int(lengths.max()) // multiple) * multiple

    input_ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    missing = width - input_ids.shape[1]
    data: BatchedDataDict[Any] = BatchedDataDict(
        {
            "input_ids": torch.nn.functional.pad(
                input_ids, (0, missing), value=tokenizer.pad_token_id
            ),
            "input_lengths": lengths,
            "sample_mask": torch.tensor(
                [datum["loss_multiplier"] for datum in data_batch]
            ).repeat_interleave(2),
        }
    )
    if add_loss_mask:
        answers = torch.tensor([len(log[-1]["token_ids"]) for log in logs])
        column = torch.arange(width)
        before, end = (lengths - answers).unsqueeze(-1), lengths.unsqueeze(-1)
        data["token_mask"] = ((column >= before) & (column < end)).long()
    return data
