# SPDX-License-Identifier: Apache-2.0
"""Probes: huge log-ratios, empty responses and empty batches give finite numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.contract._batches import Batch
from nemo_rl_ref.contract._calls import Result, call
from nemo_rl_ref.contract._probes import Finding, NotApplicable, Subject

_FAR = 1e4
Pattern = Callable[[Tensor], Tensor]

#: Where the policy is above: one sign a tensor, or alternating along a dimension.
_PATTERNS: dict[str, Pattern] = {
    "above everywhere": lambda t: torch.ones_like(t, dtype=torch.bool),
    "below everywhere": lambda t: torch.zeros_like(t, dtype=torch.bool),
    "above in even rows": lambda t: _even(t, 0),
    "above in odd rows": lambda t: ~_even(t, 0),
    "above in even columns": lambda t: _even(t, min(1, t.ndim - 1)),
    "above in odd columns": lambda t: ~_even(t, min(1, t.ndim - 1)),
    "above in even places of the last dimension": lambda t: _even(t, t.ndim - 1),
}


def far_log_ratios(subject: Subject, batch: Batch) -> Finding:
    """The model's output is 1e4 above or below what it is compared with."""
    largest, metrics = 0.0, set()
    for label, far in _far_apart(batch):
        result = call(subject.loss_fn, far)
        largest = max(largest, abs(result.value))
        metrics |= {name for name, value in result.metrics.items() if not math.isfinite(value)}
        if not result.all_finite():
            problem = f"{label}: {_not_finite(result)}"
            return Finding("±1e4: not finite", math.inf, problem, far)
    note = f" (metrics not finite: {', '.join(sorted(metrics))})" if metrics else ""
    return Finding(f"±1e4: loss up to {largest:.2g}{note}", largest)


def empty_responses(subject: Subject, batch: Batch) -> Finding:
    """Responses without a token, in the first row, the second, the first example, everywhere."""
    names = [name for name in batch.free if ("inputs", name) in batch.shifts]
    if not names:
        raise NotApplicable("empty responses: no input has tokens")
    cases = {"row 0": [0], "row 1": [1], "rows 0 and 1": [0, 1], "all rows": [*range(batch.rows)]}
    for label, rows in cases.items():
        if max(rows) >= batch.rows:
            continue
        mask = batch.token_mask
        mask[rows] = False
        empty = batch.with_tokens(mask)
        result = call(subject.loss_fn, empty)
        problem = "" if result.all_finite() else _not_finite(result)
        for name in names:
            if result.grads[name][rows].count_nonzero() and not problem:
                problem = f"gradient by {name} is not zero there"
        if problem:
            problem = f"no tokens in {label}: {problem}"
            return Finding("empty responses: wrong", math.inf, problem, empty)
    return Finding("empty responses: finite, no gradient there")


def nothing_valid(subject: Subject, batch: Batch) -> Finding:
    """A global batch and a micro-batch of which nothing is valid: loss and gradient are zero."""
    empty = batch.with_samples(torch.zeros(batch.rows))
    cases = {"global batch": None, "micro-batch": batch.counts()}
    for label, counts in cases.items():
        result = call(subject.loss_fn, empty, counts)
        problem = ""
        if result.value != 0:
            problem = f"the loss is {result.value:.3g}, expected 0"
        for name, grad in result.grads.items():
            if grad.count_nonzero():
                problem = problem or f"the gradient by {name} is not zero"
        if problem:
            found = f"a {label} with sample_mask 0 everywhere: {problem}"
            return Finding("nothing valid: wrong", math.inf, found, empty)
    return Finding("nothing valid: zero")


def _far_apart(batch: Batch) -> Iterator[tuple[str, Batch]]:
    """Yields batches whose model output is far from what it is compared with, each with a label.

    Log-probabilities are lowered, on one side or on the other, so that none gets above 0; also
    those of each stored tensor alone. Other outputs are moved up or down.
    """
    logprobs = [(part, name) for part, name in batch.floating() if "logprobs" in name]
    stored = [(part, name) for part, name in logprobs if not _is_free(batch, part, name)]
    compares = len(stored) < len(logprobs)  # the output itself is log-probabilities

    for label, pattern in _PATTERNS.items():

        def change(part: str, name: str, tensor: Tensor, pattern: Pattern = pattern) -> Tensor:
            is_free = _is_free(batch, part, name)
            if not compares:
                shifted = torch.where(pattern(tensor), tensor + _FAR, tensor - _FAR)
                return shifted if is_free else tensor
            if (part, name) not in logprobs:
                return tensor
            return torch.where(pattern(tensor) != is_free, tensor - _FAR, tensor)

        yield f"the output 1e4 {label}", batch.map(change)

    for place in stored:

        def lower(part: str, name: str, tensor: Tensor, place: Any = place) -> Tensor:
            return tensor - _FAR if (part, name) == place else tensor

        yield f"only {place[1]} 1e4 lower", batch.map(lower)


def _is_free(batch: Batch, part: str, name: str) -> bool:
    return part == "inputs" and name in batch.free


def _even(tensor: Tensor, dim: int) -> Tensor:
    """Boolean, true at even places along a dimension."""
    shape = [1] * tensor.ndim
    shape[dim] = -1
    even = torch.arange(tensor.shape[dim]) % 2 == 0
    return even.reshape(shape).expand_as(tensor)


def _not_finite(result: Result) -> str:
    if not math.isfinite(result.value):
        return f"the loss is {result.value}"
    name, grad = next((n, g) for n, g in result.grads.items() if not g.isfinite().all())
    where = [int(i) for i in (~grad.isfinite()).nonzero()[0]]
    return f"the gradient by {name} is {grad[tuple(where)].item()} at {where}"
