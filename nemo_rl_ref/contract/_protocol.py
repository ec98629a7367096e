# SPDX-License-Identifier: Apache-2.0
"""Probe: the loss has the attributes that trainers read and returns what they expect."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from nemo_rl_ref.algorithms.loss.interfaces import LossInputType, LossType, MetricNormalizer
from nemo_rl_ref.contract._batches import Batch
from nemo_rl_ref.contract._calls import NotALoss, start
from nemo_rl_ref.contract._probes import Finding, Subject
from nemo_rl_ref.contract.limits import file_of, raised_at
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


def protocol(subject: Subject, batch: Batch) -> Finding:
    """Attributes, a scalar differentiable loss, metrics that are numbers."""
    problems = attribute_problems(subject.loss_fn)
    measured = ""
    try:
        made = start(subject.loss_fn, batch)
        problems += returned_problems(made.returned)
        result = made.finish()
        if not result.all_finite():
            problems.append(f"loss {result.value} or its gradient is not finite")
        elif not any(grad.count_nonzero() for grad in result.grads.values()):
            problems.append("the gradient is zero everywhere")
        size = max(float(grad.abs().max()) for grad in result.grads.values())
        measured = f"loss {result.value:.4g}, largest gradient {size:.2g}, "
        measured += f"{len(result.metrics)} metrics; reads {', '.join(sorted(subject.read))}"
    except NotALoss as error:
        problems.append(str(error))
    except Exception as error:  # whatever a loss raises on an ordinary batch is the finding
        hint = "; give check_loss a batch_maker with that key" if type(error) is KeyError else ""
        at = raised_at(error, file_of(subject.loss_fn))
        problems.append(f"a call raises {type(error).__name__}: {error}{hint}{at}")
    return Finding(measured, float(len(problems)), "; ".join(problems))


def attribute_problems(loss_fn: Any) -> list[str]:
    """What is wrong with the attributes of a loss."""
    problems = []
    for name, kind in (("loss_type", LossType), ("input_type", LossInputType)):
        value = getattr(loss_fn, name, "missing")
        if enum_value(value, kind) is None:
            problems.append(f"{name} is {value}, expected a {kind.__name__}")
    table = getattr(loss_fn, "metric_normalizations", None) or {}
    if not isinstance(table, dict):
        problems.append(f"metric_normalizations is a {type(table).__name__}, expected a dict")
        table = {}
    for metric, normalizer in table.items():
        if enum_value(normalizer, MetricNormalizer) is None:
            problems.append(
                f"metric_normalizations[{metric!r}] is {normalizer!r}, expected a MetricNormalizer"
            )
    if enum_value(getattr(loss_fn, "input_type", None), LossInputType) == "distillation":
        # NeMo RL reads both to decide whether the loss gets H_all.
        for name in ("zero_outside_topk", "kl_type"):
            if not hasattr(loss_fn, name):
                problems.append(f"{name} is missing, which NeMo RL reads to prepare the inputs")
    return problems


def returned_problems(returned: Any) -> list[str]:
    """What is wrong with what a loss returned, apart from the loss itself."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        return [f"returns a {type(returned).__name__}, expected a tuple (loss, metrics)"]
    metrics = returned[1]
    if not isinstance(metrics, dict):
        return [f"metrics are a {type(metrics).__name__}, expected a dict"]
    problems = []
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            kind = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            problems.append(
                f"metric {name!r} is a {kind or type(value).__name__}, expected a float"
            )
        elif math.isnan(value):
            problems.append(f"metric {name!r} is nan")
    return problems


def enum_value(value: Any, kind: Any) -> str | None:
    """The value of a member of an enum of that name, this package's or NeMo RL's; else None."""
    text = getattr(value, "value", None)
    fits = type(value).__name__ == kind.__name__ and text in {member.value for member in kind}
    return text if fits else None


def recording(data: dict[str, Any], read: set[str]) -> BatchedDataDict:
    """A batch that notes which keys are read."""

    class Recording(BatchedDataDict):
        def __getitem__(self, key: str) -> Any:
            read.add(key)
            return super().__getitem__(key)

    return Recording(data)
