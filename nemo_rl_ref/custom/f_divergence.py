# SPDX-License-Identifier: Apache-2.0
"""DPO with another divergence than the reverse KL between policy and reference."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def f_derivative(
    log_ratio: Tensor, divergence: str, alpha: float = 0.5, max_exponent: float = 80.0
) -> Tensor:
    r"""f'(u) at u = exp(log_ratio), without the constants that cancel between two responses.

    ================  =================  ====================
    divergence        f'(u)              upper bound
    ================  =================  ====================
    reverse_kl        log u              none
    forward_kl        1 - 1/u            1
    js_divergence     log(2u / (1 + u))  log 2
    alpha_divergence  (1 - u^-α) / α     1/α
    ================  =================  ====================

    α → 0 is the reverse KL and α = 1 the forward KL.

    Args:
        log_ratio: log u, nats, floating, any shape.
        divergence: one of `DIVERGENCES`.
        alpha: α, in [0.01, 1]; for alpha_divergence only.
        max_exponent: the exponents in 1/u and u^-α are clamped to this, so that they stay finite.
            Where the clamp binds the gradient is 0.

    Returns:
        f'(u), shape of `log_ratio`, in float32 at least.

    Raises:
        ValueError: if `divergence` is unknown.

    Source: Wang et al. (2023), https://arxiv.org/abs/2309.16240, Table 1.

    Example:
        Of a probability that has doubled:

        >>> log_ratio = torch.tensor([2.0]).log()
        >>> f_derivative(log_ratio, "reverse_kl", 0.5, 80.0)
        tensor([0.6931])
        >>> f_derivative(log_ratio, "forward_kl", 0.5, 80.0)
        tensor([0.5000])
    """
    log_ratio = log_ratio.to(torch.promote_types(log_ratio.dtype, torch.float32))
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "forward_kl":
        return -torch.expm1((-log_ratio).clamp(max=max_exponent))
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(log_ratio)
    if divergence == "alpha_divergence":
        return -torch.expm1((-alpha * log_ratio).clamp(max=max_exponent)) / alpha
    raise ValueError(f"f_divergence_type: got {divergence!r}, expected one of {DIVERGENCES}")


class FDivergenceDPOLossFn(DPOLossFn):
    r"""f-DPO: DPO for a policy that is held to the reference by an f-divergence.

    .. math:: L = -\log σ\Big(β f'\Big(\frac{π_θ(y_w|x)}{π_{ref}(y_w|x)}\Big)
              - β f'\Big(\frac{π_θ(y_l|x)}{π_{ref}(y_l|x)}\Big)\Big)

    with the f' of `f_derivative`. Config keys: ``f_divergence_type``, "reverse_kl" (which is DPO)
    if not given; ``f_divergence_alpha``, the paper's α, 0.5 if not given; ``f_max_exponent``, 80 if
    not given: a response whose log-ratio is below -80 (or -80/α) has no gradient.

    TRL's ``f_alpha_divergence_coef`` is 1 - α, and TRL clamps the exponent of the α-divergence
    only: its forward KL becomes infinite. With ``preference_average_log_probs`` f' is taken of the
    mean log-ratio; TRL's "sigmoid_norm" divides f' by the length instead. Metrics are DPO's, of
    the log-ratios.

    Source: Wang et al. (2023), https://arxiv.org/abs/2309.16240, Theorem 1 and Table 1.

    Raises:
        ValueError: if ``f_divergence_type`` is unknown, ``f_divergence_alpha`` is not in [0.01, 1]
            or ``f_max_exponent`` is not in (0, 80].

    Example:
        One pair with log-ratios 1 and -1:

        >>> data = {"token_mask": torch.ones(2, 2), "sample_mask": torch.ones(2)}
        >>> data["reference_policy_logprobs"] = torch.tensor([[-2.0, 0.0], [-2.0, 0.0]])
        >>> cfg = DPOLossConfig(reference_policy_kl_penalty=1.0, f_divergence_type="js_divergence")
        >>> logprobs = torch.tensor([[-1.0], [-3.0]])
        >>> FDivergenceDPOLossFn(cfg)(logprobs, data, torch.tensor(2), None)[0]
        tensor(0.3133)
    """

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.divergence = getattr(cfg, "f_divergence_type", "reverse_kl")
        self.alpha = getattr(cfg, "f_divergence_alpha", 0.5)
        self.max_exponent = getattr(cfg, "f_max_exponent", 80.0)
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"f_divergence_type: got {self.divergence!r}, expected one of {DIVERGENCES}"
            )
        if not (isinstance(self.alpha, float | int) and 0.01 <= self.alpha <= 1):
            raise ValueError(
                f"f_divergence_alpha: got {self.alpha!r}, expected a number in [0.01, 1]"
            )
        if not (isinstance(self.max_exponent, float | int) and 0 < self.max_exponent <= 80):
            raise ValueError(
                f"f_max_exponent: got {self.max_exponent!r}, expected a number in (0, 80]"
            )

    def _preference_loss(
        self, rewards: Tensor, sample_mask: Tensor, global_valid_seqs: Tensor, beta: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rewards = rewards.masked_fill(sample_mask == 0, 0.0)
        scores = f_derivative(rewards, self.divergence, self.alpha, self.max_exponent)
        loss, *_ = super()._preference_loss(scores, sample_mask, global_valid_seqs, beta)
        metrics = super()._preference_loss(rewards, sample_mask, global_valid_seqs, beta)[1:]
        return loss, *metrics
