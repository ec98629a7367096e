# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: how many there are, and what one tells the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.config.sections import TrainedConfig

SHARDED = ("FSDP", "DEEPSPEED")


def process_state() -> Any:
    """Which process this is: ``accelerate.PartialState``. Without a GPU several run on the CPU."""
    from accelerate import PartialState

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return PartialState(cpu=forced or (several and not torch.cuda.is_available()))


def make_accelerator(precision: str) -> Any:
    """Make the ``accelerate.Accelerator`` of ``policy.precision``: weights stay float32.

    Raises:
        ValueError: If the precision is not float32 or bfloat16.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState

    modes = {"float32": "no", "bfloat16": "bf16"}
    if precision not in modes:
        raise ValueError(f"policy.precision: got {precision!r}, expected {' or '.join(modes)}")
    # An earlier run in this program may have had another precision. FSDP and DeepSpeed are noted in
    # the state of the processes, too, which has to be made again with it.
    sharded = (
        PartialState().distributed_type.value in SHARDED if PartialState._shared_state else False
    )
    AcceleratorState._reset_state(reset_partial_state=sharded)
    return Accelerator(mixed_precision=modes[precision], cpu=process_state().device.type == "cpu")


@contextmanager
def accumulating(model: Any, accelerator: Any, *, last: bool) -> Iterator[None]:
    """Run a backward pass in this context: gradients travel between processes with the last one.

    DeepSpeed takes the optimizer's step at the end of that backward pass, too.

    Args:
        model: From ``accelerator.prepare``.
        accelerator: The run's ``accelerate.Accelerator``.
        last: Whether it is the last micro-batch of this step.
    """
    if is_deepspeed(accelerator):
        accelerator.sync_gradients = last
    alone = accelerator.num_processes > 1 and not last
    with accelerator.no_sync(model) if alone else nullcontext():
        yield


def prepare_deepspeed(accelerator: Any, section: TrainedConfig, key: str) -> None:
    """Give DeepSpeed the settings that a run's configuration has; nothing where it is not used.

    Args:
        accelerator: The run's ``accelerate.Accelerator``.
        section: The section that the model is trained by.
        key: The section's name.

    Raises:
        ValueError: If it is the second model.
    """
    if not is_deepspeed(accelerator):
        return
    if key != "policy":
        raise ValueError(f"{key}: DeepSpeed trains one model here; train two with FSDP")
    accelerator.state.deepspeed_plugin.deepspeed_config.update(
        train_micro_batch_size_per_gpu=section.train_micro_batch_size,
        gradient_accumulation_steps=1,  # the loss is divided by the counts of the global batch
        gradient_clipping=section.max_grad_norm or 0.0,
    )


def from_main(value: Any) -> Any:
    """What the main process gives, on all processes. The others' values do not matter."""
    state = process_state()
    if state.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    box = [value]
    broadcast_object_list(box)
    return box[0]


@torch.no_grad()
def by_share(
    function: Callable[[Any], Tensor], data: Any, accelerator: Any, batch_size: int | None = None
) -> Tensor:
    """Apply a function to this process's share of a batch, and gather the results of all.

    Args:
        function: Maps a batch of b rows to a tensor ``(b, …)``. No gradient is kept.
        data: A ``BatchedDataDict``, the same on all processes, whose number divides its rows.
        accelerator: The run's ``accelerate.Accelerator``.
        batch_size: Rows that the function gets at a time; the whole share if not given.

    Returns:
        ``(B, …)``, in the order of the rows, on every process.
    """
    rows = data.size // accelerator.num_processes
    first, size = accelerator.process_index * rows, batch_size or rows
    parts = [
        function(data.slice(low, min(low + size, first + rows)))
        for low in range(first, first + rows, size)
    ]
    return accelerator.gather(torch.cat(parts))


@torch.no_grad()
def whole_model(model: Any, copy: Any, accelerator: Any) -> Any:
    """A model that this process can run without the others.

    Args:
        model: From ``accelerator.prepare``.
        copy: A copy of the model from before that, which gets the weights if the processes share
            those of the model; otherwise it is not used and can be None.
        accelerator: The run's ``accelerate.Accelerator``.

    Returns:
        The copy, or the model without what ``accelerate`` wrapped around it.

    Raises:
        ValueError: If DeepSpeed has cut single weights into parts, as its third stage does.
    """
    if not is_sharded(accelerator):
        return accelerator.unwrap_model(model)
    parameters = dict(accelerator.unwrap_model(model).named_parameters())
    for name, parameter in copy.named_parameters():
        parameter.copy_(_whole(parameters[name]))
    return copy


def _whole(parameter: Any) -> Tensor:
    if hasattr(parameter, "ds_id"):
        raise ValueError(
            "deepspeed_config.zero_stage: got 3, expected at most 2: responses are sampled from "
            "whole weights. FSDP gathers them"
        )
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def is_sharded(accelerator: Any) -> bool:
    """Whether no process need have the whole model or optimizer: FSDP and DeepSpeed."""
    return accelerator.distributed_type.value in SHARDED


def is_deepspeed(accelerator: Any) -> bool:
    """Whether DeepSpeed takes the optimizer's steps itself, in the backward pass."""
    return accelerator.distributed_type.value == "DEEPSPEED"
