# SPDX-License-Identifier: Apache-2.0
"""What a probe is given and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from nemo_rl_ref.contract._batches import Batch
from nemo_rl_ref.contract._calls import LIMIT, Gap


class NotApplicable(Exception):
    """A probe has nothing to look at in this loss or this batch."""


@dataclass(frozen=True)
class Subject:
    """The loss that is checked.

    Attributes:
        loss_fn: the loss.
        loss_type: value of its ``loss_type``, or None if it has none.
        input_type: value of its ``input_type``, or None if it has none.
        group: rows that belong together: 2 for losses over pairs, else 1.
        make: makes a batch from a seed and a dtype.
        dtype: of the batches: float64, or float32 if the loss takes no float64.
        read: keys of the data that an ordinary call reads.
    """

    loss_fn: Callable[..., Any]
    loss_type: str | None
    input_type: str | None
    group: int
    make: Callable[[int, torch.dtype], Batch]
    dtype: torch.dtype
    read: frozenset[str]

    def groups(self, batch: Batch) -> list[list[int]]:
        """The rows of each example."""
        return [list(range(i, i + self.group)) for i in range(0, batch.rows, self.group)]


@dataclass(frozen=True)
class Finding:
    """What a probe measured on a batch.

    Attributes:
        measured: in words.
        size: the number in it that says how bad it is; of several batches the worst is reported.
        problem: what is wrong, or empty.
        batch: the batch that shows the problem, if it is not the one that the probe was given.
        raised: name of the exception that the loss raised, if that is the problem.
        probe: which probe it is of.
    """

    measured: str
    size: float = 0.0
    problem: str = ""
    batch: Batch | None = None
    raised: str = ""
    probe: str = ""


Probe = Callable[[Subject, Batch], Finding]


def probe_name(probe: Probe) -> str:
    """The name of a probe, in words."""
    return getattr(probe, "__name__", "probe").replace("_", " ")


def judge(
    title: str, gaps: Iterable[tuple[str, Gap]], limit: float = LIMIT, note: str = ""
) -> Finding:
    """Turns labeled differences into a finding: the largest, and a problem if over the limit."""
    gaps = list(gaps)
    label, gap = max(gaps, key=lambda item: item[1].size)
    measured = f"{title}: largest difference {gap.size:.1e}{note}"
    problem = f"{title}, {label}: {gap.detail}" if gap.size > limit else ""
    return Finding(measured, gap.size, problem)
