# SPDX-License-Identifier: Apache-2.0
"""The training step: forward, log-probabilities, loss, backward, update.

The loss functions are NeMo RL's (:mod:`nemo_rl_ref.algorithms.loss`) or follow its protocol. They
are normalised by the counts of the *global* batch, so the gradients of micro-batches and of
data-parallel ranks add up to the gradient of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.algorithms.loss.interfaces import LossFunction, LossInputType
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.logprobs import token_logprobs


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
    return token_logprobs(logits[:, :-1], data["input_ids"][:, 1:])


@torch.no_grad()
def add_reference_logprobs(
    model: Any, batches: Iterable[BatchedDataDict[Any]]
) -> list[BatchedDataDict[Any]]:
    """Add ``reference_policy_logprobs`` to batches, with the model as it is now.

    The reference policy does not change, so its log-probabilities are computed once for all
    epochs.

    Args:
        model: The reference policy, in evaluation mode or without dropout.
        batches: Preference batches.

    Returns:
        The batches, each with ``reference_policy_logprobs`` float32 ``(B, S)`` in nats, laid out
        as NeMo RL has it for DPO: column ``t`` belongs to token ``t + 1``, the last is 0.
    """
    done = []
    for batch in batches:
        batch = batch.to(model.device)
        logprobs = next_token_logprobs(model, batch)
        batch["reference_policy_logprobs"] = torch.nn.functional.pad(logprobs, (0, 1))
        done.append(batch)
    return done


def valid_counts(data: BatchedDataDict[Any]) -> tuple[Tensor, Tensor]:
    """Number of sequences and of tokens that count in a batch.

    Args:
        data: ``sample_mask`` ``(B,)`` and ``token_mask`` ``(B, S)``.

    Returns:
        ``global_valid_seqs`` and ``global_valid_toks``, scalars. A token counts if it is masked
        in, its sample is, and it has a token before it (column 0 is never predicted).
    """
    tokens = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
    return data["sample_mask"].sum(), tokens.sum()


def compute_loss(
    model: Any,
    loss_fn: LossFunction,
    data: BatchedDataDict[Any],
    global_valid_seqs: Tensor,
    global_valid_toks: Tensor,
) -> tuple[Tensor, dict[str, Any]]:
    """Run the model and a loss that takes log-probabilities.

    Args:
        model: A Hugging Face causal language model.
        loss_fn: A loss with ``input_type`` ``LossInputType.LOGPROB``.
        data: The (micro-)batch, as the loss needs it.
        global_valid_seqs: Sequences that count in the global batch, scalar.
        global_valid_toks: Tokens that count in the global batch, scalar.

    Returns:
        The loss, a scalar, and its metrics.

    Raises:
        ValueError: If the loss takes another input.
    """
    if loss_fn.input_type is not LossInputType.LOGPROB:
        raise ValueError(
            f"loss_fn: {type(loss_fn).__name__} takes {loss_fn.input_type}, "
            f"expected {LossInputType.LOGPROB}"
        )
    return loss_fn(
        next_token_logprobs(model, data),
        data=data,
        global_valid_seqs=global_valid_seqs,
        global_valid_toks=global_valid_toks,
    )


def train(
    model: Any,
    loss_fn: LossFunction,
    batches: Iterable[BatchedDataDict[Any]],
    optimizer: torch.optim.Optimizer,
    accelerator: Any,
    *,
    micro_batch_size: int | None = None,
    max_grad_norm: float = 1.0,
) -> Iterator[dict[str, float]]:
    """Take one optimizer step for every global batch.

    Args:
        model: The policy, from ``accelerator.prepare``.
        loss_fn: A loss in NeMo RL's protocol.
        batches: Global batches. With several processes each gets the same batches and trains on
            its own share of the rows.
        optimizer: From ``accelerator.prepare``.
        accelerator: An ``accelerate.Accelerator``.
        micro_batch_size: Rows of a forward pass (two a pair, for preference losses); all at once
            if not given. Any size gives the same gradients up to rounding.
        max_grad_norm: Largest gradient norm; a longer gradient is scaled down to it.

    Yields:
        After each step, the loss's metrics over the global batch, and ``grad_norm`` before
        clipping.

    Raises:
        ValueError: If ``micro_batch_size`` is not positive, or the rows do not divide by the
            number of processes.
        FloatingPointError: If the gradient is not finite; the model is left as it was.
    """
    if micro_batch_size is not None and micro_batch_size < 1:
        raise ValueError(f"micro_batch_size: got {micro_batch_size}, expected a positive number")
    ranks, rank = accelerator.num_processes, accelerator.process_index
    for step, batch in enumerate(batches):
        batch = batch.to(accelerator.device)
        global_valid_seqs, global_valid_toks = valid_counts(batch)
        share = batch.shard_by_batch_size(ranks)[rank] if ranks > 1 else batch
        metrics: dict[str, float] = {}
        for start in range(0, share.size, micro_batch_size or share.size):
            stop = min(start + (micro_batch_size or share.size), share.size)
            micro = share if (start, stop) == (0, share.size) else share.slice(start, stop)
            loss, micro_metrics = compute_loss(
                model, loss_fn, micro, global_valid_seqs, global_valid_toks
            )
            # Data-parallel training averages gradients over ranks; these must be summed.
            accelerator.backward(loss * ranks)
            for name, value in micro_metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        metrics = _sum_over_ranks(metrics, accelerator)
        metrics["grad_norm"] = float(grad_norm)
        if not torch.isfinite(torch.as_tensor(metrics["grad_norm"])):
            optimizer.zero_grad()
            raise FloatingPointError(
                f"step {step}: gradient norm {metrics['grad_norm']}, loss {metrics['loss']}; "
                "the step was not taken"
            )
        optimizer.step()
        optimizer.zero_grad()
        yield metrics


@torch.no_grad()
def evaluate(
    model: Any, loss_fn: LossFunction, batches: Iterable[BatchedDataDict[Any]]
) -> dict[str, float]:
    """Metrics of a preference loss over held-out batches, each pair with the same weight.

    Args:
        model: The policy.
        loss_fn: A loss in NeMo RL's protocol.
        batches: Batches with ``reference_policy_logprobs``; their sizes may differ.

    Returns:
        The loss's metrics, as if all batches were one.
    """
    batches = list(batches)
    counts = [valid_counts(batch) for batch in batches]
    global_valid_seqs = torch.stack([seqs for seqs, _ in counts]).sum()
    global_valid_toks = torch.stack([toks for _, toks in counts]).sum()
    totals: dict[str, float] = {}
    was_training = model.training
    model.eval()
    for batch in batches:
        _, metrics = compute_loss(model, loss_fn, batch, global_valid_seqs, global_valid_toks)
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + value
    model.train(was_training)
    return totals


def _sum_over_ranks(metrics: dict[str, float], accelerator: Any) -> dict[str, float]:
    if accelerator.num_processes == 1:
        return metrics
    names = sorted(metrics)
    values = torch.tensor(
        [metrics[name] for name in names], dtype=torch.float64, device=accelerator.device
    )
    summed = accelerator.reduce(values, reduction="sum")
    return dict(zip(names, summed.tolist(), strict=True))
