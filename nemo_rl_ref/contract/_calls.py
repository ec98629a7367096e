# SPDX-License-Identifier: Apache-2.0
"""Calling a loss, and comparing what two calls returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nemo_rl_ref.contract._batches import Batch
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict

#: Two results agree if they differ by no more than this share: ten times less than what float32
#: loses in a loss that computes in float32 whatever it is given.
LIMIT = 1e-5
#: Numbers smaller than this are compared as if they were as large as this.
_FLOOR = 1e-2

_OTHER_PATH = "a small change of an input changes which values the loss detaches"


class NotALoss(Exception):
    """What a call returned is not a scalar that can be differentiated."""


@dataclass(frozen=True)
class Call:
    """A call of a loss, before and after.

    Attributes:
        loss: the scalar that came back; attached to the graph.
        returned: everything that came back.
        metrics: the metrics that are numbers, also those in scalar tensors.
        leaves: the tensors to differentiate by.
        passed: what the loss was given: inputs, data and the two counts.
    """

    loss: Tensor
    returned: Any
    metrics: dict[str, float]
    leaves: dict[str, Tensor]
    passed: tuple[dict[str, Any], Any, dict[str, Tensor]]

    def finish(self) -> Result:
        """Runs backward. An input that the loss does not use has a gradient of zeros.

        Raises:
            NotALoss: if the loss does not depend on any of its inputs.
        """
        if not self.loss.requires_grad:
            raise NotALoss("the loss has no gradient: it is not connected to its inputs")
        grads = torch.autograd.grad(self.loss, list(self.leaves.values()), allow_unused=True)
        named = {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(self.leaves.items(), grads, strict=True)
        }
        return Result(self.loss.item(), named, self.metrics)


@dataclass(frozen=True)
class Result:
    """Loss, gradients by input name and metrics of a call, or of several calls together."""

    value: float
    grads: dict[str, Tensor]
    metrics: dict[str, float]

    def all_finite(self) -> bool:
        """Whether loss and gradients are finite."""
        return math.isfinite(self.value) and all(g.isfinite().all() for g in self.grads.values())


def start(
    loss_fn: Callable[..., Any],
    batch: Batch,
    counts: tuple[Tensor, Tensor] | None = None,
    make_data: Callable[[dict[str, Any]], Any] = BatchedDataDict,
    mode: AbstractContextManager | None = None,
) -> Call:
    """Calls a loss as NeMo RL's trainers do, with keywords, on copies of everything.

    The inputs are not leaves of the graph, as the model's output is not.

    Args:
        loss_fn: the loss.
        batch: what it is called with.
        counts: the global counts; None for those of the batch.
        make_data: makes the object passed as ``data`` out of a dict.
        mode: entered for the duration of the call.

    Raises:
        NotALoss: if no scalar floating tensor came back.
    """
    leaves = {name: batch.inputs[name].clone().requires_grad_() for name in batch.free}
    inputs = {
        name: leaves[name].clone() if name in leaves else _copy(value)
        for name, value in batch.inputs.items()
    }
    plain = {name: _copy(value) for name, value in batch.data.items()}
    plain |= {name: inputs[name] for name in plain.keys() & leaves.keys()}
    data = make_data(plain)
    seqs, toks = (count.clone() for count in counts or batch.counts())
    passed = {"global_valid_seqs": seqs, "global_valid_toks": toks}
    with torch.enable_grad(), mode or nullcontext():
        try:
            returned = loss_fn(data=data, **passed, **inputs)
        except SystemExit as error:
            raise RuntimeError("it calls sys.exit") from error
    loss = returned[0] if isinstance(returned, tuple) and returned else returned
    if not isinstance(loss, Tensor):
        raise NotALoss(f"the loss is a {type(loss).__name__}, expected a tensor")
    if loss.ndim or not loss.is_floating_point():
        what = f"shape {tuple(loss.shape)} and dtype {loss.dtype}"
        raise NotALoss(f"the loss has {what}, expected a scalar float")
    return Call(loss, returned, _numbers(returned), leaves, (inputs, data, passed))


def call(loss_fn: Callable[..., Any], batch: Batch, *args: Any, **kwargs: Any) -> Result:
    """Returns `start(...)` followed by backward."""
    return start(loss_fn, batch, *args, **kwargs).finish()


class Gap(NamedTuple):
    """How far two results are apart: as a share, where that is, and in words."""

    size: float
    where: str
    detail: str


def difference(actual: Result, expected: Result, skip: Iterable[str] = ()) -> Gap:
    """Returns the largest difference of two results.

    A gradient is compared with the largest entry of the expected gradient. A NaN where the other
    has a number counts as an infinite difference.

    Args:
        actual: one result.
        expected: the other.
        skip: metrics that are not compared.
    """
    found = [_gap("loss", actual.value, expected.value)]
    for name, grad in expected.grads.items():
        scale = grad.abs().max().item() if grad.numel() else 0.0
        size = 0.0
        if not torch.equal(actual.grads[name], grad):
            size = (actual.grads[name] - grad).abs().max().item() / max(scale, 1e-8)
        size = math.inf if math.isnan(size) else size
        where = f"gradient by {name}"
        found.append(Gap(size, where, f"{where} is off by {size:.1e} of its largest entry"))
    for name in sorted((actual.metrics.keys() | expected.metrics.keys()) - set(skip)):
        if name in actual.metrics and name in expected.metrics:
            found.append(_gap(f"metric {name}", actual.metrics[name], expected.metrics[name]))
        else:
            found.append(Gap(math.inf, f"metric {name}", f"metric {name} is not always there"))
    return max(found, key=lambda gap: gap.size)


def _gap(where: str, actual: float, expected: float) -> Gap:
    # + 0.0 turns -0.0 into 0.0.
    detail = f"{where} is {actual + 0.0:.6g} instead of {expected + 0.0:.6g}"
    return Gap(relative(actual, expected), where, detail)


def relative(actual: float, expected: float) -> float:
    """Returns the difference as a share of the expected number; infinite if only one is NaN."""
    if actual == expected or (math.isnan(actual) and math.isnan(expected)):
        return 0.0
    gap = abs(actual - expected) / max(abs(expected), _FLOOR)
    return gap if math.isfinite(gap) else math.inf


def is_extremum(name: str) -> bool:
    """Whether trainers combine a metric with min or max instead of a sum."""
    return name.endswith(("_min", "_max"))


def is_count(name: str) -> bool:
    """Whether a metric that is not normalized adds up."""
    return name.startswith("num_") or name.endswith("_count")


def add_metrics(parts: list[dict[str, float]]) -> dict[str, float]:
    """Combines the metrics of calls as trainers do: sums, or extrema without infinite ones."""
    total: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        if is_extremum(name):
            pick = min if name.endswith("_min") else max
            total[name] = pick([v for v in values if not math.isinf(v)], default=values[0])
        else:
            total[name] = math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
    return total


class Held(TorchFunctionMode):
    """Records what a call holds constant, or puts it back in a later call.

    Held is what the code says to hold: what ``detach`` and ``detach_`` return and what is computed
    in a ``torch.no_grad`` or ``inference_mode`` block. A value that leaves the graph in another
    way (``.item()``, ``.data``, ``.numpy()``, ``torch.tensor(...)``) is not held, because nobody
    can tell it from a mistake. Nor is the inside of a `torch.autograd.Function`.

    Args:
        tape: what an earlier call recorded; None to record.
    """

    _DETACH = (Tensor.detach, torch.detach, Tensor.detach_, torch.detach_)

    def __init__(self, tape: list[Tensor] | None = None):
        super().__init__()
        self.replaying = tape is not None
        self.tape = tape or []
        self.used = 0
        self.in_block = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Called by torch in place of every function on tensors."""
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "_set_grad_enabled":
            # Python code switched gradients on or off. An autograd.Function does it without this.
            self.in_block = not args[0]
        elif func in self._DETACH or self.in_block or torch.is_inference_mode_enabled():
            return self._hold(result, _is_in_place(getattr(func, "__name__", "")))
        return result

    def finish(self) -> None:
        """Checks that all that was recorded was put back.

        Raises:
            NotALoss: if not.
        """
        if self.used != len(self.tape):
            raise NotALoss(_OTHER_PATH)

    def _hold(self, result: Any, in_place: bool) -> Any:
        if isinstance(result, tuple | list):
            return type(result)([self._hold(item, in_place) for item in result])
        # A no-op in a block, like x.to(x.dtype), returns x itself, which is still in the graph.
        if not isinstance(result, Tensor) or result.requires_grad:
            return result
        if not self.replaying:
            self.tape.append(result.detach().clone())
            return result
        if self.used == len(self.tape) or self.tape[self.used].shape != result.shape:
            raise NotALoss(_OTHER_PATH)
        kept = self.tape[self.used]
        self.used += 1
        return result.copy_(kept) if in_place else kept.clone()


def _is_in_place(name: str) -> bool:
    """Whether a function changes its first argument, like ``clamp_`` and ``__iadd__``."""
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value


def _numbers(returned: Any) -> dict[str, float]:
    """The metrics that are numbers; what else is wrong with them is for the protocol check."""
    metrics = returned[1] if isinstance(returned, tuple) and len(returned) > 1 else None
    if not isinstance(metrics, dict):
        return {}
    return {
        str(name): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    }
