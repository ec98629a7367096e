# SPDX-License-Identifier: Apache-2.0
"""Temperature, top-k and top-p, the same in sampling and in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch

# Rows of logits that are sorted at once for top-p; sorting copies them twice.
TOP_K_TOP_P_CHUNK_SIZE: int = 256


@dataclass
class TrainingSamplingParams:
    """How the tokens were sampled, so that the trainer computes log-probabilities the same way.

    Attributes:
        top_k: Number of most likely tokens that can be drawn; None or -1 for all.
        top_p: The most likely tokens whose probabilities add up to this can be drawn; 1 for all.
        temperature: Divides the logits.

    Example:
        >>> TrainingSamplingParams(top_p=0.9)
        TrainingSamplingParams(top_k=None, top_p=0.9, temperature=1.0)
    """

    top_k: int | None = None
    top_p: float = 1.0
    temperature: float = 1.0


def need_top_k_or_top_p_filtering(
    sampling_params: Optional[TrainingSamplingParams],
) -> bool:
    """Whether any token is left out by top-k or top-p.

    Args:
        sampling_params: None counts as no filter.

    Example:
        >>> need_top_k_or_top_p_filtering(TrainingSamplingParams(temperature=0.7))
        False
        >>> need_top_k_or_top_p_filtering(TrainingSamplingParams(top_k=50))
        True
    """
    if sampling_params is None:
        return False
    top_k, top_p = sampling_params.top_k, sampling_params.top_p
    return (top_k is not None and top_k > 0) or (top_p is not None and top_p != 1.0)


def apply_top_k_top_p(
    logits: torch.Tensor,
    top_k: int | None,
    top_p: float,
    chunk_size: int | None = TOP_K_TOP_P_CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Set the logits of tokens that cannot be drawn to -inf: first top-k, then top-p among those.

    A token ties with the k-th one: all of them stay. The most likely token always stays.

    Args:
        logits: (..., V), floating, already divided by the temperature.
        top_k: None or -1 for all.
        top_p: In (0, 1]; 1 for all.
        chunk_size: Rows that are sorted at once; None for all. Changes no number.

    Returns:
        The logits, (..., V), whose gradient is 0 where they are -inf, and a boolean mask of what
        stays, (..., V), or None if nothing is asked for.

    Example:
        Probabilities 0.6, 0.3 and 0.1; the first two are needed for 0.8:

        >>> logits = torch.tensor([0.6, 0.3, 0.1]).log()
        >>> filtered, kept = apply_top_k_top_p(logits, top_k=None, top_p=0.8)
        >>> kept
        tensor([ True,  True, False])
        >>> filtered.softmax(-1)
        tensor([0.6667, 0.3333, 0.0000])
    """
    params = TrainingSamplingParams(top_k=top_k, top_p=top_p)
    if not need_top_k_or_top_p_filtering(params):
        return logits, None
    with torch.no_grad():
        rows = logits.reshape(-1, logits.shape[-1])
        pieces = rows.split(chunk_size or max(len(rows), 1))
        keep = torch.cat([_kept(piece, top_k, top_p) for piece in pieces]).view(logits.shape)
    return logits.masked_fill(~keep, -torch.inf), keep


def _kept(logits: torch.Tensor, top_k: int | None, top_p: float) -> torch.Tensor:
    """What stays of (N, V) logits, boolean."""
    keep = torch.ones_like(logits, dtype=torch.bool)
    if top_k is not None and top_k > 0:
        keep = logits >= logits.topk(top_k, dim=-1).values[:, -1:]
    if top_p is not None and top_p != 1.0:
        ascending, order = logits.masked_fill(~keep, -torch.inf).sort(dim=-1)
        nucleus = ascending.softmax(-1).cumsum(-1) > 1 - top_p
        nucleus[:, -1] = True
        keep &= torch.zeros_like(keep).scatter(-1, order, nucleus)
    return keep
