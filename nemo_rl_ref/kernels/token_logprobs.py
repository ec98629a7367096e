# SPDX-License-Identifier: Apache-2.0
"""Launches the kernels of ``token_logprobs.cu``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.kernels import loader

_NAMES = {
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "double",
}

# Threads of a block, for rows of up to so many bytes. With 128 threads, one step of the kernel's
# loop reads 8 KiB; a block of 512 would leave most of its threads without work there.
_SMALL_ROW, _SMALL_BLOCK, _BLOCK = 16 << 10, 128, 512

_FIRST, _LAST = 1, 2
_LOG2_E = math.log2(math.e)


def forward(
    logits: Tensor,
    targets: Tensor,
    outputs: tuple[Tensor | None, ...],
    *,
    temperature: float,
    softcap: float | None = None,
    first_column: int = 0,
    vocabulary: int | None = None,
) -> None:
    """Run the forward kernel over all columns of rows, or over a range of them.

    Args:
        logits: ``(..., C)``, columns ``first_column`` to ``first_column + C`` of the rows.
        targets: ``(...)``, int64.
        outputs: Log-probabilities, entropies or None, maxima and totals, each ``(...)``,
            contiguous, in the accumulator's dtype. If the rows come in several ranges, give the
            same for each; they hold results after the last.
        temperature: Divides the logits.
        softcap: A cap, or None.
        first_column: Of the range.
        vocabulary: Length of whole rows; that of the range if not given.
    """
    columns = logits.shape[-1]
    vocabulary = columns if vocabulary is None else vocabulary
    rows = _rows(logits)
    if rows is None:
        for i, row_logits in enumerate(logits):
            forward(
                row_logits,
                targets[i],
                tuple(None if output is None else output[i] for output in outputs),
                temperature=temperature,
                softcap=softcap,
                first_column=first_column,
                vocabulary=vocabulary,
            )
        return
    inner, strides = rows
    logprobs, entropy, maximum, total = outputs
    is_last = first_column + columns == vocabulary
    piece = (_FIRST if first_column == 0 else 0) | (_LAST if is_last else 0)
    block = _block(logits)
    arguments = [logits, inner, *strides, targets.contiguous(), first_column, columns, vocabulary]
    arguments += [_LOG2_E / temperature, softcap or 0.0, piece, maximum, total, logprobs, entropy]
    name = _expression("token_logprobs_forward", logits, block, entropy is not None, softcap)
    loader.launch("token_logprobs", name, targets.numel(), block, arguments, logits.device)


def backward(
    logits: Tensor,
    targets: Tensor,
    results: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, ...],
    grad: Tensor,
    *,
    temperature: float,
    softcap: float | None = None,
    first_column: int = 0,
) -> None:
    """Run the backward kernel: the gradient of logits, or of a range of their columns.

    Args:
        logits: As in :func:`forward`.
        targets: As in :func:`forward`.
        results: Maxima, totals and entropies, from the forward kernel; the last is only read where
            a gradient of the entropies is given.
        grads: Gradients of the log-probabilities and of the entropies, each ``(...)`` or None.
        grad: Where the result is written, of the shape and dtype of ``logits``, which it may be.
        temperature: As in :func:`forward`.
        softcap: As in :func:`forward`.
        first_column: As in :func:`forward`.
    """
    rows = _rows(logits, grad)
    if rows is None:
        for i, row_logits in enumerate(logits):
            backward(
                row_logits,
                targets[i],
                tuple(None if result is None else result[i] for result in results),
                tuple(None if g is None else g[i] for g in grads),
                grad[i],
                temperature=temperature,
                softcap=softcap,
                first_column=first_column,
            )
        return
    inner, strides, grad_strides = rows
    grad_logprobs, grad_entropy = (None if g is None else g.contiguous() for g in grads)
    block = _block(logits)
    arguments = [logits, inner, *strides, grad, *grad_strides, targets.contiguous(), first_column]
    arguments += [logits.shape[-1], _LOG2_E / temperature, softcap or 0.0, *results]
    arguments += [grad_logprobs, grad_entropy]
    name = _expression("token_logprobs_backward", logits, block, grad_entropy is not None, softcap)
    loader.launch("token_logprobs", name, targets.numel(), block, arguments, logits.device)


def instances() -> list[tuple[str, str]]:
    """Every kernel that these functions can ask for: source and expression."""
    return [
        ("token_logprobs", f"token_logprobs_{name}<{dtype}, {block}, {entropy}, {softcap}>")
        for name in ("forward", "backward")
        for dtype in _NAMES.values()
        for block in (_SMALL_BLOCK, _BLOCK)
        for entropy in ("true", "false")
        for softcap in ("false", "true")
    ]


def _expression(
    kernel: str, logits: Tensor, block: int, entropy: bool, softcap: float | None
) -> str:
    flags = ", ".join("true" if flag else "false" for flag in (entropy, softcap is not None))
    return f"{kernel}<{_NAMES[logits.dtype]}, {block}, {flags}>"


def _block(logits: Tensor) -> int:
    row_bytes = logits.shape[-1] * logits.element_size()
    return _SMALL_BLOCK if row_bytes <= _SMALL_ROW else _BLOCK


def _rows(*tensors: Tensor) -> tuple[Any, ...] | None:
    """How the kernels find the rows of tensors of one shape, (outer, inner, columns).

    Returns:
        The number of inner rows, and each tensor's strides (outer, inner, of the columns). None
        if the strides of the leading dimensions are such that two are not enough.
    """
    shape = tensors[0].shape
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for dim, size in enumerate(shape[:-1]):
        if size == 1:
            continue
        steps = [tensor.stride(dim) for tensor in tensors]
        if sizes and all(s[-1] == step * size for s, step in zip(strides, steps, strict=True)):
            sizes[-1] *= size
            for s, step in zip(strides, steps, strict=True):
                s[-1] = step
        else:
            sizes.append(size)
            for s, step in zip(strides, steps, strict=True):
                s.append(step)
    if len(sizes) > 2:
        return None
    missing = 2 - len(sizes)
    inner = sizes[-1] if sizes else 1
    return inner, *(
        (*[0] * missing, *s, tensor.stride(-1)) for s, tensor in zip(strides, tensors, strict=True)
    )
