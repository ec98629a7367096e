# SPDX-License-Identifier: Apache-2.0
"""One update: forward, log-probabilities, loss, backward, optimizer step.

The loss functions are NeMo RL's (:mod:`nemo_rl_ref.algorithms.loss`) or follow its protocol. They
are normalized by the counts of the *global* batch, so the gradients of micro-batches and of
data-parallel ranks add up to the gradient of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nemo_rl_ref.algorithms.loss.interfaces import LossFunction, LossInputType
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.files.metrics import number_of
from nemo_rl_ref.logprobs import token_logprobs
from nemo_rl_ref.training.checkpoints import (
    get_random_state,
    get_torch_random_state,
    set_random_state,
)
from nemo_rl_ref.training.not_finite import Origin, find_origin
from nemo_rl_ref.training.processes import accumulating, from_main, is_deepspeed, is_sharded

#: Runs a model and a loss on a micro-batch: ``(model, loss_fn, data, (seqs, toks))`` to the loss,
#: a scalar, and its metrics.
RunLoss = Callable[[Any, Any, Any, tuple[Tensor, Tensor]], tuple[Tensor, dict[str, Any]]]


def next_token_logprobs(model: Any, data: BatchedDataDict[Any]) -> Tensor:
    """Log-probability of every token given those before it.

    No attention mask is passed: rows are padded on the right, and a causal model's tokens do not
    see what comes after them.

    Args:
        model: A Hugging Face causal language model.
        data: ``input_ids`` int64 ``(B, S)``, padded on the right.

    Returns:
        Float32 ``(B, S-1)``, in nats. Column ``t`` belongs to token ``t + 1``. Values on padding
        are finite and mean nothing.
    """
    logits = model(input_ids=data["input_ids"], use_cache=False).logits
    return cast(torch.Tensor, token_logprobs(logits[:, :-1], data["input_ids"][:, 1:]))


def valid_counts(data: BatchedDataDict[Any]) -> tuple[Tensor, Tensor]:
    """Number of sequences and of tokens that count in a batch.

    Args:
        data: ``sample_mask`` ``(B,)``, and ``token_mask`` ``(B, S)`` or ``input_ids`` ``(B, S)``.

    Returns:
        ``global_valid_seqs`` and ``global_valid_toks``, scalars. A token counts if it is masked
        in, its sample is, and it has a token before it (column 0 is never predicted). Without
        ``token_mask`` every column of a sample that is masked in counts.
    """
    seqs = data["sample_mask"].sum()
    if "token_mask" not in data:
        return seqs, seqs * data["input_ids"].shape[1]
    tokens = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
    return seqs, tokens.sum()


def compute_loss(
    model: Any, loss_fn: LossFunction, data: BatchedDataDict[Any], counts: tuple[Tensor, Tensor]
) -> tuple[Tensor, dict[str, Any]]:
    """Run a model and a loss that takes log-probabilities or the model's output itself.

    Args:
        model: A Hugging Face model with ``logits``.
        loss_fn: A loss with ``input_type`` ``LOGPROB`` or ``LOGIT``.
        data: The (micro-)batch, padded on the right, as the loss needs it.
        counts: ``global_valid_seqs`` and ``global_valid_toks``, scalars: what counts in the
            global batch.

    Returns:
        The loss, a scalar, and its metrics.

    Raises:
        ValueError: If the loss takes another input.
    """
    if loss_fn.input_type is LossInputType.LOGPROB:
        inputs = {"next_token_logprobs": next_token_logprobs(model, data)}
    elif loss_fn.input_type is LossInputType.LOGIT:
        inputs = {"logits": model(input_ids=data["input_ids"], use_cache=False).logits}
    else:
        raise ValueError(
            f"loss_fn: {type(loss_fn).__name__} takes {loss_fn.input_type}, expected "
            f"{LossInputType.LOGPROB} or {LossInputType.LOGIT}"
        )
    seqs, toks = counts
    found = loss_fn(data=data, global_valid_seqs=seqs, global_valid_toks=toks, **inputs)
    return checked_result(loss_fn, found)


def checked_result(loss_fn: Any, found: Any) -> tuple[Tensor, dict[str, Any]]:
    """What a loss has returned, if it is a scalar to train with, and metrics that are numbers.

    Raises:
        ValueError: If it is something else. The message names the loss, with file and line.
    """
    problem = None
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Mapping):
        problem = f"{type(found).__name__}, expected a tuple of the loss and a dict of metrics"
    elif not isinstance(found[0], Tensor) or found[0].ndim:
        loss = found[0]
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        problem = f"a loss that is a {type(loss).__name__}{shape}, expected a tensor without axes"
    elif torch.is_grad_enabled() and not found[0].requires_grad:
        problem = "a loss without a gradient: it does not depend on the model's output"
    else:
        for name, value in found[1].items():
            if number_of(value) is None:
                text = repr(value)[:60]
                problem = f"the metric {name!r} as {text}, expected a number or a tensor of one"
    if problem:
        kind = type(loss_fn)
        code = kind.__call__.__code__
        place = f"{code.co_filename}:{code.co_firstlineno}"
        raise ValueError(f"{place}: {kind.__name__} returned {problem}")
    return found


def run_batch(
    model: Any,
    loss_fn: Any,
    batch: BatchedDataDict[Any],
    accelerator: Any,
    *,
    micro_rows: int,
    backward: bool,
    loss: RunLoss = compute_loss,
) -> dict[str, float]:
    """Run a global batch in micro-batches on this process's share of the rows.

    Args:
        model: From ``accelerator.prepare``.
        loss_fn: The loss. It is normalized by the counts of the whole batch, so that the results
            of micro-batches and processes sum to those of the whole.
        batch: The global batch, the same on all processes, its rows a multiple of their number.
        accelerator: The run's ``accelerate.Accelerator``.
        micro_rows: Rows of a forward pass.
        backward: Whether to compute gradients.
        loss: Runs model and loss on a micro-batch.

    Returns:
        The loss's metrics over the global batch, as NeMo RL combines them (names ending in
        ``_min`` or ``_max`` by minimum and maximum, all others by sums), ``loss`` and the counts.

    Raises:
        ValueError: If the rows do not divide by the processes, or ``micro_rows`` is not positive.
    """
    ranks, rows = accelerator.num_processes, batch.size // accelerator.num_processes
    if batch.size % ranks:
        raise ValueError(f"batch: got {batch.size} rows, expected a multiple of {ranks} processes")
    if micro_rows < 1:
        raise ValueError(f"micro_rows: got {micro_rows}, expected a positive number")
    batch = batch.to(accelerator.device)
    counts = valid_counts(batch)
    start = accelerator.process_index * rows
    results: list[dict[str, float]] = []
    for low in range(start, start + rows, micro_rows):
        high = min(low + micro_rows, start + rows)
        last = high == start + rows
        with torch.set_grad_enabled(backward), accumulating(model, accelerator, last=last):
            value, metrics = loss(model, loss_fn, batch.slice(low, high), counts)
            if backward:
                # Data-parallel training averages gradients over processes; these are to be summed.
                accelerator.backward(value * ranks if ranks > 1 else value)
        results.append({**metrics, "loss": value.item()})
    if ranks > 1:
        from accelerate.utils import gather_object

        results = gather_object(results)
    combined = {name: combine(name, [r[name] for r in results if name in r]) for name in results[0]}
    seqs, toks = counts
    return {**combined, "global_valid_seqs": seqs.item(), "global_valid_toks": toks.item()}


def combine(name: str, values: list[Any]) -> float:
    """A metric over parts of a batch: the minimum, the maximum or the sum, by its name."""
    how = min if name.endswith("_min") else max if name.endswith("_max") else sum
    return float(how(float(value) for value in values))


def combine_updates(name: str, values: list[float]) -> float:
    """A metric over the updates of a step, as NeMo RL's GRPO combines them: the mean, but for some.

    The gradient norm is the last one. Minima and maxima are those of the finite values: a
    micro-batch without a token that counts has infinite ones. NeMo RL's workers divide all others by
    the number of updates and its trainers add them up.
    """
    if name == "grad_norm":
        return values[-1]
    if name.endswith(("_min", "_max")):
        finite = [value for value in values if math.isfinite(value)]
        return combine(name, finite) if finite else -1.0
    return sum(values) / len(values)


def weighted_means(
    results: Sequence[tuple[float, Mapping[str, float]]], names: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Metrics over batches: means by weight; counts are added up.

    Args:
        results: Weight and metrics of every batch.
        names: The metrics to take, and what to call them; None for all, under their own names.

    Returns:
        The metrics; none if there is no batch.
    """
    if not results:
        return {}
    names = {name: name for name in results[0][1]} if names is None else names
    total, combined = sum(weight for weight, _ in results), {}
    for name, shown in names.items():
        values = [metrics[name] for _, metrics in results]
        if name.startswith(("num_", "global_valid_")) or name.endswith(("_min", "_max")):
            combined[shown] = combine(name, values)
        else:
            parts = (w * value for (w, _), value in zip(results, values, strict=True))
            combined[shown] = sum(parts) / total
    return combined


class NotFinite(FloatingPointError):
    """The loss or the gradient of a step is not finite. The step was not taken.

    Attributes:
        model_is_whole: Whether the model is finite and as it was before the step.
        random_state: The state of the random generators before the step.
    """

    model_is_whole = True
    random_state: dict[str, Any]


def update(
    model: Any,
    optimizer: Any,
    loss_fn: Any,
    batch: BatchedDataDict[Any],
    accelerator: Any,
    *,
    micro_rows: int,
    max_grad_norm: float | None,
    loss: RunLoss = compute_loss,
    rows: int = 1,
    place: Callable[[int], str] | None = None,
) -> dict[str, float]:
    """Take one optimizer step on a global batch.

    Args:
        model: See `run_batch`.
        optimizer: From ``accelerator.prepare``.
        loss_fn: See `run_batch`.
        batch: See `run_batch`.
        accelerator: See `run_batch`.
        micro_rows: See `run_batch`.
        max_grad_norm: A longer gradient is scaled down to this norm; None for no limit.
        loss: See `run_batch`.
        rows: Rows of a sample: 2 for pairs.
        place: What a sample of the batch is called in messages, by its number; its number if not
            given.

    Returns:
        The metrics of `run_batch`, ``grad_norm`` before clipping and ``lr`` of this step.

    Raises:
        NotFinite: If loss or gradient norm are not finite. Model and optimizer are as they were.
            The message names the layer where it starts, and the samples.
    """
    random_state = get_torch_random_state()
    metrics = run_batch(
        model, loss_fn, batch, accelerator, micro_rows=micro_rows, backward=True, loss=loss
    )
    norm = _clip(model, optimizer, accelerator, max_grad_norm)
    if norm is not None:
        metrics["grad_norm"] = norm
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics.get("grad_norm", 0.0))):
        optimizer.zero_grad()
        # Nothing here draws from the other generators: they are as they were.
        set_random_state(random_state := {**get_random_state(), **random_state})
        origin = from_main(
            _origin(model, loss_fn, batch, accelerator, loss, rows)
            if accelerator.is_main_process
            else None
        )
        name = place or "sample {}".format
        shown = [name(number) for number in origin.samples if rows < batch.size]
        error = NotFinite(
            f"loss {metrics['loss']}, gradient norm {norm}; it starts in "
            + origin.where
            + (f", with {len(shown)} of {batch.size // rows} samples: " if shown else "")
            + ", ".join(shown[:8])
        )
        # DeepSpeed has taken the step by now, unless it noticed.
        error.model_is_whole = origin.model_is_finite and not is_deepspeed(accelerator)
        error.random_state = random_state
        raise error
    metrics["lr"] = optimizer.param_groups[0]["lr"]
    optimizer.step()
    optimizer.zero_grad()
    return metrics


def _clip(
    model: Any, optimizer: Any, accelerator: Any, max_grad_norm: float | None
) -> float | None:
    """The gradient's norm; the gradient is scaled down to the limit if it is longer.

    None if DeepSpeed, which scales gradients itself, does not know the norm.
    """
    limit = math.inf if max_grad_norm is None else max_grad_norm
    if is_sharded(accelerator):
        norm = accelerator.clip_grad_norm_(model.parameters(), limit)
        return None if norm is None else float(norm)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = get_total_norm([grad for p in parameters if (grad := p.grad) is not None])
    norm = float(total)
    if norm > 0.999 * limit:  # if it is shorter, PyTorch would multiply it by 1
        clip_grads_with_norm_(parameters, limit, total)
    return norm


def _origin(
    model: Any, loss_fn: Any, batch: Any, accelerator: Any, loss: RunLoss, rows: int
) -> Origin:
    """Where it starts. One process cannot look into a model that it has a part of."""
    if is_sharded(accelerator):
        return Origin("a place that cannot be looked for while the weights are sharded", [], True)
    model, counts = accelerator.unwrap_model(model), valid_counts(batch)
    return find_origin(model, lambda part: loss(model, loss_fn, part, counts)[0], batch, rows=rows)
