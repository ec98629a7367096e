# SPDX-License-Identifier: Apache-2.0
"""Preference pairs from a file to batches, in two calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from nemo_rl_ref.data.collate_fn import preference_collate_fn
from nemo_rl_ref.data.processors import preference_preprocessor
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.training.samples import order
from nemo_rl_ref.files.records import DataError, Records


def load_preferences(
    dataset: Records, tokenizer: Any, *, max_seq_length: int, mask_too_long: bool = False
) -> list[dict[str, Any]]:
    """Tokenize every pair of a preference dataset.

    Args:
        dataset: A :class:`~nemo_rl_ref.data.datasets.preference_datasets.BinaryPreferenceDataset`
            or :class:`~nemo_rl_ref.data.datasets.preference_datasets.PreferenceDataset`.
        tokenizer: A Hugging Face tokenizer with a chat template and a pad token.
        max_seq_length: Longest allowed prompt plus answer, in tokens.
        mask_too_long: What to do with a longer pair: ``False`` raises, ``True`` keeps it with
            weight zero and warns, as NeMo RL does.

    Returns:
        One dict a pair, as :func:`~nemo_rl_ref.data.processors.preference_preprocessor` makes it.

    Raises:
        DataError: If a pair is too long, or its two answers are the same tokens. The message
            names file and line.
        ValueError: If ``tokenizer`` has no chat template or no pad token.
    """
    if max_seq_length < 1:
        raise ValueError(f"max_seq_length: got {max_seq_length}, expected a positive integer")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer: it has no pad token; set tokenizer.pad_token")
    if not tokenizer.chat_template:
        raise ValueError("tokenizer: it has no chat template; set tokenizer.chat_template")
    pairs = []
    for index, (record, place) in enumerate(zip(dataset.dataset, dataset.places, strict=True)):
        # A first pass without a limit tells the true length.
        pair = preference_preprocessor(record, None, tokenizer, 1 << 62, index)
        longest = max(pair["length_chosen"], pair["length_rejected"])
        if longest > max_seq_length:
            if not mask_too_long:
                raise DataError(
                    f"{place}: the pair has {longest} tokens, more than "
                    f"max_seq_length={max_seq_length}; raise the limit, shorten the pair, or pass "
                    "mask_too_long=True to keep it with weight 0"
                )
            pair = preference_preprocessor(record, None, tokenizer, max_seq_length, index)
        elif _same_tokens(pair):
            raise DataError(
                f"{place}: chosen and rejected are the same tokens; "
                "a pair must differ to express a preference"
            )
        pairs.append(pair)
    return pairs


def preference_batches(
    pairs: list[dict[str, Any]],
    tokenizer: Any,
    *,
    batch_size: int,
    seed: int | None = None,
    drop_last: bool = True,
    make_sequence_length_divisible_by: int = 1,
) -> Iterator[BatchedDataDict[Any]]:
    """Yield padded batches of pairs: one pass over the data.

    Args:
        pairs: From :func:`load_preferences`.
        tokenizer: Its ``pad_token_id`` fills ``input_ids``.
        batch_size: Pairs a batch; the batch has ``2 * batch_size`` rows.
        seed: Shuffles the pairs as the first epoch of a run with this seed; ``None`` keeps their
            order.
        drop_last: Whether to leave out a last, smaller batch.
        make_sequence_length_divisible_by: Rounds the padded length up.

    Yields:
        Batches of :func:`~nemo_rl_ref.data.collate_fn.preference_collate_fn`.

    Raises:
        ValueError: If ``batch_size`` is not positive, or larger than the data while
            ``drop_last`` leaves nothing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected a positive number of pairs")
    if drop_last and batch_size > len(pairs):
        raise ValueError(
            f"batch_size: got {batch_size} with {len(pairs)} pairs and drop_last=True, "
            "which leaves no batch"
        )
    numbers = range(len(pairs)) if seed is None else order(len(pairs), seed, epoch=0)
    for start in range(0, len(numbers), batch_size):
        rows = numbers[start : start + batch_size]
        if drop_last and len(rows) < batch_size:
            return
        yield preference_collate_fn(
            [pairs[row] for row in rows],
            tokenizer,
            make_sequence_length_divisible_by=make_sequence_length_divisible_by,
            add_loss_mask=True,
        )


def _same_tokens(pair: dict[str, Any]) -> bool:
    chosen, rejected = (
        torch.cat([message["token_ids"] for message in pair[f"message_log_{side}"]])
        for side in ("chosen", "rejected")
    )
    return torch.equal(chosen, rejected)
