# SPDX-License-Identifier: Apache-2.0
"""Probes: a call changes nothing, depends on nothing else, and takes the dtypes of training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.contract._batches import Batch
from nemo_rl_ref.contract._calls import Result, call, difference, start
from nemo_rl_ref.contract._probes import Finding, Probe, Subject

#: How far results may be from those of float64 on the same, rounded numbers.
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def inputs_kept(subject: Subject, batch: Batch) -> Finding:
    """Inputs, data and counts are bit for bit what they were."""
    made = start(subject.loss_fn, batch)
    made.finish()
    inputs, data, counts = made.passed
    seqs, toks = batch.counts()
    expected_counts = {"global_valid_seqs": seqs, "global_valid_toks": toks}
    expected_data = {k: batch.inputs[k] if k in batch.free else v for k, v in batch.data.items()}
    changed = [
        *_changed("", inputs, batch.inputs),
        *_changed("data ", dict(data), expected_data),
        *_changed("", counts, expected_counts),
    ]
    problem = f"the call changes {', '.join(changed)}" if changed else ""
    return Finding(f"inputs: {len(changed)} changed", float(len(changed)), problem)


def same_bits(subject: Subject, batch: Batch) -> Finding:
    """The same call again, after one with other numbers, gives the same bits."""
    first = call(subject.loss_fn, batch)
    call(subject.loss_fn, batch.take(range(batch.rows - 1, -1, -1)))
    again = call(subject.loss_fn, batch)
    if _same(first, again):
        return Finding("repeated: same bits")
    gap = difference(again, first)
    problem = f"a second call with the same inputs: {gap.detail}"
    return Finding("repeated: other bits", math.inf, problem)


def takes(dtype: torch.dtype) -> Probe:
    """Returns the probe that calls a loss with that dtype and compares with float64."""

    def probe(subject: Subject, batch: Batch) -> Finding:
        name = str(dtype).removeprefix("torch.")
        worst = 0.0
        # A trainer may pass the model's output in bfloat16 with float32 data.
        for part, data_dtype in (("inputs and data", dtype), ("inputs", torch.float32)):
            low = _cast(batch, dtype, data_dtype)
            actual = call(subject.loss_fn, low)
            expected = call(subject.loss_fn, _cast(low, subject.dtype, subject.dtype))
            if dtype == torch.bfloat16:
                # Rounding moves single ratios over a clip, so gradients are not compared; terms
                # that cancel leave their rounding, so small losses are compared with 1.
                size = abs(actual.value - expected.value) / max(abs(expected.value), 1.0)
            else:
                grads = {key: grad.to(subject.dtype) for key, grad in actual.grads.items()}
                plain = Result(actual.value, grads, {})
                size = difference(plain, expected, expected.metrics).size
            worst = max(worst, size)
            if not actual.all_finite() or not size <= _LIMITS[dtype]:
                problem = (
                    f"{name} {part}: loss {actual.value:.6g}, expected {expected.value:.6g}, "
                    f"off by {size:.1e}"
                )
                return Finding(f"{name}: off by {size:.1e}", math.inf, problem, low)
        return Finding(f"{name}: off by {worst:.1e}", worst)

    probe.__name__ = str(dtype).removeprefix("torch.")
    return probe


def _cast(batch: Batch, inputs: torch.dtype, data: torch.dtype) -> Batch:
    places = set(batch.floating())
    dtypes = {"inputs": inputs, "data": data}

    def change(part: str, name: str, tensor: Tensor) -> Tensor:
        return tensor.to(dtypes[part]) if (part, name) in places else tensor

    return batch.map(change)


def _changed(prefix: str, now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Names of the values that are new, gone or different."""
    names = [f"{prefix}{name!r} (added or removed)" for name in sorted(now.keys() ^ before.keys())]
    for name in now.keys() & before.keys():
        if isinstance(before[name], Tensor):
            same = _same_tensor(now[name], before[name])
        else:
            same = now[name] == before[name]
        if not same:
            names.append(f"{prefix}{name!r}")
    return names


def _same(first: Result, again: Result) -> bool:
    grads = (_same_tensor(grad, again.grads[name]) for name, grad in first.grads.items())
    numbers = [(first.value, again.value)]
    numbers += [(value, again.metrics.get(name)) for name, value in first.metrics.items()]
    same = all(a == b or (a != a and b != b) for a, b in numbers)
    return same and all(grads) and first.metrics.keys() == again.metrics.keys()


def _same_tensor(now: Any, before: Tensor) -> bool:
    if not isinstance(now, Tensor) or now.dtype != before.dtype or now.shape != before.shape:
        return False
    return bool(((now == before) | ((now != now) & (before != before))).all())
