# SPDX-License-Identifier: Apache-2.0
"""Making a failing batch small."""

from __future__ import annotations

from collections.abc import Callable

from nemo_rl_ref.contract._batches import Batch


def shrink(batch: Batch, group: int, shows: Callable[[Batch], bool]) -> Batch:
    """Drops rows and token columns as long as the batch still shows the problem.

    First halves of the examples, then single ones, then columns from the right. The result cannot
    lose any one example or column more.

    Args:
        batch: a batch that shows the problem.
        group: rows of an example, which stay together.
        shows: whether a batch shows it.
    """
    size = batch.rows // group
    while size:
        batch = _drop_rows(batch, group, size, shows)
        size //= 2
    changed = True
    while changed:
        changed = False
        for column in range(batch.tokens - 1, 0, -1):
            smaller = batch.columns([c for c in range(batch.tokens) if c != column])
            if smaller.tokens >= 2 and shows(smaller):
                batch, changed = smaller, True
        fewer = _drop_rows(batch, group, 1, shows)
        changed |= fewer.rows < batch.rows
        batch = fewer
    return batch


def _drop_rows(batch: Batch, group: int, size: int, shows: Callable[[Batch], bool]) -> Batch:
    """Drops runs of `size` examples from the end on."""
    start = batch.rows // group - size
    while start >= 0:
        kept = [r for r in range(batch.rows) if not start <= r // group < start + size]
        if kept and shows(batch.take(kept)):
            batch = batch.take(kept)
        start -= size
    return batch
