# SPDX-License-Identifier: Apache-2.0
r"""Losses without a reference policy.

They read no ``reference_policy_logprobs``; if the batch has them, they are ignored. Where DPO has
log-ratios there are log-probabilities here, in the equations as in the metrics:

.. math:: s = \sum_t \log π_θ(y_t \mid x, y_{<t})

so that ``rewards_*_mean`` are mean log-probabilities of the responses in nats. β is
``reference_policy_kl_penalty``, though it penalizes no KL here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossDataDict, DPOLossFn
from nemo_rl_ref.algorithms.utils import masked_mean
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


class ReferenceFreeLossFn(DPOLossFn):
    """DPO against a reference that gives every token the log-probability 0.

    A subclass with another loss of a pair says which, in `pair_losses`. Whatever log-probabilities
    a masked pair has, it adds nothing to the preference loss and to its gradient.

    Example:
        One pair of one-token responses; no reference is in the data:

        >>> data = {"token_mask": torch.ones(2, 2), "sample_mask": torch.ones(2)}
        >>> loss_fn = ReferenceFreeLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0))
        >>> loss, _ = loss_fn(torch.tensor([[-1.0], [-3.0]]), data, torch.tensor(2), None)
        >>> loss
        tensor(0.1269)
    """

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        """Returns the loss of each pair (P,) from its log-probabilities (P,) and (P,), nats."""
        return -logsigmoid(beta * (chosen - rejected))

    def __call__(  # type: ignore[override]
        self,
        next_token_logprobs: Tensor,
        data: BatchedDataDict[DPOLossDataDict] | dict[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """As `DPOLossFn`, without ``reference_policy_logprobs`` in `data`."""
        zeros = torch.zeros_like(data["token_mask"], dtype=next_token_logprobs.dtype)
        data = {**data, "reference_policy_logprobs": zeros}
        return super().__call__(next_token_logprobs, data, global_valid_seqs, global_valid_toks)

    def _preference_loss(
        self, rewards: Tensor, sample_mask: Tensor, global_valid_seqs: Tensor, beta: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rewards = rewards.masked_fill(sample_mask == 0, 0.0)
        metrics = super()._preference_loss(rewards, sample_mask, global_valid_seqs, beta)[1:]
        losses = self.pair_losses(*self.split_output_tensor(rewards), beta)
        loss = masked_mean(
            losses, sample_mask[::2], global_normalization_factor=global_valid_seqs / 2
        )
        return loss, *metrics


class CPOLossFn(ReferenceFreeLossFn):
    r"""Contrastive preference optimization: DPO without the reference, plus the SFT loss.

    .. math:: L = -\log σ(β (s_w - s_l)) - α s_w

    α is ``sft_loss_weight``: 1 in the paper, 0 if not given. In the paper's SFT term s_w is the sum
    over tokens. TRL's is one mean over the chosen tokens of the batch; NeMo RL's closest is a mean
    for each response, with ``sft_average_log_probs``.

    Source: Xu et al. (2024), https://arxiv.org/abs/2401.08417, Eq. 3 for the first term.

    Example:
        The preference term is -log σ(2), the chosen response's likelihood adds 1:

        >>> data = {"token_mask": torch.ones(2, 2), "sample_mask": torch.ones(2)}
        >>> loss_fn = CPOLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0, sft_loss_weight=1.0))
        >>> loss, _ = loss_fn(
        ...     torch.tensor([[-1.0], [-3.0]]), data, torch.tensor(2), torch.tensor(2)
        ... )
        >>> loss
        tensor(1.1269)
    """


class SimPOLossFn(ReferenceFreeLossFn):
    r"""SimPO: mean log-probabilities, no reference, and a margin to reach.

    .. math:: L = -\log σ\Big(\frac{β}{|y_w|} s_w - \frac{β}{|y_l|} s_l - γ\Big)

    s is divided by the length whatever ``preference_average_log_probs`` says. γ is the config key
    ``simpo_gamma``, 0.5 if not given. The paper's β is 2 to 10: NeMo RL's default of 0.05 is not
    made for this loss.

    Source: Meng et al. (2024), https://arxiv.org/abs/2405.14734, Eq. 6.

    Raises:
        ValueError: if ``simpo_gamma`` is negative.

    Example:
        At a margin of γ/β the loss is log 2, that of a pair without one in DPO:

        >>> loss_fn = SimPOLossFn(DPOLossConfig(reference_policy_kl_penalty=2.0))
        >>> loss_fn.pair_losses(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.25]), beta=2.0)
        tensor([0.9741, 0.6931])
    """

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.preference_average_log_probs = True
        self.gamma = getattr(cfg, "simpo_gamma", 0.5)
        if not (isinstance(self.gamma, float | int) and self.gamma >= 0):
            raise ValueError(f"simpo_gamma: got {self.gamma!r}, expected a number, 0 or more")

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        return -logsigmoid(beta * (chosen - rejected) - self.gamma)


class SLiCLossFn(ReferenceFreeLossFn):
    r"""Sequence likelihood calibration: the hinge loss on log-probabilities.

    .. math:: L = \max(0, δ - β (s_w - s_l))

    The paper has β = 1, and regularizes with the SFT loss (``sft_loss_weight``). TRL's CPO trainer
    with "hinge" has δ = 1. δ is the config key ``slic_delta``, 1 if not given. With a reference
    policy the loss is `pairwise.HingeLossFn`.

    Source: Zhao et al. (2023), https://arxiv.org/abs/2305.10425, Section 2.

    Raises:
        ValueError: if ``slic_delta`` is not positive.

    Example:
        >>> loss_fn = SLiCLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0))
        >>> loss_fn.pair_losses(torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -3.0]), beta=1.0)
        tensor([0.5000, 0.0000])
    """

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.delta = getattr(cfg, "slic_delta", 1.0)
        if not (isinstance(self.delta, float | int) and self.delta > 0):
            raise ValueError(f"slic_delta: got {self.delta!r}, expected a number, more than 0")

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        return torch.relu(self.delta - beta * (chosen - rejected))


class ORPOLossFn(ReferenceFreeLossFn):
    r"""Odds-ratio preference optimization: the SFT loss and a log odds ratio.

    .. math::
        L &= w_s L_s - w_p \log σ\Big(\log \frac{odds_w}{odds_l}\Big) \\
        odds &= \frac{p}{1 - p}, \quad p = \exp\Big(\frac{s}{|y|}\Big)

    The paper's λ is w_p / w_s, ``preference_loss_weight`` over ``sft_loss_weight``; set for example
    0.1 and 1, and ``sft_average_log_probs``. β is not used. s is divided by the length whatever
    ``preference_average_log_probs`` says. A p above 1 - 1e-7 counts as that.

    The SFT loss is of the chosen response, as in the paper; TRL's is a mean over the tokens of
    prompt and response.

    Source: Hong et al. (2024), https://arxiv.org/abs/2403.07691, Eqs. 4 and 7.

    Raises:
        ValueError: if ``sft_loss_weight`` is not positive: alone, the odds ratio is not ORPO.

    Example:
        Probabilities of a token of 0.5 and 0.25: the odds are 1 and 1/3:

        >>> loss_fn = ORPOLossFn(
        ...     DPOLossConfig(reference_policy_kl_penalty=1.0, sft_loss_weight=1.0)
        ... )
        >>> loss_fn.pair_losses(torch.tensor([-0.6931]), torch.tensor([-1.3863]), beta=1.0)
        tensor([0.2877])
    """

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.preference_average_log_probs = True
        if not self.sft_loss_weight > 0:
            raise ValueError(
                f"sft_loss_weight: got {self.sft_loss_weight!r}, expected more than 0: ORPO is the "
                "SFT loss plus λ times the odds-ratio loss. Set sft_loss_weight=1 and "
                "preference_loss_weight=λ, for example 0.1"
            )

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        return -logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, nats, for p up to 1 - 1e-7 and constant above.

    Example:
        >>> log_odds(torch.tensor([0.5, 0.25]).log())
        tensor([ 0.0000, -1.0986])
    """
    log_p = log_p.to(torch.promote_types(log_p.dtype, torch.float32)).clamp(max=-1e-7)
    return log_p - torch.log(-torch.expm1(log_p))
