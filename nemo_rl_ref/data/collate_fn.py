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

    def pad(rows: list[torch.Tensor], fill: int) -> torch.Tensor:
        padded = pad_sequence(rows, batch_first=True, padding_value=fill)
        more = -padded.shape[1] % make_sequence_length_divisible_by
        return torch.nn.functional.pad(padded, (0, more), value=fill)

    data: BatchedDataDict[Any] = BatchedDataDict(
        {
            "input_ids": pad(rows, tokenizer.pad_token_id),
            "input_lengths": torch.tensor([len(row) for row in rows]),
            "sample_mask": torch.tensor(
                [datum["loss_multiplier"] for datum in data_batch]
            ).repeat_interleave(2),
        }
    )
    if add_loss_mask:
        data["token_mask"] = pad([last_message_mask(log) for log in logs], 0)
    return data


def last_message_mask(message_log: list[dict[str, Any]]) -> torch.Tensor:
    """Which tokens of a conversation are of its last message. Not in NeMo RL.

    Args:
        message_log: Messages with ``token_ids``.

    Returns:
        0 and 1, int64 ``(T,)``.
    """
    return torch.cat([torch.full_like(m["token_ids"], m is message_log[-1]) for m in message_log])
