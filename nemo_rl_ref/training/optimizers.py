# SPDX-License-Identifier: Apache-2.0
"""Optimizer and learning-rate scheduler from a configuration.

NeMo RL writes them as dotted names with keyword arguments, and a schedule as a list::

    optimizer:
      name: torch.optim.AdamW
      kwargs: {lr: 5.0e-6, weight_decay: 0.1}
    scheduler:
      - name: torch.optim.lr_scheduler.LinearLR
        kwargs: {start_factor: 0.1, total_iters: 20}
      - name: torch.optim.lr_scheduler.ConstantLR
        kwargs: {factor: 1.0, total_iters: 10000000000}
      - milestones: [20]

Only the names below can be used: a configuration cannot make the program import anything else.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import optim
from torch.optim import lr_scheduler

from nemo_rl_ref.config.sections import (
    MilestonesConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainedConfig,
)

OPTIMIZERS: dict[str, type[optim.Optimizer]] = {
    f"torch.optim.{kind.__name__}": kind
    for kind in (
        optim.Adafactor, optim.Adagrad, optim.Adam, optim.Adamax, optim.AdamW, optim.NAdam,
        optim.RAdam, optim.RMSprop, optim.SGD,
    )
}  # fmt: skip

SCHEDULERS: dict[str, type[lr_scheduler.LRScheduler]] = {
    f"torch.optim.lr_scheduler.{kind.__name__}": kind
    for kind in (
        lr_scheduler.ConstantLR, lr_scheduler.CosineAnnealingLR,
        lr_scheduler.CosineAnnealingWarmRestarts, lr_scheduler.ExponentialLR,
        lr_scheduler.LinearLR, lr_scheduler.MultiStepLR, lr_scheduler.OneCycleLR,
        lr_scheduler.PolynomialLR, lr_scheduler.StepLR,
    )
}  # fmt: skip


def check_optimizer(section: TrainedConfig, key: str) -> None:
    """Check names and arguments of optimizer and scheduler by a step of each, on one parameter.

    PyTorch takes ``step_size: null`` or ``T_max: 0`` and fails at the first step; and a rate below
    0, from ``gamma: -1``, would train away from the data.

    Args:
        section: The section ``policy`` or ``value``.
        key: Its name, for messages.

    Raises:
        ValueError: As `make_optimizer` and `make_scheduler`, if a step fails, or if it makes a
            learning rate that is no finite number from 0 on.
    """
    parameter, optimizer_key = torch.nn.Parameter(torch.zeros(1)), f"{key}.optimizer"
    parameter.grad = torch.zeros(1)

    def trial() -> optim.Optimizer:
        return make_optimizer(section.optimizer, [parameter], optimizer_key)

    make_scheduler(section.scheduler, trial(), f"{key}.scheduler")  # all of them together
    if section.optimizer.kwargs.get("capturable") and torch.cuda.is_available():
        return  # it steps on a GPU only
    alone = {f"{key}.scheduler": section.scheduler}
    if isinstance(section.scheduler, list):
        alone = {f"{key}.scheduler.{i}": entry for i, entry in enumerate(section.scheduler)}
    for where, entry in alone.items():
        optimizer = trial()
        is_one = isinstance(entry, SchedulerConfig)
        scheduler = make_scheduler(entry if is_one else None, optimizer, where)
        with _refusal(optimizer_key, section.optimizer):
            optimizer.step()
        if is_one:
            with _refusal(where, entry):
                scheduler.step()
                rate = scheduler.get_last_lr()[0]
                if not 0 <= rate < math.inf:
                    raise ValueError(f"the learning rate becomes {rate}")


def make_optimizer(
    config: OptimizerConfig,
    parameters: Iterable[torch.nn.Parameter],
    key: str = "policy.optimizer",
) -> optim.Optimizer:
    """Build the optimizer of a configuration.

    Args:
        config: ``name``, one of `OPTIMIZERS`, and ``kwargs``. A string such as
            ``torch.bfloat16`` among them becomes the dtype.
        parameters: What to optimize; those that need no gradient are left out.
        key: The section's name in the configuration, for messages.

    Raises:
        ValueError: If the name is not in the list, or an argument is unknown or has a bad value.
            The message names the key.
    """
    kwargs = {name: _dtype(value, f"{key}.kwargs.{name}") for name, value in config.kwargs.items()}
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return _build(config, OPTIMIZERS, key, (trainable,), kwargs)


def make_scheduler(
    config: SchedulerConfig | list[SchedulerConfig | MilestonesConfig] | None,
    optimizer: optim.Optimizer,
    key: str = "policy.scheduler",
) -> lr_scheduler.LRScheduler:
    """Build the learning-rate scheduler of a configuration. Step it once a training step.

    Args:
        config: ``name`` and ``kwargs``; or a list of them that ends in ``milestones``, the steps
            at which each gives way to the next; or None for a constant rate.
        optimizer: The optimizer, as `make_optimizer` returns it.
        key: The section's name in the configuration, for messages.

    Raises:
        ValueError: If a name is not in the list, an argument is unknown or has a bad value, or
            the milestones do not fit the schedulers. The message names the key.
    """
    if config is None:
        return lr_scheduler.LambdaLR(optimizer, _constant)
    if isinstance(config, SchedulerConfig):
        return _build(config, SCHEDULERS, key, (optimizer,), config.kwargs)
    named = [(i, entry) for i, entry in enumerate(config) if isinstance(entry, SchedulerConfig)]
    milestones = [entry.milestones for entry in config if isinstance(entry, MilestonesConfig)]
    wanted = len(named) - 1
    if len(milestones) != 1 or not _increasing(milestones[0]) or len(milestones[0]) != wanted:
        raise ValueError(
            f"{key}: got milestones {milestones}, expected one entry milestones: [...] with "
            f"{wanted} increasing step number{'s' * (wanted != 1)} for {len(named)} schedulers"
        )
    schedulers = [
        _build(entry, SCHEDULERS, f"{key}.{i}", (optimizer,), entry.kwargs) for i, entry in named
    ]
    return lr_scheduler.SequentialLR(optimizer, schedulers, milestones[0])


def _constant(step: int) -> float:
    return 1.0


def _increasing(steps: list[int]) -> bool:
    return all(a < b for a, b in zip((0, *steps), steps, strict=False))


def _build(
    config: OptimizerConfig,
    allowed: Mapping[str, type],
    key: str,
    first: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    name = config.name
    if name not in allowed:
        near = difflib.get_close_matches(name, allowed, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{key}.name: got {name!r}; {hint}It can be {', '.join(allowed)}")
    known = list(inspect.signature(allowed[name]).parameters)[len(first) :]
    for argument in kwargs:
        if argument not in known:
            near = difflib.get_close_matches(argument, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"{key}.kwargs.{argument}: {name} has no such argument; {hint}"
                f"It has {', '.join(known)}"
            )
    with _refusal(key, config):
        return allowed[name](*first, **kwargs)


@contextmanager
def _refusal(key: str, config: OptimizerConfig) -> Iterator[None]:
    """Whatever PyTorch raises inside names the key and the arguments."""
    try:
        yield
    except Exception as error:
        text = str(error).split("\n")[0]
        raise ValueError(f"{key}: {config.name} refuses {config.kwargs}: {text}") from error


def _dtype(value: Any, key: str) -> Any:
    if not isinstance(value, str) or not value.startswith("torch."):
        return value
    dtype = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"{key}: got {value!r}, expected the name of a dtype such as torch.bfloat16"
        )
    return dtype
