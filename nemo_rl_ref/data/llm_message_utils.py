# SPDX-License-Identifier: Apache-2.0
"""From message logs to a padded batch: which tokens are trained on, joining, padding.

A message log is a conversation as a list of messages, ``{"role": str, "content": str,
"token_ids": Tensor (T,), ...}``. NeMo RL's trainers keep samples in this form until the step that
needs a batch. The part for text; images and other packed media are left out.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


def message_log_to_flat_messages(message_log: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the messages of one conversation.

    Args:
        message_log: Messages. A key may be missing in some of them.

    Returns:
        For each key its tensors, concatenated, or the list of its other values.

    Raises:
        RuntimeError: If the tensors of a key differ in their number of dimensions.
    """
    flat: dict[str, Any] = {}
    for message in message_log:
        for key, value in message.items():
            flat.setdefault(key, []).append(value)
    for key, values in flat.items():
        if isinstance(values[0], Tensor):
            shapes = [tuple(value.shape) for value in values]
            if len({len(shape) for shape in shapes}) > 1:
                raise RuntimeError(f"key {key!r} has shapes {shapes}, expected as many dimensions")
            flat[key] = torch.cat(values)
    return flat


def add_loss_mask_to_message_log(
    batch_message_log: list[list[dict[str, Any]]],
    roles_to_train_on: list[str] = ["assistant"],  # noqa: B006, NeMo RL's default, not changed here
    only_unmask_final: bool = False,
) -> None:
    """Add ``token_loss_mask`` to every message, in place: 1 on tokens that are trained on.

    Args:
        batch_message_log: Message logs with ``role`` and ``token_ids``, int64 ``(T,)``.
        roles_to_train_on: Whose messages are trained on, compared in lower case.
        only_unmask_final: Train on the last message alone, whoever it is from.
    """
    roles = [role.lower() for role in roles_to_train_on]
    for message_log in batch_message_log:
        for number, message in enumerate(message_log):
            is_final = number == len(message_log) - 1
            wanted = is_final if only_unmask_final else message["role"] in roles
            message["token_loss_mask"] = torch.full_like(message["token_ids"], int(wanted))


def batched_message_log_to_flat_message(
    message_log_batch: list[list[dict[str, Any]]],
    pad_value_dict: Optional[dict[str, int]] = None,
    make_sequence_length_divisible_by: int = 1,
) -> tuple[BatchedDataDict[Any], Tensor]:
    """Join the messages of each conversation and pad on the right.

    Args:
        message_log_batch: B message logs.
        pad_value_dict: The padding value by key; 0 for keys that are not in it.
        make_sequence_length_divisible_by: ``S`` is rounded up to a multiple of this.

    Returns:
        The batch, in which each key holds a tensor ``(B, S, ...)`` or a list of length B, and the
        lengths before padding, int32 ``(B,)`` in tokens. A row's length is that of its longest
        tensor, and where a tensor is shorter, or missing, padding takes its place. Without
        messages or without tensors the lengths are empty.

    Raises:
        RuntimeError: If the tensors of a key differ in dtype or device.
    """
    rows = [message_log_to_flat_messages(message_log) for message_log in message_log_batch]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    sizes = [[len(value) for value in row.values() if isinstance(value, Tensor)] for row in rows]
    if not any(sizes):
        first = {key: [row[key][0] if key in row else None for row in rows] for key in keys}
        return BatchedDataDict(first), torch.empty(0)

    lengths = torch.tensor([max(size, default=0) for size in sizes], dtype=torch.int32)
    multiple = make_sequence_length_divisible_by
    width = -(-int(lengths.max()) // multiple) * multiple
    batch: BatchedDataDict[Any] = BatchedDataDict()
    for key in keys:
        values = [row.get(key) for row in rows]
        if isinstance(values[0], Tensor):
            batch[key] = _stack(key, values, width, (pad_value_dict or {}).get(key, 0))
        else:
            batch[key] = values
    return batch, lengths


def _stack(key: str, values: list[Tensor | None], width: int, pad_value: int) -> Tensor:
    """Tensors as rows of the same width, (B, width, ...). None is a row of padding."""
    kinds = {(value.dtype, value.device) for value in values if value is not None}
    if len(kinds) > 1:
        found = sorted(f"{dtype} on {device}" for dtype, device in kinds)
        raise RuntimeError(f"key {key!r} has {', '.join(found)}, expected one dtype and device")
    first = next(value for value in values if value is not None)
    rows = first.new_full((len(values), width, *first.shape[1:]), pad_value)
    for row, value in zip(rows, values, strict=True):
        if value is not None:
            row[: len(value)] = value
    return rows
