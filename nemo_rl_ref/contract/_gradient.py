# SPDX-License-Identifier: Apache-2.0
"""Probe: the gradient is that of the loss, what is detached being held constant."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_rl_ref.contract._batches import Batch
from nemo_rl_ref.contract._calls import Held, start
from nemo_rl_ref.contract._probes import Finding, Subject

#: At most as many entries of the inputs are changed, one after the other.
_ENTRIES = 96
#: Step and limit where the loss is computed in float64, and where it is not. A second, smaller
#: step is tried where the first may have crossed a kink.
_STEPS = {torch.float64: ((1e-5, 1e-7), 1e-6), torch.float32: ((1e-2, 1e-3), 2e-2)}


def finite_differences(subject: Subject, batch: Batch) -> Finding:
    """Central differences agree with the gradient, entry by entry.

    What the loss detaches is recorded once and put back in the changed calls, see `Held`. So a
    stop-gradient in the formula (CISPO, the weight of a KL term) counts as meant.
    """
    held = Held()
    first = start(subject.loss_fn, batch, mode=held)
    dtype = torch.float64 if first.loss.dtype == torch.float64 else torch.float32
    steps, limit = _STEPS[dtype]
    grads = first.finish().grads

    def value(name: str, index: int, step: float) -> float:
        inputs = {**batch.inputs, name: _moved(batch.inputs[name], index, step)}
        changed = Batch(inputs, batch.data, batch.shifts, batch.free)
        again = Held(held.tape)
        slightly_other = start(subject.loss_fn, changed, mode=again).loss.item()
        again.finish()
        return slightly_other

    entries = [(name, i) for name in batch.free for i in range(batch.inputs[name].numel())]
    entries = entries[:: -(-len(entries) // _ENTRIES)]
    scale = max(float(grad.abs().max()) for grad in grads.values()) or 1.0
    worst, problem = 0.0, ""
    for name, index in entries:
        expected = grads[name].flatten()[index].item()
        for step in steps:
            slope = (value(name, index, step) - value(name, index, -step)) / (2 * step)
            size = abs(slope - expected) / scale
            if size <= limit:
                break
        size = math.inf if math.isnan(size) else size
        if size > worst:
            worst = size
            where = [int(i) for i in torch.unravel_index(torch.tensor(index), grads[name].shape)]
            problem = f"gradient by {name}{where} is {expected:.6g}, but the slope is {slope:.6g}"
    measured = (
        f"largest difference {worst:.1e} of the largest entry, {len(entries)} entries, "
        f"{str(dtype).removeprefix('torch.')}"
    )
    return Finding(measured, worst, "" if worst <= limit else problem)


def _moved(tensor: Tensor, index: int, step: float) -> Tensor:
    moved = tensor.clone()
    moved.view(-1)[index] += step
    return moved
