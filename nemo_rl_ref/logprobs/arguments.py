# SPDX-License-Identifier: Apache-2.0
"""Arguments of the log-probability functions: which dtypes, shapes and targets they take."""

import math

import torch
from torch import Tensor

#: Targets with this value are left out: log-probability 0, entropy 0, no gradient.
IGNORE_INDEX = -100

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Refused(ValueError, AssertionError):
    """A value that cannot be used, where NeMo RL has an assertion: code that expects either works."""


def work_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that a tensor is computed in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check(logits: Tensor, targets: Tensor, temperature: float) -> None:
    """Raise TypeError or ValueError for what `token_logprobs` does not take."""
    if logits.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"logits has dtype {logits.dtype}, expected one of {names}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets has dtype {targets.dtype}, expected torch.int64")
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (..., V) with V > 0")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, expected that of logits without its last "
            f"dimension, {tuple(logits.shape[:-1])}"
        )
    if targets.device != logits.device:
        raise ValueError(f"targets is on {targets.device}, expected the logits' {logits.device}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a finite number above 0")


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
) -> None:
    """Raise TypeError or ValueError for what `linear_token_logprobs` does not take."""
    if hidden.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"hidden has dtype {hidden.dtype}, expected one of {names}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets has dtype {targets.dtype}, expected torch.int64")
    if not hidden.ndim:
        raise ValueError("hidden has shape (), expected (..., H)")
    size = hidden.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != size or not weight.shape[0]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (V, {size}) with V > 0")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, expected that of hidden without its last "
            f"dimension, {tuple(hidden.shape[:-1])}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    for name, tensor in (("weight", weight), ("bias", bias), ("targets", targets)):
        if tensor is None:
            continue
        if name != "targets" and tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected hidden's {hidden.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, expected hidden's {hidden.device}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a finite number above 0")
    if logit_softcap is not None and not 0 < logit_softcap < math.inf:
        raise ValueError(
            f"logit_softcap is {logit_softcap}, expected a finite number above 0 or None"
        )


def check_targets(targets: Tensor, vocabulary: int) -> bool:
    """Raise ValueError if a target is out of range; return whether -100 occurs."""
    if not targets.numel():
        return False
    low, high = (bound.item() for bound in torch.aminmax(targets))
    if low < 0:
        low = min((t for t in targets.unique().tolist() if t != IGNORE_INDEX), default=0)
        has_ignored = True
    else:
        has_ignored = False
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise ValueError(f"targets holds {bad}, expected {IGNORE_INDEX} or 0 to {vocabulary - 1}")
    return has_ignored
