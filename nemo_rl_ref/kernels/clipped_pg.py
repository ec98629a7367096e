# SPDX-License-Identifier: Apache-2.0
"""Launches of the kernels of ``clipped_pg.cu``: sums over tokens, and their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.kernels import loader

#: The bits of `flags`, which tell the kernels what to compute; as in clipped_pg.cu.
FLAGS = {
    name: 1 << bit
    for bit, name in enumerate(
        (
            "ratio of response",
            "ratio is log-probability",
            "ratio is one",
            "cispo",
            "dual clip",
            "kl",
            "k1",
            "k2",
            "kl input clamp",
            "kl output clamp",
            "kl weighted",
            "correction",
            "weight of response",
            "clamp weights",
            "zero weights",
            "zero responses",
            "mean of responses",
            "positive nll",
        )
    )
}
_TYPES = {torch.float32: "float", torch.float64: "double"}
#: The dtypes of a mask that the kernels take, and what they are there.
MASK_DTYPES = {
    torch.bool: "unsigned char",
    torch.uint8: "unsigned char",
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "long long",
}
#: The dtypes that a tensor with a number for a row, or one, may have, and how a kernel is told.
NUMBER_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.int64: 2,
    torch.int32: 3,
    torch.bool: 4,
    torch.uint8: 4,
}
#: How many terms the forward kernel returns; as in clipped_pg.cu.
NUMBER_OF_TERMS = 17

# How much a block gets. About this many blocks, each with this many tokens. The numbers do not
# depend on the GPU, so that sums do not either.
_BLOCKS, _FEWEST_TOKENS, _MOST_TOKENS, _MOST_THREADS = 1024, 512, 4096, 256
# One kernel for each set of flags, without what they leave out. If False, one for all of them.
_SPECIALIZE = True

# As in clipped_pg.cu: numbers a block hands on, and numbers kept for the backward kernel.
_PARTIAL, _KEPT_HEADER, _KEPT = 18, 1, 4


@dataclass(frozen=True)
class Tensors:
    """What the kernels read.

    Attributes:
        logprobs: (B, T) float32 or float64, as all up to `unfiltered`; it has a gradient.
        prev: (B, T).
        generation: (B, T).
        reference: (B, T), or None where no flag asks for it.
        advantages: (B, T).
        unfiltered: (B, T), what the KL term has in place of `logprobs`, with a gradient; or None.
        mask: (B, T), of one of `MASK_DTYPES`.
        sample_mask: (B,), of one of `NUMBER_DTYPES`, as all below.
        rewards: (B,), or None where no flag asks for it.
        valid_seqs: what means over rows are divided by, scalar; None for 1.
        valid_toks: what means over tokens are divided by, scalar; None for 1.
    """

    logprobs: Tensor
    prev: Tensor
    generation: Tensor
    reference: Tensor | None
    advantages: Tensor
    unfiltered: Tensor | None
    mask: Tensor
    sample_mask: Tensor
    rewards: Tensor | None
    valid_seqs: Tensor | None
    valid_toks: Tensor | None


def kept_size(rows: int) -> int:
    """How many numbers the forward kernel keeps for the backward kernel."""
    return _KEPT_HEADER + _KEPT * rows


def forward(tensors: Tensors, flags: int, numbers: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Run the forward kernel: the terms, and what the backward kernel needs to know of the rows.

    Args:
        tensors: What the kernels read.
        flags: Bits of `FLAGS`.
        numbers: Nine, in the order of ``Settings`` in clipped_pg.cu.

    Returns:
        (17,) in the dtype of the log-probabilities, and (`kept_size`,) float64.
    """
    shared, grid, threads = _arguments(tensors)
    logprobs = tensors.logprobs
    double = {"dtype": torch.float64, "device": logprobs.device}
    partial = torch.empty(_PARTIAL * grid, **double)
    kept = torch.empty(kept_size(len(logprobs)), **double)
    terms = torch.empty(NUMBER_OF_TERMS, dtype=logprobs.dtype, device=logprobs.device)
    arguments = [*shared, partial, _counter(logprobs.device), kept, terms, flags, *numbers]
    expression = _expression("clipped_pg_forward", tensors, flags)
    loader.launch("clipped_pg", expression, grid, threads, arguments, logprobs.device)
    return terms, kept


def backward(
    grad_terms: Tensor,
    kept: Tensor,
    tensors: Tensors,
    flags: int,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Run the backward kernel: the gradients of `logprobs` and `unfiltered`.

    Args:
        grad_terms: The gradient of the terms, (17,), contiguous.
        kept: What `forward` has kept.
        tensors: As `forward` had them; so are `flags` and `numbers`.
        flags: As above.
        numbers: As above.

    Returns:
        Two of (B, T); the second is empty, (0,), without `unfiltered`.
    """
    shared, grid, threads = _arguments(tensors)
    logprobs, unfiltered = tensors.logprobs, tensors.unfiltered
    grad = torch.empty(logprobs.shape, dtype=logprobs.dtype, device=logprobs.device)
    grad_unfiltered = grad.new_empty((0,) if unfiltered is None else logprobs.shape)
    arguments = [
        *(grad_terms, kept, *shared, grad, None if unfiltered is None else grad_unfiltered),
        *(flags, *numbers),
    ]
    expression = _expression("clipped_pg_backward", tensors, flags)
    loader.launch("clipped_pg", expression, grid, threads, arguments, logprobs.device)
    return grad, grad_unfiltered


def _expression(kernel: str, tensors: Tensors, flags: int) -> str:
    known = flags if _SPECIALIZE else -1
    scalar, mask = _TYPES[tensors.logprobs.dtype], MASK_DTYPES[tensors.mask.dtype]
    return f"{kernel}<{scalar}, {mask}, {known}>"


def _arguments(tensors: Tensors) -> tuple[list[Any], int, int]:
    """What both kernels take, with the number of blocks and of threads a block."""
    t = tensors
    by_token = (t.logprobs, t.prev, t.generation, t.reference, t.advantages, t.unfiltered, t.mask)
    by_token = [x if x is None or x.stride(1) == 1 else x.contiguous() for x in by_token]
    rows, steps = tensors.logprobs.shape
    length = min(max(_FEWEST_TOKENS, -(-rows * steps // _BLOCKS)), _MOST_TOKENS)
    segments = -(-steps // length)
    length = -(-steps // segments)
    threads = min(-(-length // 64) * 32, _MOST_THREADS)
    arguments: list[Any] = [*by_token, *(0 if x is None else x.stride(0) for x in by_token)]
    for x in (t.sample_mask, t.rewards, t.valid_seqs, t.valid_toks):
        arguments += [None, 0] if x is None else [x.contiguous(), NUMBER_DTYPES[x.dtype]]
    return [*arguments, rows, steps, segments, length], rows * segments, threads


_counters: dict[tuple[Any, ...], Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """A zero to count blocks with, which the kernel makes zero again: one for each stream.

    Kernels on one stream run one after the other. A graph can be replayed on any, so it gets its
    own.
    """
    stream = 0
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return torch.zeros(1, dtype=torch.int32, device=device)
            stream = torch.cuda.current_stream().cuda_stream
    key = (device.type, device.index, stream)
    if key not in _counters:
        # What this thread allocates while torch.compile warms up for a graph is that graph's
        # memory, where nothing may be kept. What another thread allocates is not.
        with ThreadPoolExecutor(1) as executor:
            _counters[key] = executor.submit(_new_counter, device).result()
    return _counters[key]


def _new_counter(device: torch.device) -> Tensor:
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    if device.type == "cuda":  # any stream may use it from now on
        torch.cuda.current_stream(device).synchronize()
    return counter
