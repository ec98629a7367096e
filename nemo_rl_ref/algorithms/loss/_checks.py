# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the losses. They look at shapes and dtypes only, never at values.

So they cost about a microsecond each and never wait for a GPU.
"""

from collections.abc import Mapping
from typing import Any

import torch


def check_token_batch(
    loss_name: str, next_token_logprobs: Any, data: Mapping[str, Any], token_keys: tuple[str, ...]
) -> None:
    """Checks log-probabilities (B, S-1), ``data[token_keys]`` (B, S) and ``sample_mask`` (B,).

    Args:
        loss_name: the loss to name in messages.
        next_token_logprobs: the policy's log-probabilities.
        data: the micro-batch.
        token_keys: keys of `data` that hold one entry a token.

    Raises:
        KeyError: if a key is missing in `data`.
        TypeError: if the log-probabilities are not a floating tensor.
        ValueError: if a shape does not fit.
    """
    check_floating("next_token_logprobs", next_token_logprobs)
    if next_token_logprobs.ndim != 2:
        raise ValueError(
            f"next_token_logprobs has shape {tuple(next_token_logprobs.shape)}, expected (B, S-1)"
        )
    rows, steps = next_token_logprobs.shape
    for key in token_keys:
        shape = get_tensor(loss_name, data, key).shape
        if shape != (rows, steps + 1):
            raise ValueError(
                f"data[{key!r}] has shape {tuple(shape)}, expected (B, S) = {(rows, steps + 1)} "
                f"because next_token_logprobs is (B, S-1) = {(rows, steps)}"
            )
    check_sample_mask(loss_name, data, rows)


def check_sample_mask(loss_name: str, data: Mapping[str, Any], rows: int) -> None:
    """Checks that ``data["sample_mask"]`` is there and has shape (rows,)."""
    shape = get_tensor(loss_name, data, "sample_mask").shape
    if shape != (rows,):
        raise ValueError(f"data['sample_mask'] has shape {tuple(shape)}, expected (B,) = {(rows,)}")


def check_pairs(name: str, tensor: torch.Tensor, global_valid_seqs: Any) -> None:
    """Checks that the rows can be chosen and rejected in turn, and that their count is given."""
    if tensor.shape[0] % 2:
        raise ValueError(
            f"{name} has {tensor.shape[0]} rows, expected an even number: "
            "rows 0, 2, ... are chosen and rows 1, 3, ... the rejected responses of the same pairs"
        )
    if global_valid_seqs is None:
        raise ValueError(
            "global_valid_seqs is None, expected the number of valid sequences "
            "(two a pair) in the global batch"
        )


def check_floating(name: str, tensor: Any) -> None:
    """Checks that `tensor` is a tensor of a floating dtype."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a floating tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")


def get_tensor(loss_name: str, data: Mapping[str, Any], key: str) -> torch.Tensor:
    """Returns ``data[key]``, or says which loss needs it and what is there instead."""
    if key not in data:
        raise KeyError(f"data has no {key!r}, which {loss_name} needs; it has {sorted(data)}")
    value = data[key]
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"data[{key!r}] is a {type(value).__name__}, expected a tensor")
    return value
