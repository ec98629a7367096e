# SPDX-License-Identifier: Apache-2.0
"""Changes of the reward that depend on the length of the response."""

import warnings
from typing import Any, TypeVar

import torch
from pydantic import BaseModel

from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
from nemo_rl_ref.logprobs.arguments import Refused

Tensor = TypeVar("Tensor", bound=torch.Tensor)


class RewardShapingConfig(BaseModel, extra="allow"):
    """``grpo.reward_shaping`` and ``ppo.reward_shaping`` in NeMo RL's configuration.

    Attributes:
        enabled: Whether rewards are changed at all.
        overlong_buffer_length: Tokens before ``max_response_length`` over which the penalty grows.
        overlong_buffer_penalty: The penalty at ``max_response_length``, in units of reward.
        max_response_length: Response length, in tokens, at which the penalty is
            ``overlong_buffer_penalty``. Longer responses lose more.
        stop_properly_penalty_coef: Factor, 0 to 1, of the reward of truncated responses. Goes
            before the penalty above, which is then not applied.
    """

    enabled: bool = False
    overlong_buffer_length: int | None = None
    overlong_buffer_penalty: float | None = None
    max_response_length: int | None = None
    stop_properly_penalty_coef: float | None = None


def apply_reward_shaping(batch: BatchedDataDict, cfg: RewardShapingConfig) -> BatchedDataDict:
    r"""Lowers the reward of long or truncated responses, in place.

    .. math:: r' = r - \max\Big(0, \; p \, \frac{n - (N - b)}{b}\Big)

    with n the response's tokens, N ``max_response_length``, b ``overlong_buffer_length`` and p
    ``overlong_buffer_penalty``. Unlike in the paper, the penalty goes on growing beyond N, as in
    NeMo RL. With ``stop_properly_penalty_coef`` c instead, r' = c r for truncated responses.

    Source: Yu et al. (2025), https://arxiv.org/abs/2503.14476 (DAPO), Eq. 13.

    Args:
        batch: ``total_reward`` (B,) floating, and ``truncated`` (B,) or the responses' lengths:
            ``response_token_lengths``, B integers, or else ``message_log``, whose first assistant
            message is measured.
        cfg: What to do.

    Returns:
        The same batch with the new ``total_reward`` and, if enabled, the old one under
        ``unshaped_total_reward``.

    Raises:
        ValueError: If a setting is missing or out of range, or what it needs is not in `batch`.

    Example:
        Half of the buffer of 10 tokens before a length of 100 is used up:

        >>> cfg = RewardShapingConfig(enabled=True, max_response_length=100)
        >>> cfg.overlong_buffer_length, cfg.overlong_buffer_penalty = 10, 1.0
        >>> batch = {
        ...     "total_reward": torch.ones(2),
        ...     "response_token_lengths": torch.tensor([50, 95]),
        ... }
        >>> apply_reward_shaping(batch, cfg)["total_reward"]
        tensor([1.0000, 0.5000])
    """
    if not cfg.enabled:
        return batch
    rewards = batch["total_reward"]
    if cfg.stop_properly_penalty_coef is not None:
        shaped = _scale_truncated(batch, rewards, cfg, cfg.stop_properly_penalty_coef)
    else:
        shaped = rewards + _overlong_penalty(batch, rewards, cfg)
    batch["unshaped_total_reward"] = rewards.clone()
    batch["total_reward"] = shaped
    return batch


def _scale_truncated(
    batch: BatchedDataDict, rewards: torch.Tensor, cfg: RewardShapingConfig, factor: float
) -> torch.Tensor:
    if not 0 <= factor <= 1:
        raise Refused(f"stop_properly_penalty_coef must be in [0, 1], got {factor}")
    ignored = [
        name
        for name in ("overlong_buffer_length", "overlong_buffer_penalty", "max_response_length")
        if getattr(cfg, name) is not None
    ]
    if ignored:
        warnings.warn(
            f"stop_properly_penalty_coef is set, so {', '.join(ignored)} have no effect; "
            "set stop_properly_penalty_coef=null to use them",
            stacklevel=3,
        )
    if batch.get("truncated") is None:
        raise Refused("truncated field not found in batch; stop_properly_penalty_coef needs it")
    truncated = torch.as_tensor(batch["truncated"], dtype=torch.bool, device=rewards.device)
    return torch.where(truncated, rewards * factor, rewards)


def _overlong_penalty(
    batch: BatchedDataDict, rewards: torch.Tensor, cfg: RewardShapingConfig
) -> torch.Tensor:
    buffer = _number(cfg, "overlong_buffer_length")
    largest = _number(cfg, "overlong_buffer_penalty")
    longest = _number(cfg, "max_response_length")
    if largest < 0:
        raise ValueError(f"overlong_buffer_penalty is {largest}, expected 0 or more")
    if buffer < 1:
        raise ValueError(f"overlong_buffer_length is {buffer}, expected 1 or more")
    lengths = batch.get("response_token_lengths")
    if lengths is None:
        lengths = [_first_response_length(log) for log in batch["message_log"]]
    lengths = torch.as_tensor(lengths, device=rewards.device)
    if lengths.shape != rewards.shape:
        raise Refused(
            "The number of messages in the batch must match the number of rewards: got "
            f"{len(lengths)} responses and {len(rewards)} rewards"
        )
    exceeding = lengths - (longest - buffer)
    # The order of operations is NeMo RL's, so that the last bit is, too.
    penalty = -exceeding.double() / buffer * largest
    return penalty.clamp(max=0).to(rewards.dtype)


def _number(cfg: RewardShapingConfig, name: str) -> Any:
    value = getattr(cfg, name)
    if value is None:
        raise ValueError(
            f"reward_shaping.{name} is None, expected a number: DAPO reward shaping is currently "
            "supported only with all three; or set stop_properly_penalty_coef"
        )
    return value


def _first_response_length(message_log: list[dict]) -> int:
    for message in message_log:
        if message["role"] == "assistant":
            return message["token_ids"].shape[0]
    raise Refused(
        "Assistant response not found during reward shaping: message_log has no message of role "
        "assistant"
    )
