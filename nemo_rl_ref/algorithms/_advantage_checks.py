# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the advantage estimators. They look at shapes and dtypes, never at values."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_rewards(rewards: Tensor, mask: Tensor) -> None:
    """Checks that `mask` is (B, S) and `rewards` (B,) floating."""
    check_mask(mask)
    if not rewards.is_floating_point():
        raise TypeError(f"rewards has dtype {rewards.dtype}, expected a floating dtype")
    if rewards.shape != mask.shape[:1]:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}, expected (B,) = {tuple(mask.shape[:1])}, "
            f"because mask is {tuple(mask.shape)}"
        )


def check_mask(mask: Tensor) -> None:
    """Checks that `mask` is (B, S)."""
    if mask.ndim != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected (B, S)")


def check_like_mask(name: str, tensor: Tensor, mask: Tensor) -> None:
    """Checks that `tensor` has the shape of `mask`."""
    if tensor.shape != mask.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected that of mask, "
            f"(B, S) = {tuple(mask.shape)}"
        )


def check_kl_logprobs(
    first: str, policy: Tensor | None, second: str, reference: Tensor | None, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what a KL penalty in the reward is computed from, if it is there."""
    why = ": use_kl_in_reward=True puts a KL penalty into the reward"
    return given_logprobs(first, policy, mask, why), given_logprobs(second, reference, mask, why)


def given_logprobs(name: str, tensor: Tensor | None, mask: Tensor, why: str = "") -> Tensor:
    """Return log-probabilities that are needed, if they are there and have the mask's shape."""
    if tensor is None:
        raise ValueError(f"{name} is None, expected (B, S) log-probabilities{why}")
    check_like_mask(name, tensor, mask)
    return tensor


def config_value(estimator: str, config: Mapping[str, Any], key: str) -> Any:
    """Returns ``config[key]``, or says which estimator needs it."""
    if not isinstance(config, Mapping):
        raise TypeError(
            f"estimator_config is a {type(config).__name__}, expected a dict: {estimator} reads "
            "it by keys"
        )
    if key not in config:
        raise KeyError(
            f"estimator_config has no {key!r}, which {estimator} needs; it has {sorted(config)}"
        )
    return config[key]
