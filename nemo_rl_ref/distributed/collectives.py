# SPDX-License-Identifier: Apache-2.0
"""Gathering of batches whose number of rows differs between ranks."""

from typing import TypeVar

import torch

T = TypeVar("T")


def rebalance_nd_tensor(
    tensor: torch.Tensor, group: torch.distributed.ProcessGroup | None = None
) -> torch.Tensor:
    """Concatenates the tensors of all ranks along dimension 0, in rank order, on every rank.

    Works on the device of `tensor`: CPU tensors with gloo, CUDA tensors with NCCL.

    Args:
        tensor: (rows of this rank, ...); the other dimensions and the dtype are the same on all
            ranks.
        group: the process group; None for the default group.

    Returns:
        (rows of all ranks, ...), same dtype and device.
    """
    ranks = torch.distributed.get_world_size(group)
    rows = torch.tensor([tensor.shape[0]], device=tensor.device)
    rows_by_rank = [torch.empty_like(rows) for _ in range(ranks)]
    torch.distributed.all_gather(rows_by_rank, rows, group=group)
    counts = [int(count) for count in rows_by_rank]

    # Collectives want equal shapes: pad to the longest, cut after the exchange.
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = [torch.empty_like(padded) for _ in range(ranks)]
    torch.distributed.all_gather(gathered, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def gather_jagged_object_lists(
    local_objects: list[T], group: torch.distributed.ProcessGroup | None = None
) -> list[T]:
    """Concatenates the lists of all ranks, in rank order, on every rank.

    Args:
        local_objects: the list of this rank; its items are pickled to the other ranks.
        group: the process group; None for the default group.

    Returns:
        The items of all ranks.
    """
    lists: list[list[T]] = [[] for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather_object(lists, local_objects, group=group)
    return [item for items in lists for item in items]
