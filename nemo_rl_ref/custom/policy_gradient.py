# SPDX-License-Identifier: Apache-2.0
r"""Policy-gradient losses with another reduction or another loss of a token than NeMo RL's.

For response i with tokens t = 1 … \|y_i\| and advantage A, of N responses in the global batch,

.. math::

    ρ_{i,t} = \frac{π_θ(y_{i,t} \mid x, y_{i,<t})}{π_{old}(y_{i,t} \mid x, y_{i,<t})}, \quad
    s_i = \Big(\prod_t ρ_{i,t}\Big)^{1/|y_i|}, \quad
    ℓ(ρ, A) = -\min\big(ρ A, \mathrm{clip}(ρ, 1 - ε_{low}, 1 + ε_{high}) A\big)

Clipping (also dual), the correction for tokens that another engine sampled and the KL term are set
by the flags of `ClippedPGLossConfig` and mean what they mean there. The KL estimate, times β, is
added to the loss of a token, so that it is reduced as that is. As in NeMo RL, the gradient of its
k1 and k3 is that of KL(π_θ‖π_ref); TRL's k3 has it only with ``use_bias_correction_kl``.

Masked tokens and rows, whatever they hold, add nothing. Log-ratios are clamped to ±20 nats, so
that the loss and its gradient are finite; a token whose log-ratio is clamped has no gradient
through the ratio.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.algorithms.loss import (
    ClippedPGLossConfig,
    ClippedPGLossDataDict,
    ClippedPGLossFn,
)
from nemo_rl_ref.algorithms.loss.interfaces import LossType
from nemo_rl_ref.algorithms.utils import calculate_kl, masked_mean
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict

Counts = tuple[Tensor, Tensor]
LOG_RATIO_CLAMP = 20.0
PER_TOKEN = ("advantages", "prev_logprobs", "generation_logprobs", "reference_policy_logprobs")


def positive_setting(cfg: ClippedPGLossConfig, key: str, default: float | None) -> float:
    """Returns a key of the config, or says that it should be a positive number.

    Example:
        >>> positive_setting(
        ...     ClippedPGLossConfig(sapo_temperature_pos=2.0), "sapo_temperature_pos", 1.0
        ... )
        2.0
        >>> positive_setting(ClippedPGLossConfig(), "sapo_temperature_pos", 1.0)
        1.0
    """
    value = getattr(cfg, key, default)
    if isinstance(value, float | int) and not isinstance(value, bool) and 0 < value < math.inf:
        return value
    raise ValueError(f"{key}: got {value!r}, expected a positive number")


def zero_where_masked(
    logprobs: Tensor, data: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Log-probabilities (B, S-1) and data with 0 at masked tokens, and the mask (B, S-1).

    Example:
        A NaN at a masked token is gone:

        >>> data = {"token_mask": torch.tensor([[0, 1, 0]]), "sample_mask": torch.ones(1)}
        >>> logprobs, _, mask = zero_where_masked(torch.tensor([[-1.0, torch.nan]]), data)
        >>> logprobs, mask
        (tensor([[-1.,  0.]]), tensor([[1., 0.]]))
    """
    mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
    masked = mask == 0
    # Column 0 belongs to no log-probability.
    masked_columns = torch.nn.functional.pad(masked, (1, 0), value=True)
    clean = dict(data)
    for key in PER_TOKEN:
        # A wrong shape is left to `ClippedPGLossFn`.
        if key in data and data[key].shape == masked_columns.shape:
            clean[key] = data[key].masked_fill(masked_columns, 0.0)
    if "curr_logprobs_unfiltered" in data:
        clean["curr_logprobs_unfiltered"] = data["curr_logprobs_unfiltered"].masked_fill(masked, 0)
    wide = torch.promote_types(logprobs.dtype, torch.float32)
    return logprobs.to(wide).masked_fill(masked, 0.0), clean, mask


class TokenPGLossFn(ClippedPGLossFn):
    r"""PPO's clipped loss with the parts that a subclass may replace: here, DAPO's token mean.

    .. math:: L = \frac{1}{\sum_i |y_i|} \sum_i \sum_t ℓ(ρ_{i,t}, A_{i,t}) + β k_{i,t}

    The numbers are those of `ClippedPGLossFn`, which has it all in one method. A subclass replaces
    `token_losses` or `reduce`, and names in ``fixed`` the flags that it sets, whatever the config
    says, and in ``unused`` those that it has no use for.

    Source: Schulman et al. (2017), https://arxiv.org/abs/1707.06347, Eq. 7.

    Raises:
        TypeError: if `cfg` is no `ClippedPGLossConfig`.
        ValueError: if a flag is set that this loss has no use for, or by `ClippedPGLossFn`.

    Example:
        Four tokens of two responses, each with a loss of 1: a mean over tokens.

        >>> loss_fn = TokenPGLossFn(ClippedPGLossConfig())
        >>> losses, mask = torch.ones(2, 3), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
        >>> counts = torch.tensor(2), torch.tensor(4)
        >>> loss_fn.reduce(losses, mask, torch.ones(2), counts)
        tensor(1.)
    """

    fixed: dict[str, Any] = {"token_level_loss": True}
    unused: tuple[str, ...] = ("disable_ppo_ratio", "use_cispo", "positive_example_nll_weight")

    def __init__(self, cfg: ClippedPGLossConfig, use_fused_linear_logprobs: bool = False):
        if not isinstance(cfg, ClippedPGLossConfig):
            raise TypeError(f"cfg is a {type(cfg).__name__}, expected a ClippedPGLossConfig")
        for flag in self.unused:
            if getattr(cfg, flag):
                raise ValueError(
                    f"{flag}: got {getattr(cfg, flag)!r}, expected it not to be set: "
                    f"{type(self).__name__} has no use for it"
                )
        super().__init__(cfg.model_copy(update=self.fixed), use_fused_linear_logprobs)

    def token_losses(
        self, logprobs: Tensor, prev_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        """Returns the loss of each token (B, S-1) from tensors of that shape."""
        ratios = self.log_ratios(logprobs, prev_logprobs, mask).exp()
        clipped = ratios.clamp(1 - self.ratio_clip_min, 1 + self.ratio_clip_max)
        losses = -torch.minimum(ratios * advantages, clipped * advantages)
        if self.ratio_clip_c is not None:
            bound = -self.ratio_clip_c * advantages
            losses = torch.where(advantages < 0, torch.minimum(losses, bound), losses)
        return losses

    def reduce(self, losses: Tensor, mask: Tensor, sample_mask: Tensor, counts: Counts) -> Tensor:
        """Returns the scalar loss.

        Args:
            losses: of the tokens, (B, S-1).
            mask: 1 on the tokens that count, (B, S-1).
            sample_mask: 1 on the responses that count, (B,).
            counts: valid responses and tokens of the global batch.
        """
        return masked_mean(losses, mask, global_normalization_factor=counts[1])

    def log_ratios(self, logprobs: Tensor, prev_logprobs: Tensor, mask: Tensor) -> Tensor:
        """Return log ρ (B, S-1), or log s of the response at each of its tokens; nats, clamped."""
        log_ratios = (logprobs - prev_logprobs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
        if self.sequence_level_importance_ratios:
            log_ratios = masked_mean(log_ratios, mask, dim=-1).unsqueeze(-1).expand_as(mask)
        return log_ratios

    def importance_weights(self, prev_logprobs: Tensor, generation: Tensor, mask: Tensor) -> Tensor:
        """π_old/π_gen of each token or response, truncated: (B, S-1) or (B, 1)."""
        differences = prev_logprobs - generation
        logs = differences
        if self.sequence_level_importance_ratios:
            logs = differences.sum(-1, keepdim=True)
        weights = logs.exp().nan_to_num(nan=0.0, posinf=0.0)
        kind = self.truncated_importance_sampling_type
        high = self.truncated_importance_sampling_ratio
        low = self.truncated_importance_sampling_ratio_min or 0.0
        if kind is None or high is None:
            return weights
        if kind == "tis":
            return weights.clamp(low, high)
        if kind == "icepop":
            return weights * ((weights >= low) & (weights <= high))
        mean = masked_mean(differences, mask, dim=-1).exp().unsqueeze(-1)
        return weights * ((mean >= low) & (mean <= high))

    def kl_estimates(self, logprobs: Tensor, data: Mapping[str, Any]) -> Tensor:
        """The estimate of KL(π_θ‖π_ref) at each token (B, S-1), nats."""
        logprobs = data.get("curr_logprobs_unfiltered", logprobs)
        sampled = logprobs.detach()
        if self.use_on_policy_kl_approximation:
            sampled = data["generation_logprobs"][:, 1:]
        return calculate_kl(
            logprobs,
            data["reference_policy_logprobs"][:, 1:],
            self.reference_policy_kl_type,
            self.kl_input_clamp_value,
            self.kl_output_clamp_value,
            (logprobs - sampled).exp().nan_to_num(nan=0.0, posinf=0.0),
        )

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: BatchedDataDict[ClippedPGLossDataDict] | dict[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Computes the loss of a micro-batch. Arguments and metrics: `ClippedPGLossFn`.

        All metrics but ``loss`` and ``kl_penalty`` come from a pass of that, without gradient.
        """
        logprobs, data, mask = zero_where_masked(next_token_logprobs, data)
        sample_mask, counts = data["sample_mask"], (global_valid_seqs, global_valid_toks)
        _, metrics = super().__call__(logprobs.detach(), data, *counts)

        prev = logprobs.detach() if self.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
        losses = self.weighted_losses(logprobs, prev, data, mask)
        if self.reference_policy_kl_penalty != 0:
            kl = self.kl_estimates(logprobs, data)
            losses = losses + self.reference_policy_kl_penalty * kl
            metrics["kl_penalty"] = self.reduce(kl.detach(), mask, sample_mask, counts).item()
        loss = self.reduce(losses, mask, sample_mask, counts)
        return loss, {**metrics, "loss": loss.item()}

    def weighted_losses(
        self, logprobs: Tensor, prev_logprobs: Tensor, data: Mapping[str, Any], mask: Tensor
    ) -> Tensor:
        """The token losses (B, S-1) with the correction for tokens of another engine."""
        losses = self.token_losses(logprobs, prev_logprobs, data["advantages"][:, 1:], mask)
        if self.use_importance_sampling_correction:
            generation = data["generation_logprobs"][:, 1:]
            losses = losses * self.importance_weights(prev_logprobs, generation, mask)
        return losses


class DrGRPOLossFn(TokenPGLossFn):
    r"""Dr. GRPO: divides by a constant, so that no token counts less in a longer response.

    .. math:: L = \frac{1}{N L_{max}} \sum_i \sum_t ℓ(ρ_{i,t}, A_i) + β k_{i,t}

    L_max is the config key ``max_response_length``, in tokens: the most that may be generated. It
    must be given. The paper's A is reward minus group mean, not divided by the standard deviation,
    and its β is 0.

    Source: Liu et al. (2025), https://arxiv.org/abs/2503.20783, the loss "Dr. GRPO". The paper's
    equation has no 1/L_max; its code and TRL divide by it, which only scales the learning rate:
    set 1 for the equation.

    Raises:
        ValueError: if ``max_response_length`` is missing or not positive.

    Example:
        Four tokens of two responses over 2 · 8 that were allowed:

        >>> loss_fn = DrGRPOLossFn(ClippedPGLossConfig(max_response_length=8))
        >>> losses, mask = torch.ones(2, 3), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
        >>> counts = torch.tensor(2), torch.tensor(4)
        >>> loss_fn.reduce(losses, mask, torch.ones(2), counts)
        tensor(0.2500)
    """

    fixed = {"token_level_loss": False}

    def __init__(self, cfg: ClippedPGLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.max_response_length = positive_setting(cfg, "max_response_length", None)

    def reduce(self, losses: Tensor, mask: Tensor, sample_mask: Tensor, counts: Counts) -> Tensor:
        factor = counts[0] * self.max_response_length
        return masked_mean(losses, mask, global_normalization_factor=factor)


class BNPOLossFn(TokenPGLossFn):
    r"""The loss that TRL calls "bnpo": a token mean over each micro-batch by itself.

    .. math:: L = \sum_m \frac{N_m}{N} \, \frac{1}{\sum_{i \in m} |y_i|}
              \sum_{i \in m} \sum_t ℓ(ρ_{i,t}, A_i) + β k_{i,t}

    with m the micro-batches over all ranks and N_m their valid responses. By design the loss
    depends on how the batch is split: with one response a micro-batch it is GRPO's, with a single
    micro-batch DAPO's. TRL's micro-batches are of one size; N_m/N is what its mean over them is
    then. Sequence packing makes micro-batches of one response.

    Not the beta normalization of rewards (https://arxiv.org/abs/2506.02864) that has the same
    name: that is an advantage, not a loss.

    Source: TRL's ``loss_type="bnpo"``, https://github.com/huggingface/trl/pull/3256.

    Example:
        Half of a batch of four responses, in one micro-batch: its own mean times 2/4.

        >>> loss_fn = BNPOLossFn(ClippedPGLossConfig())
        >>> losses, mask = torch.ones(2, 3), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
        >>> loss_fn.reduce(losses, mask, torch.ones(2), (torch.tensor(4), torch.tensor(8)))
        tensor(0.5000)
    """

    fixed = {"token_level_loss": False}
    needs_whole_batch = True

    def reduce(self, losses: Tensor, mask: Tensor, sample_mask: Tensor, counts: Counts) -> Tensor:
        return masked_mean(losses, mask) * masked_mean(
            torch.ones_like(sample_mask), sample_mask, global_normalization_factor=counts[0]
        )


class LUSPOLossFn(TokenPGLossFn):
    r"""Length-unbiased sequence policy optimization: GSPO times the length of the response.

    .. math:: L = \frac1N \sum_i |y_i| \, ℓ(s_i, A_i) + β \sum_t k_{i,t}

    The length cancels the root in s, so that each token pulls with the same force in responses of
    any length. Ranges of the size of ``ratio_clip_min=2e-3``, ``ratio_clip_max=2.5e-3`` belong to
    s. In TRL this is "luspo" with ``importance_sampling_level="sequence"``.

    Source: "Length-Unbiased Sequence Policy Optimization" (2026),
    https://arxiv.org/abs/2602.05261.

    Example:
        Responses of one and three tokens: the sum over tokens, divided by two responses.

        >>> loss_fn = LUSPOLossFn(ClippedPGLossConfig())
        >>> losses, mask = torch.ones(2, 3), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
        >>> counts = torch.tensor(2), torch.tensor(4)
        >>> loss_fn.reduce(losses, mask, torch.ones(2), counts)
        tensor(2.)
    """

    fixed = {"token_level_loss": False, "sequence_level_importance_ratios": True}

    def reduce(self, losses: Tensor, mask: Tensor, sample_mask: Tensor, counts: Counts) -> Tensor:
        return masked_mean(losses, mask, global_normalization_factor=counts[0])


class SAPOLossFn(TokenPGLossFn):
    r"""Soft adaptive policy optimization: a smooth gate in the place of the clip.

    .. math:: L = \frac1N \sum_i \frac{1}{|y_i|} \sum_t
              -\frac{4}{τ_i} \, σ\big(τ_i (ρ_{i,t} - 1)\big) A_i + β k_{i,t}, \quad
              τ_i = τ_{pos} \text{ if } A_i > 0, \text{ else } τ_{neg}

    At ρ = 1 the gradient is that of GRPO; it fades as ρ leaves 1, faster with a larger τ. τ_pos and
    τ_neg are the config keys ``sapo_temperature_pos`` and ``sapo_temperature_neg``, 1 and 1.05 if
    not given. ``ratio_clip_min`` and ``ratio_clip_max`` only show in metrics.

    Source: Gao et al. (2025), https://arxiv.org/abs/2511.20347, the loss "SAPO".

    Raises:
        ValueError: if a temperature is not positive.

    Example:
        The loss of a token with advantage 1 whose ratio is 1, 2 and 8 flattens out:

        >>> loss_fn = SAPOLossFn(ClippedPGLossConfig())
        >>> ratios = torch.tensor([[1.0, 2.0, 8.0]])
        >>> loss_fn.token_losses(
        ...     ratios.log(), torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1, 3)
        ... )
        tensor([[-2.0000, -2.9242, -3.9964]])
    """

    fixed = {"token_level_loss": False}
    unused = (*TokenPGLossFn.unused, "ratio_clip_c", "sequence_level_importance_ratios")

    def __init__(self, cfg: ClippedPGLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.temperature_pos = positive_setting(cfg, "sapo_temperature_pos", 1.0)
        self.temperature_neg = positive_setting(cfg, "sapo_temperature_neg", 1.05)

    def token_losses(
        self, logprobs: Tensor, prev_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        ratios = self.log_ratios(logprobs, prev_logprobs, mask).exp()
        tau = torch.full_like(ratios, self.temperature_neg)
        tau = tau.masked_fill(advantages > 0, self.temperature_pos)
        return -4 / tau * torch.sigmoid(tau * (ratios - 1)) * advantages

    def reduce(self, losses: Tensor, mask: Tensor, sample_mask: Tensor, counts: Counts) -> Tensor:
        rows = masked_mean(losses, mask, dim=-1)
        return masked_mean(rows, sample_mask, global_normalization_factor=counts[0])


class VESPOLossFn(TokenPGLossFn):
    r"""Variational sequence-level soft policy optimization: a Gamma weight on each response.

    .. math:: L = -\frac1N \sum_i φ(W_i) \, A_i \sum_t \log π_θ(y_{i,t} \mid x, y_{i,<t}), \quad
              φ(W) = W^k e^{λ (1 - W)}, \quad W_i = \prod_t ρ_{i,t}

    plus the KL term. φ has no gradient; φ(1) = 1, its maximum is at W = k/λ. k and λ are the config
    keys ``vespo_k_pos`` (2) and ``vespo_lambda_pos`` (3) where A ≥ 0, else ``vespo_k_neg`` (3) and
    ``vespo_lambda_neg`` (2). log W is clamped to [log 1e-8, 20], as in TRL. With
    ``use_importance_sampling_correction`` the product is over ρ π_old/π_gen.

    TRL divides by the tokens of the global batch instead of by N. The config key
    ``vespo_reduction`` chooses: "tokens" (if not given) is TRL's, "sequences" the equation above.

    Source: Shen et al. (2026), https://arxiv.org/abs/2602.10693, Section 3.4; k, λ are c1, c2.

    Raises:
        ValueError: if a setting is not positive, ``vespo_reduction`` is unknown, or
            ``truncated_importance_sampling_type`` is "seq-mask-tis".

    Example:
        W of a response is the product of its tokens' ratios:

        >>> loss_fn = VESPOLossFn(ClippedPGLossConfig())
        >>> ratios = torch.tensor([[2.0, 3.0]])
        >>> old, mask = torch.zeros(1, 2), torch.ones(1, 2)
        >>> loss_fn.log_sequence_ratios(ratios.log(), old, old, mask).exp()
        tensor([[6.]])
    """

    unused = (*TokenPGLossFn.unused, "ratio_clip_c", "sequence_level_importance_ratios")

    def __init__(self, cfg: ClippedPGLossConfig, use_fused_linear_logprobs: bool = False):
        self.reduction = getattr(cfg, "vespo_reduction", "tokens")
        if self.reduction not in ("tokens", "sequences"):
            raise ValueError(
                f"vespo_reduction: got {self.reduction!r}, expected 'tokens' or 'sequences'"
            )
        self.fixed = {"token_level_loss": self.reduction == "tokens"}
        super().__init__(cfg, use_fused_linear_logprobs)
        if self.truncated_importance_sampling_type == "seq-mask-tis":
            raise ValueError(
                "truncated_importance_sampling_type: got 'seq-mask-tis', expected 'tis', "
                "'icepop' or None: VESPO weighs whole responses itself"
            )
        self.k_pos = positive_setting(cfg, "vespo_k_pos", 2.0)
        self.lambda_pos = positive_setting(cfg, "vespo_lambda_pos", 3.0)
        self.k_neg = positive_setting(cfg, "vespo_k_neg", 3.0)
        self.lambda_neg = positive_setting(cfg, "vespo_lambda_neg", 2.0)

    @torch.no_grad()
    def log_sequence_ratios(
        self, logprobs: Tensor, prev_logprobs: Tensor, generation: Tensor, mask: Tensor
    ) -> Tensor:
        """Return log W of each response: (B, 1), nats, clamped."""
        lowest = math.log(1e-8)
        logs = self.log_ratios(logprobs, prev_logprobs, mask)
        if self.use_importance_sampling_correction:
            weights = self.importance_weights(prev_logprobs, generation, mask)
            logs = logs + weights.log().clamp(lowest, LOG_RATIO_CLAMP)
        return (logs * mask).sum(-1, keepdim=True).clamp(lowest, LOG_RATIO_CLAMP)

    def weighted_losses(
        self, logprobs: Tensor, prev_logprobs: Tensor, data: Mapping[str, Any], mask: Tensor
    ) -> Tensor:
        advantages, generation = data["advantages"][:, 1:], data["generation_logprobs"][:, 1:]
        log_w = self.log_sequence_ratios(logprobs, prev_logprobs, generation, mask)
        k = torch.full_like(logprobs, self.k_neg).masked_fill(advantages >= 0, self.k_pos)
        decay = torch.full_like(logprobs, self.lambda_neg)
        decay = decay.masked_fill(advantages >= 0, self.lambda_pos)
        phi = (k * log_w - decay * torch.expm1(log_w)).exp()
        return -phi * advantages * logprobs

    def reduce(self, losses: Tensor, mask: Tensor, sample_mask: Tensor, counts: Counts) -> Tensor:
        factor = counts[1] if self.loss_type == LossType.TOKEN_LEVEL else counts[0]
        return masked_mean(losses, mask, global_normalization_factor=factor)
