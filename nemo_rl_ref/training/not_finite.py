# SPDX-License-Identifier: Apache-2.0
"""Where a NaN or an infinity comes from: which samples, and which part of the model.

A training step only learns that its loss or gradient is not finite. `find_origin` then goes
through the batch again, sample by sample and layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Origin:
    """Where the first value that is not finite was seen.

    Attributes:
        where: In words: a layer, a parameter, or the loss function.
        samples: Numbers of the samples in the batch that show it by themselves; empty if the
            batch does so only as a whole.
        model_is_finite: Whether all parameters are finite.
    """

    where: str
    samples: list[int]
    model_is_finite: bool


def find_origin(
    model: torch.nn.Module, loss: Callable[[Any], Tensor], batch: Any, *, rows: int
) -> Origin:
    """Look for the first value that is not finite.

    Args:
        model: The model itself, unwrapped. Its gradients are zeroed.
        loss: Runs the model on a batch and returns the loss, with its graph.
        batch: A ``BatchedDataDict`` on the model's device.
        rows: Rows of a sample: 2 for pairs.

    Returns:
        The origin.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return Origin(f"the parameter {name}, which is not finite itself", [], False)
    samples = [
        number
        for number in range(batch.size // rows)
        if _trace(model, loss, batch.slice(number * rows, (number + 1) * rows))
    ]
    first = batch.slice(samples[0] * rows, (samples[0] + 1) * rows) if samples else batch
    return Origin(_trace(model, loss, first) or "a sum over the whole batch", samples, True)


def _trace(model: torch.nn.Module, loss: Callable[[Any], Tensor], batch: Any) -> str | None:
    """Where the first value that is not finite appears, forward and then backward; or None."""
    gradients: list[tuple[str, bool]] = []  # in the order of the backward pass
    model.zero_grad()
    try:
        with _watched(model, gradients) as forward:
            value = loss(batch)
            bad = next((name for name, finite in forward if not finite), None)
            if bad:
                return f"{bad}, in the forward pass"
            if not _finite(value):
                return "the loss function: what the model returns is finite"
            value.backward()
            passed = "the loss function"
            for name, finite in gradients:
                if not finite:
                    return f"the backward pass of {passed}"
                passed = name
            for name, parameter in model.named_parameters():
                if parameter.grad is not None and not _finite(parameter.grad):
                    return f"the gradient of the parameter {name}"
        return None
    finally:
        model.zero_grad()


@contextmanager
def _watched(
    model: torch.nn.Module, gradients: list[tuple[str, bool]]
) -> Iterator[list[tuple[str, bool]]]:
    """Notes for the output of every layer, and for its gradient, whether it is finite."""
    forward: list[tuple[str, bool]] = []
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if not all(_finite(tensor) for tensor in _tensors(inputs)):
                outer = name.split(" ")[0].rpartition(".")[0]
                forward.append((f"{outer or 'the model'}, between its layers", False))
            for tensor in _tensors(output):
                forward.append((name, _finite(tensor)))
                if tensor.requires_grad:
                    note = lambda grad: gradients.append((name, _finite(grad)))  # noqa: E731
                    handles.append(tensor.register_hook(note))

        return hook

    for name, module in model.named_modules():
        if not any(module.children()):
            handles.append(module.register_forward_hook(watch(f"{name} ({type(module).__name__})")))
    try:
        yield forward
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    values = output if isinstance(output, (tuple, list)) else [output]
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
