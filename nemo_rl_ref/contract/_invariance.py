# SPDX-License-Identifier: Apache-2.0
"""Probes: however a global batch is cut, padded or ordered, the result is the same."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nemo_rl_ref.contract._batches import Batch
from nemo_rl_ref.contract._calls import (
    Gap,
    Result,
    add_metrics,
    call,
    difference,
    is_count,
    is_extremum,
)
from nemo_rl_ref.contract._probes import Finding, NotApplicable, Subject, judge

#: Columns of padding that are added.
_EXTRA_PADDING = (1, 5, 64)


def micro_batches(subject: Subject, batch: Batch) -> Finding:
    """Losses, gradients and metrics of micro-batches sum to those of the global batch."""
    whole = call(subject.loss_fn, batch)
    counts = batch.counts()
    skip = unnormalized(subject, whole)
    gaps, note = [], ""
    for parts in _splits(subject.groups(batch)):
        results = [call(subject.loss_fn, batch.take(rows), counts) for rows in parts]
        total = join(batch, parts, results)
        gaps.append((_label(parts), difference(total, whole, skip)))
        if skip:
            shown = (f"{n} {whole.metrics[n]:.3g} (summed {total.metrics[n]:.3g})" for n in skip)
            note = "; not compared: " + ", ".join(shown)
    return judge("micro-batches", gaps, note=note)


def sequence_packing(subject: Subject, batch: Batch) -> Finding:
    """One call a sequence without its padding, as NeMo RL's packing wrapper makes it.

    For a loss over pairs it is one call a pair: a single sequence of a pair has no loss.
    """
    whole = call(subject.loss_fn, batch)
    parts = subject.groups(batch)
    results = []
    for rows in parts:
        part = batch.take(rows)
        part = part.columns(range(_length(part)))
        # The wrapper passes a plain dict.
        results.append(call(subject.loss_fn, part, batch.counts(), make_data=dict))
    gap = difference(join(batch, parts, results), whole, unnormalized(subject, whole))
    unit = "pair" if subject.group == 2 else "sequence"
    return judge(f"sequence packing, one call a {unit}", [("all rows", gap)])


def counts_of_one(subject: Subject, batch: Batch) -> Finding:
    """Called with counts of 1 and divided later, as NeMo RL's split trainer does."""
    if subject.loss_type is None:
        raise NotApplicable("counts of 1: no loss_type")
    whole = call(subject.loss_fn, batch)
    seqs, toks = (count.item() for count in batch.counts())
    if not (seqs and toks):
        raise NotApplicable("counts of 1: nothing is valid")
    table = normalizations(subject)
    own = toks if subject.loss_type == "token_level" else seqs
    divisors = {"tokens": toks, "sequences": seqs, "none": 1.0}
    raw = call(subject.loss_fn, batch, (torch.tensor(1.0), torch.tensor(1.0)))
    metrics = {
        name: value if is_extremum(name) else value / divisors.get(table.get(name, ""), own)
        for name, value in raw.metrics.items()
    }
    grads = {name: grad / own for name, grad in raw.grads.items()}
    # Without a table the metrics promise nothing.
    skip = unnormalized(subject, whole) if table else whole.metrics
    gap = difference(Result(raw.value / own, grads, metrics), whole, skip)
    return judge("counts of 1", [("divided by the count of loss_type or the table", gap)])


def unequal_ranks(subject: Subject, batch: Batch) -> Finding:
    """Ranks with unequal shares.

    Trainers multiply the loss by the number of ranks and DDP averages the gradients: they add up.
    ``torch.distributed`` says that there are ranks, and no collective works: ranks call a loss
    unequally often, so that a loss that communicates would hang. A loss that has imported such a
    function by its own name still sees one process.
    """
    whole = call(subject.loss_fn, batch)
    skip = unnormalized(subject, whole)
    gaps = []
    for parts in _splits(subject.groups(batch)):
        results = []
        for rank, rows in enumerate(parts):
            with _as_rank(rank, len(parts)):
                results.append(call(subject.loss_fn, batch.take(rows), batch.counts()))
        gaps.append((_label(parts), difference(join(batch, parts, results), whole, skip)))
    return judge("unequal ranks", gaps)


def extra_padding(subject: Subject, batch: Batch) -> Finding:
    """More padding on the right changes nothing and gets no gradient."""
    whole = call(subject.loss_fn, batch)
    gaps = []
    for columns in _EXTRA_PADDING:
        padded = call(subject.loss_fn, batch.padded(columns))
        for name, grad in padded.grads.items():
            if ("inputs", name) in batch.shifts:
                kept = whole.grads[name].shape[1]
                if grad[:, kept:].count_nonzero():
                    detail = f"gradient by {name} in the padding"
                    gaps.append((f"{columns} columns", Gap(float("inf"), name, detail)))
                padded.grads[name] = grad[:, :kept]
        gaps.append((f"{columns} columns", difference(padded, whole)))
    return judge("padding", gaps)


def sample_order(subject: Subject, batch: Batch) -> Finding:
    """Reordered rows (or pairs) change nothing but the order of the gradient's rows."""
    groups = subject.groups(batch)
    _need_two(groups)
    whole = call(subject.loss_fn, batch)
    gaps = []
    orders = {"reversed": groups[::-1], "rotated": groups[1:] + groups[:1]}
    for label, order in orders.items():
        rows = [row for group in order for row in group]
        result = call(subject.loss_fn, batch.take(rows))
        gaps.append((label, difference(join(batch, [rows], [result]), whole)))
    return judge("order", gaps)


def join(batch: Batch, parts: list[list[int]], results: list[Result]) -> Result:
    """Adds up the results of parts of a batch; their gradients go to where they came from."""
    grads = {}
    for name in batch.free:
        total = torch.zeros_like(batch.inputs[name])
        for rows, result in zip(parts, results, strict=True):
            grad = result.grads[name]
            whole_rows = total[rows]
            if grad.ndim > 1:
                whole_rows[:, : grad.shape[1]] += grad
            else:
                whole_rows += grad
            total[rows] = whole_rows
        grads[name] = total
    value = sum(result.value for result in results)
    return Result(value, grads, add_metrics([result.metrics for result in results]))


def normalizations(subject: Subject) -> dict[str, Any]:
    """The values of ``metric_normalizations`` by metric; empty without the attribute."""
    table = getattr(subject.loss_fn, "metric_normalizations", None)
    if not isinstance(table, dict):
        return {}
    return {name: getattr(kind, "value", None) for name, kind in table.items()}


def unnormalized(subject: Subject, result: Result) -> list[str]:
    """Metrics that are marked as not normalized and are neither counts nor extrema."""
    table = normalizations(subject)
    return [
        name
        for name in result.metrics
        if table.get(name) == "none" and not is_count(name) and not is_extremum(name)
    ]


def _splits(groups: list[list[int]]) -> list[list[list[int]]]:
    """Partitions of the rows: unequal in both ways, alternating, and one example a part."""
    _need_two(groups)
    cuts = [[groups[:1], groups[1:]], [groups[:-1], groups[-1:]], [groups[::2], groups[1::2]]]
    cuts.append([[group] for group in groups])
    return [[[row for group in part for row in group] for part in cut] for cut in cuts]


def _need_two(groups: list[list[int]]) -> None:
    if len(groups) < 2:
        raise NotApplicable("the batch has one example")


def _label(parts: list[list[int]]) -> str:
    return "+".join(str(len(rows)) for rows in parts) + " rows"


def _length(batch: Batch) -> int:
    """Columns up to the end of the longest sequence; 2 at least, so that a token is predicted."""
    lengths: Tensor | None = batch.data.get("input_lengths")
    if lengths is None:
        lengths = (batch.token_mask * torch.arange(1, batch.tokens + 1)).amax(-1)
    return max(2, min(batch.tokens, int(lengths.max())))


def _as_rank(rank: int, size: int) -> Any:
    """Makes ``torch.distributed`` say that this process is one of several."""
    return mock.patch.multiple(
        "torch.distributed",
        is_initialized=lambda: True,
        get_rank=lambda group=None: rank,
        get_world_size=lambda group=None: size,
    )
