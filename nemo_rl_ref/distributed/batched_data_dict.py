# SPDX-License-Identifier: Apache-2.0
"""A dictionary of tensors and lists that share their first dimension: the batch.

The part of NeMo RL's class that text-only training uses. Left out: images and other packed
media, dynamic batching and sequence packing.
"""

from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Generic, Self, TypeVar

import torch

from nemo_rl_ref.distributed.collectives import gather_jagged_object_lists, rebalance_nd_tensor

DictT = TypeVar("DictT", bound=Mapping[str, Any])


class BatchedDataDict(UserDict, Generic[DictT]):
    """A batch: keys to tensors (B, ...) or lists of length B.

    ``BatchedDataDict[DPOLossDataDict]`` tells a reader and a type checker which keys it holds.
    """

    @classmethod
    def from_batches(
        cls,
        batches: Sequence[Mapping[Any, Any]],
        pad_value_dict: dict[str, int | float] | None = None,
        *,
        allow_missing_packed_tensors: bool = False,
    ) -> Self:
        """Concatenates batches along the rows.

        Tensors of two or more dimensions are padded on the right of dimension 1 to the longest.
        The keys of the result are sorted.

        Args:
            batches: the batches; an empty mapping counts as a batch without rows.
            pad_value_dict: the padding value by key; 0 for keys that are not in it.
            allow_missing_packed_tensors: must be False; there are no packed tensors here.

        Raises:
            KeyError: if a batch with rows lacks a key that another has.
            TypeError: if a value is neither a tensor nor a list.
        """
        if allow_missing_packed_tensors:
            raise NotImplementedError("allow_missing_packed_tensors: packed media are left out")
        pad_values = pad_value_dict or {}
        result = cls()
        for key in sorted({key for batch in batches for key in batch}):
            lacking = [
                i
                for i, batch in enumerate(batches)
                if key not in batch and batch and _rows(next(iter(batch.values())))
            ]
            if lacking:
                raise KeyError(
                    f"key {key!r} is missing in batches {lacking}, which are non-empty batches"
                )
            values = [batch[key] for batch in batches if key in batch]
            result[key] = _concatenate(key, values, pad_values.get(key, 0))
        return result

    def all_gather(self, group: torch.distributed.ProcessGroup) -> Self:
        """Concatenates the batches of all ranks, in rank order, on every rank.

        Ranks may have different numbers of rows; the other dimensions must agree.

        Args:
            group: the process group, one whose backend fits the tensors' device.
        """
        gathered = type(self)()
        for key, value in self.data.items():
            if isinstance(value, torch.Tensor):
                gathered[key] = rebalance_nd_tensor(value, group=group)
            elif isinstance(value, list):
                gathered[key] = gather_jagged_object_lists(value, group=group)
            else:
                raise _unsupported(key, value)
        return gathered

    def chunk(self, rank: int, chunks: int) -> "SlicedDataDict":
        """Splits the rows into equal consecutive parts and returns a copy of one.

        NeMo RL also refuses every `rank` that is not below B / `chunks`, so code that goes there
        needs B of at least `chunks` squared to use all ranks. Here every rank is served.

        Args:
            rank: which part, 0 to `chunks` - 1.
            chunks: number of parts; must divide B.

        Raises:
            ValueError: if `chunks` does not divide B, or `rank` is out of range.
        """
        rows = self._common_rows()
        if rows % chunks:
            raise ValueError(f"chunks is {chunks}, expected a divisor of the {rows} rows")
        if not 0 <= rank < chunks:
            raise ValueError(f"rank is {rank}, expected 0 to {chunks - 1}, as chunks is {chunks}")
        part = self.slice(rank * (rows // chunks), (rank + 1) * (rows // chunks))
        for key, value in part.items():
            part[key] = value.clone() if torch.is_tensor(value) else list(value)
        return part

    def reorder_data(self, reorded_indices: list[int]):
        """Sort the rows, in place, by one number a row.

        Row i goes to place ``reorded_indices[i]``. It undoes a selection: if
        ``b = a.select_indices(order)`` then ``b.reorder_data(order)`` restores a's order.

        Args:
            reorded_indices: B numbers; equal ones keep their order.

        Raises:
            ValueError: if the number of indices is not B.
        """
        rows = self._common_rows()
        if len(reorded_indices) != rows:
            raise ValueError(
                f"reorded_indices has {len(reorded_indices)} entries, expected {rows}, one a row"
            )
        order = sorted(range(rows), key=lambda row: reorded_indices[row])
        self.data = {key: _select(key, value, order) for key, value in self.data.items()}

    def shard_by_batch_size(
        self,
        shards: int,
        batch_size: int | None = None,
        allow_uneven_shards: bool = False,
        dynamic_batching_args: Mapping[str, Any] | None = None,
        sequence_packing_args: Mapping[str, Any] | None = None,
    ) -> list["SlicedDataDict"]:
        """Deals the rows to shards so that each shard has its part of every global batch.

        The rows are cut into consecutive global batches of `batch_size`, each of these into
        `shards` consecutive parts, and shard k gets the k-th part of each. With rows
        a b c d e f g h, ``batch_size=4`` and ``shards=2``, shard 0 is a b e f, shard 1 c d g h.

        Args:
            shards: number of shards.
            batch_size: rows of a global batch; None for all rows. Must divide B.
            allow_uneven_shards: let the last shards be smaller, or empty, where `shards` does not
                divide B. Not together with `batch_size`.
            dynamic_batching_args: must be None; not implemented here.
            sequence_packing_args: must be None; not implemented here.

        Raises:
            NotImplementedError: if one of the last two arguments is given.
            ValueError: if the sizes do not divide, or rows differ between keys.
        """
        if dynamic_batching_args is not None:
            raise NotImplementedError("dynamic_batching_args: dynamic batching is left out")
        if sequence_packing_args is not None:
            raise NotImplementedError("sequence_packing_args: sequence packing is left out")
        if allow_uneven_shards and batch_size is not None:
            raise ValueError(
                f"batch_size is {batch_size}, expected None together with allow_uneven_shards=True"
            )
        rows = self._common_rows()
        batch_size = rows if batch_size is None else batch_size
        if batch_size and rows % batch_size:
            raise _Refused(
                f"Total batch size ({rows}) is not a multiple of batch_size ({batch_size})"
            )
        if batch_size % shards and not allow_uneven_shards:
            raise _Refused(f"Batch size ({batch_size}) is not a multiple of shards ({shards})")
        size = -(-batch_size // shards)  # rounded up
        starts = range(0, rows, batch_size) if batch_size else range(0)
        result = []
        for shard in range(shards):
            parts = [
                range(min(start + shard * size, rows), min(start + (shard + 1) * size, rows))
                for start in starts
            ]
            picked = [row for part in parts for row in part]
            result.append(
                SlicedDataDict(
                    {key: _select(key, value, picked) for key, value in self.data.items()}
                )
            )
        return result

    def get_batch(self, batch_idx: int, batch_size: int | None = None) -> "SlicedDataDict":
        """Returns the rows of the global batch number `batch_idx`, as views.

        Args:
            batch_idx: which batch, from 0.
            batch_size: its number of rows. None, which in NeMo RL asks for a packed batch, is an
                error here.
        """
        if batch_size is None:
            raise ValueError("batch_size is None, expected a number: there are no packed batches")
        return self.slice(batch_size * batch_idx, batch_size * (batch_idx + 1))

    def slice(self, start: int, end: int) -> "SlicedDataDict":
        """Returns rows `start` to `end` - 1. Tensors are views; lists end where they end.

        Raises:
            ValueError: if a tensor has fewer than `end` rows.
        """
        result = SlicedDataDict()
        for key, value in self.data.items():
            if isinstance(value, torch.Tensor) and end > value.shape[0]:
                raise ValueError(
                    f"end is {end}, expected at most {value.shape[0]}, rows of {key!r}"
                )
            result[key] = value[start:end]
        return result

    def repeat_interleave(self, num_repeats: int, *, share_immutable_media: bool = False) -> Self:
        """Repeats each row `num_repeats` times: a b becomes a a b b. List items are deep copies.

        Args:
            num_repeats: how often.
            share_immutable_media: must be False; there are no media here.
        """
        if share_immutable_media:
            raise NotImplementedError("share_immutable_media: media are left out")
        result = type(self)()
        for key, value in self.data.items():
            if torch.is_tensor(value):
                result[key] = value.repeat_interleave(num_repeats, dim=0)
            else:
                result[key] = [deepcopy(item) for item in value for _ in range(num_repeats)]
        return result

    def truncate_tensors(self, dim: int, truncated_len: int):
        """Cuts dimension `dim` of every tensor that has it to `truncated_len`, in place."""
        for key, value in self.data.items():
            if torch.is_tensor(value) and value.ndim > dim:
                self.data[key] = value.narrow(dim, 0, truncated_len)

    def make_microbatch_iterator(self, microbatch_size: int) -> Iterator["SlicedDataDict"]:
        """Yields consecutive micro-batches, as views.

        Args:
            microbatch_size: rows of each; must divide B.

        Raises:
            ValueError: if it does not.
        """
        rows = self.size
        if rows % microbatch_size:
            raise ValueError(
                f"microbatch_size is {microbatch_size}, expected a divisor of the {rows} rows"
            )
        for start in range(0, rows, microbatch_size):
            yield self.slice(start, start + microbatch_size)

    @property
    def size(self) -> int:
        """Number of rows of the first key; 0 without keys."""
        return _rows(next(iter(self.data.values()))) if self.data else 0

    def to(self, device: str | torch.device) -> Self:
        """Moves the tensors to a device, in place, and returns the batch."""
        for key, value in self.data.items():
            if torch.is_tensor(value):
                self.data[key] = value.to(device)
        return self

    def select_indices(self, indices: list[int] | torch.Tensor) -> Self:
        """Returns the rows named by `indices`, in that order, copied.

        Raises:
            TypeError: if a value is neither a tensor nor a list.
        """
        return type(self)({key: _select(key, value, indices) for key, value in self.data.items()})

    def get_dict(self) -> dict[Any, Any]:
        """Returns the dictionary underneath, not a copy."""
        return self.data

    def _common_rows(self) -> int:
        """Number of rows, which must be the same for every key."""
        rows = {key: _rows(value) for key, value in self.data.items()}
        if len(set(rows.values())) != 1:
            raise _Refused(
                f"Batch sizes are not the same across the rollout batch: the keys have {rows} rows"
            )
        return next(iter(rows.values()))


class _Refused(ValueError, AssertionError):
    """A value that cannot be used, where NeMo RL has an assertion: code that expects either works."""


class SlicedDataDict(BatchedDataDict):
    """A part of a larger batch. The type says so; nothing else differs."""


def _rows(value: torch.Tensor | Sequence[Any]) -> int:
    return len(value)


def _select(key: Any, value: Any, indices: Sequence[int] | torch.Tensor) -> Any:
    if isinstance(value, torch.Tensor):
        return value[indices]
    if isinstance(value, list):
        return [value[i] for i in indices]
    raise _unsupported(key, value)


def _concatenate(key: Any, values: list[Any], pad_value: int | float) -> Any:
    """Concatenates lists, or tensors after padding dimension 1 on the right."""
    if all(isinstance(value, list) for value in values):
        return [item for value in values for item in value]
    for value in values:
        if not isinstance(value, torch.Tensor):
            raise _unsupported(key, value)
    if all(value.ndim == 1 for value in values):
        return torch.cat(values)
    # As in NeMo RL, a (0, S) batch does not widen the others, and a (0, S, ...) batch does.
    longest = max((v.shape[1] for v in values if v.ndim > 2 or len(v)), default=0)
    padded = []
    for value in values:
        # `pad` counts dimensions from the last, and takes negative widths to cut.
        widths = (0, 0) * (value.ndim - 2) + (0, longest - value.shape[1])
        padded.append(torch.nn.functional.pad(value, widths, value=pad_value))
    return torch.cat(padded)


def _unsupported(key: Any, value: Any) -> TypeError:
    return TypeError(f"key {key!r} holds a {type(value).__name__}, expected a tensor or a list")
