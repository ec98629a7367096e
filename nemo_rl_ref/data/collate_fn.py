# SPDX-License-Identifier: Apache-2.0
"""From tokenized records to a padded batch."""

from __future__ import annotations

from typing import Any

from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.padding import flat_pair, pad_pairs


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
    pairs = [flat_pair(datum) for datum in data_batch]
    return pad_pairs(
        pairs, tokenizer.pad_token_id, make_sequence_length_divisible_by, add_loss_mask
    )
