# SPDX-License-Identifier: Apache-2.0
"""Probes: masked tokens and masked samples have no part in anything."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_rl_ref.contract._batches import Batch
from nemo_rl_ref.contract._calls import LIMIT, Result, call, difference
from nemo_rl_ref.contract._probes import Finding, NotApplicable, Probe, Subject


def masked_gradient(subject: Subject, batch: Batch) -> Finding:
    """The gradient is exactly zero where a mask is."""
    batch = with_masked(subject, batch)
    result = call(subject.loss_fn, batch)
    largest, problem = 0.0, ""
    for name, grad in result.grads.items():
        leaked = grad.abs().masked_fill(batch.valid("inputs", name), 0)
        size = float(leaked.nan_to_num(nan=float("inf")).max())
        if size > largest:
            index = [int(i) for i in (leaked == leaked.max()).nonzero()[0]]
            largest, problem = size, f"gradient by {name} is {size:.3g} at {index}, which is masked"
    return Finding(f"gradient where masked: {largest:.1e}", largest, problem, batch)


def garbage(kind: str, rows: str) -> Probe:
    """Returns the probe that puts garbage into all masked places.

    Args:
        kind: ``"huge"`` (its square overflows), ``"inf"`` or ``"NaN"``.
        rows: ``"masked tokens"`` of valid samples or ``"masked samples"``.
    """

    def probe(subject: Subject, batch: Batch) -> Finding:
        batch = with_masked(subject, batch)
        expected = call(subject.loss_fn, batch)
        for fill in _fills(kind, subject.dtype):
            filled = _filled(batch, batch.floating(), rows, fill)
            gap = difference(call(subject.loss_fn, filled), expected)
            if gap.size > LIMIT:
                names = [
                    place[1]
                    for place in batch.floating()
                    if place[0] == "inputs" or place[1] in subject.read
                    if _alone(subject, batch, place, rows, fill, expected)
                ]
                where = ", ".join(names) or "several tensors together"
                problem = f"{fill:.2g} in {rows} of {where}: {gap.detail}"
                return Finding(f"{kind} in {rows}: changes the result", gap.size, problem, filled)
        return Finding(f"{kind} in {rows}: changes nothing")

    probe.__name__ = f"{kind} in {rows}"
    return probe


def _alone(
    subject: Subject,
    batch: Batch,
    place: tuple[str, str],
    rows: str,
    fill: float,
    expected: Result,
) -> bool:
    """Whether garbage in one tensor changes the result."""
    result = call(subject.loss_fn, _filled(batch, [place], rows, fill))
    return difference(result, expected).size > LIMIT


def with_masked(subject: Subject, batch: Batch) -> Batch:
    """Returns the batch, with an example and a token masked out if none is."""
    if bool(batch.sample_mask.all()) and batch.rows > subject.group:
        mask = batch.sample_mask
        mask[-subject.group :] = False
        batch = batch.with_samples(mask)
    shown = batch.token_mask[:, 1:][batch.sample_mask]
    if bool(shown.all()) and any(shift == 1 for shift in batch.shifts.values()):
        mask = batch.token_mask
        mask[:, -1] = False
        batch = batch.with_tokens(mask)
    if all(bool(batch.valid(*place).all()) for place in batch.floating()):
        raise NotApplicable("the batch has nothing masked")
    return batch


def _fills(kind: str, dtype: torch.dtype) -> tuple[float, ...]:
    # Finite, and its square is not: 7e28 in float32.
    huge = torch.finfo(dtype).max ** 0.75
    return {"huge": (huge, -huge), "inf": (torch.inf, -torch.inf), "NaN": (torch.nan,)}[kind]


def _filled(batch: Batch, places: list[tuple[str, str]], rows: str, fill: float) -> Batch:
    """Returns the batch with `fill` at the masked entries of the tensors named."""

    def change(part: str, name: str, tensor: Tensor) -> Tensor:
        if (part, name) not in places:
            return tensor
        masked = ~batch.valid(part, name)
        in_row = batch.sample_mask.reshape(-1, *[1] * (tensor.ndim - 1))
        if rows == "masked samples":
            in_row = ~in_row
        return tensor.masked_fill(masked & in_row, fill)

    return batch.map(change)
