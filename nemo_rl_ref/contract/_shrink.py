# SPDX-License-Identifier: Apache-2.0
"""Making a failing batch small."""

from __future__ import annotations

from collections.abc import Callable

from nemo_rl_ref.contract._batches import Batch

#: Batches that are tried at most. A loss with random numbers would go on for long.
_TRIES = 150


def shrink(batch: Batch, group: int, shows: Callable[[Batch], bool]) -> Batch:
    """Drops rows and token columns as long as the batch still shows the problem.

    First halves of the examples, then single ones, then columns from the right. The result cannot
    lose any one example or column more, unless the tries are used up.

    Args:
        batch: a batch that shows the problem.
        group: rows of an example, which stay together.
        shows: whether a batch shows it.
    """
    tries = 0

    def accepts(smaller: Batch) -> bool:
        nonlocal tries
        tries += 1
        return tries <= _TRIES and shows(smaller)

    size = batch.rows // group // 2
    while size > 1:
        batch = _drop_rows(batch, group, size, accepts)
        size //= 2
    before = None
    while batch is not before:
        before = batch
        batch = _drop_rows(batch, group, 1, accepts)
        batch = _drop_columns(batch, accepts)
    return batch


def _drop_rows(batch: Batch, group: int, size: int, accepts: Callable[[Batch], bool]) -> Batch:
    """Drops runs of `size` examples, from the end on."""
    for start in range(batch.rows // group - size, -1, -size):
        kept = [r for r in range(batch.rows) if not start <= r // group < start + size]
        smaller = batch.take(kept)
        if kept and accepts(smaller):
            batch = smaller
    return batch


def _drop_columns(batch: Batch, accepts: Callable[[Batch], bool]) -> Batch:
    """Drops single columns, from the end on; column 0 and one more stay."""
    for column in range(batch.tokens - 1, 0, -1):
        smaller = batch.columns([c for c in range(batch.tokens) if c != column])
        if smaller.tokens >= 2 and accepts(smaller):
            batch = smaller
    return batch
