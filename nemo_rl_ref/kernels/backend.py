# SPDX-License-Identifier: Apache-2.0
"""Chooses between the CUDA kernels and plain PyTorch."""

from __future__ import annotations

import logging
import os

import torch

from nemo_rl_ref.kernels import loader

#: The environment variable that chooses where no argument does: "auto", "cuda" or "torch".
VARIABLE = "NEMO_RL_REF_BACKEND"

_logger = logging.getLogger("nemo_rl_ref.kernels")
_logged: set[str] = set()


def use_kernels(backend: str | None, device: torch.device) -> bool:
    """Whether a function should run its CUDA kernels.

    The argument counts, then the environment variable ``NEMO_RL_REF_BACKEND``, then "auto": the
    kernels where the tensors are on CUDA and the kernels can be compiled, else plain PyTorch. Each
    choice and its reason are logged once, by the logger ``nemo_rl_ref.kernels``: as information,
    or as a warning where tensors are on CUDA but the kernels cannot run.

    Args:
        backend: The function's argument: ``"cuda"``, ``"torch"``, or None.
        device: Where the tensors are that it works on.

    Returns:
        True for the kernels, False for plain PyTorch.

    Raises:
        ValueError: If the argument or the variable has another value, or asks for the kernels
            where the tensors are not on CUDA.
        KernelsUnavailable: If the kernels are asked for and cannot be compiled or run.
    """
    if backend not in (None, "cuda", "torch"):
        raise ValueError(f"backend is {backend!r}, expected 'cuda', 'torch' or None")
    wanted, by = backend, "the argument backend"
    if backend is None:
        wanted, by = os.environ.get(VARIABLE) or "auto", f"the environment variable {VARIABLE}"
        if wanted not in ("auto", "cuda", "torch"):
            raise ValueError(f"{VARIABLE} is {wanted!r}, expected 'auto', 'cuda' or 'torch'")
    if wanted == "torch":
        _log(logging.INFO, f"plain PyTorch, chosen by {by}")
        return False
    reason = loader.unavailable(device)
    if wanted == "cuda":
        if reason and device.type != "cuda":
            raise ValueError(f"{by} asks for the CUDA kernels, but {reason}")
        if reason:
            raise loader.KernelsUnavailable(reason)
        _log(logging.INFO, f"CUDA kernels, chosen by {by}")
    elif reason is None:
        _log(logging.INFO, "CUDA kernels, because the tensors are on CUDA")
    elif device.type == "cuda":
        _log(logging.WARNING, f"plain PyTorch, because {reason}")
    else:
        _log(logging.INFO, f"plain PyTorch, because {reason}")
    return reason is None


def _log(level: int, text: str) -> None:
    if torch.compiler.is_compiling() or text in _logged:
        return
    _logged.add(text)
    _logger.log(level, "%s", text)
