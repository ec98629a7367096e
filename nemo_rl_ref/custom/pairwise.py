# SPDX-License-Identifier: Apache-2.0
r"""Losses that are a function of a pair's two log-ratios.

In all of them h_w and h_l are the log-ratios of the chosen and the rejected response in nats,

.. math:: h = \sum_t \log \frac{π_θ(y_t \mid x, y_{<t})}{π_{ref}(y_t \mid x, y_{<t})}

or the mean over the response's tokens with ``preference_average_log_probs``. Δ = h_w - h_l, σ is
the logistic function and β is ``reference_policy_kl_penalty``. The equations are the loss of one
pair; the loss of the batch is the mean over its valid pairs. The SFT term, the weights and the
metrics are DPO's: ``rewards_*_mean`` are mean log-ratios, not multiplied by β.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn
from nemo_rl_ref.algorithms.utils import masked_mean


class PairLossFn(DPOLossFn):
    """DPO with another loss of a pair. A subclass says which, in `pair_losses`.

    Whatever log-ratios a masked pair has, NaN included, it adds nothing to the preference loss and
    its gradient.

    Example:
        A loss of one's own is one method:

        >>> class SquaredLossFn(PairLossFn):
        ...     def pair_losses(self, chosen, rejected, beta):
        ...         return (beta * (chosen - rejected) - 1).square()
        ...
        >>> loss_fn = SquaredLossFn(DPOLossConfig())
        >>> loss_fn.pair_losses(torch.tensor([20.0]), torch.tensor([10.0]), beta=0.05)
        tensor([0.2500])
    """

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        """Returns the loss of each pair (P,) from its log-ratios (P,) and (P,), nats."""
        raise NotImplementedError(f"{type(self).__name__} has no pair_losses")

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


class IPOLossFn(PairLossFn):
    r"""Identity preference optimization: pulls the margin to a target instead of to infinity.

    .. math:: L = \Big(h_w - h_l - \frac{1}{2β}\Big)^2

    The paper's h are sums over tokens. TRL divides each by the response's length, and reports that
    the authors' results were obtained so: set ``preference_average_log_probs`` for that.

    Source: Azar et al. (2023), https://arxiv.org/abs/2310.12036, Eq. 17; β is τ there.

    Raises:
        ValueError: if ``reference_policy_kl_penalty`` is not positive.

    Example:
        The margin that has no loss is 1/(2β); a larger one has:

        >>> loss_fn = IPOLossFn(DPOLossConfig(reference_policy_kl_penalty=0.5))
        >>> loss_fn.pair_losses(torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3), beta=0.5)
        tensor([1., 0., 1.])
    """

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        beta = self.reference_policy_kl_penalty
        if not beta > 0:
            raise ValueError(f"reference_policy_kl_penalty: got {beta!r}, expected more than 0")

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        return (chosen - rejected - 1 / (2 * beta)).square()


class HingeLossFn(PairLossFn):
    r"""Hinge loss: pairs with a margin of 1/β or more have no gradient.

    .. math:: L = \max(0, 1 - β (h_w - h_l))

    This is what TRL calls "hinge". SLiC-HF itself has no reference policy: for that see
    `reference_free.SLiCLossFn`.

    Source: Liu et al. (2023), https://arxiv.org/abs/2309.06657, the loss "hinge-norm"; γ is β.

    Example:
        Margins of 0, 1/β and more:

        >>> loss_fn = HingeLossFn(DPOLossConfig(reference_policy_kl_penalty=0.5))
        >>> loss_fn.pair_losses(torch.tensor([0.0, 2.0, 4.0]), torch.zeros(3), beta=0.5)
        tensor([1., 0., 0.])
    """

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        return torch.relu(1 - beta * (chosen - rejected))


class DPOPLossFn(PairLossFn):
    r"""DPO-Positive: DPO that also objects when the chosen response becomes less likely.

    .. math:: L = -\log σ\big(β (h_w - h_l - λ \max(0, -h_w))\big)

    λ is the config key ``dpop_penalty``, 5 if not given.

    Source: Pal et al. (2024), https://arxiv.org/abs/2402.13228.

    Raises:
        ValueError: if ``dpop_penalty`` is not 0 or more.

    Example:
        The same margin, with a chosen response that has become more and less likely:

        >>> loss_fn = DPOPLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0))
        >>> loss_fn.pair_losses(torch.tensor([1.0, -1.0]), torch.tensor([0.0, -2.0]), beta=1.0)
        tensor([0.3133, 4.0181])
    """

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.penalty = getattr(cfg, "dpop_penalty", 5.0)
        if not (isinstance(self.penalty, float | int) and self.penalty >= 0):
            raise ValueError(f"dpop_penalty: got {self.penalty!r}, expected 0 or more")

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        return -logsigmoid(beta * (chosen - rejected - self.penalty * torch.relu(-chosen)))


class RobustDPOLossFn(PairLossFn):
    r"""Robust DPO: an unbiased estimate of the DPO loss when a share ε of the labels is flipped.

    .. math:: L = \frac{-(1-ε) \log σ(βΔ) + ε \log σ(-βΔ)}{1 - 2ε}

    It falls without bound as Δ grows: that is the price of unbiasedness. ε is the config key
    ``label_smoothing``, 0.1 if not given.

    Source: Chowdhury et al. (2024), https://arxiv.org/abs/2403.00409, the loss "rDPO".

    Raises:
        ValueError: if ``label_smoothing`` is not in [0, 0.5).

    Example:
        It falls below 0 where the margin is large:

        >>> loss_fn = RobustDPOLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0))
        >>> loss_fn.pair_losses(torch.tensor([0.0, 10.0]), torch.zeros(2), beta=1.0)
        tensor([ 0.6931, -1.2500])
    """

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.label_smoothing = getattr(cfg, "label_smoothing", 0.1)
        if not (isinstance(self.label_smoothing, float | int) and 0 <= self.label_smoothing < 0.5):
            raise ValueError(
                f"label_smoothing: got {self.label_smoothing!r}, expected a number in [0, 0.5)"
            )

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        margin, epsilon = beta * (chosen - rejected), self.label_smoothing
        clean, flipped = -logsigmoid(margin), -logsigmoid(-margin)
        return ((1 - epsilon) * clean - epsilon * flipped) / (1 - 2 * epsilon)


class ConservativeDPOLossFn(PairLossFn):
    r"""Conservative DPO: the cross-entropy with labels that are wrong with probability ε.

    .. math:: L = -(1-ε) \log σ(βΔ) - ε \log σ(-βΔ)

    Least at σ(βΔ) = 1 - ε, so that the margin stays finite. ε is the config key
    ``label_smoothing``, 0.1 if not given.

    Source: Mitchell (2023), "A note on DPO with noisy preferences and relationship to IPO",
    https://ericmitchell.ai/cdpo.pdf.

    Raises:
        ValueError: if ``label_smoothing`` is not in [0, 0.5].

    Example:
        Too large a margin costs, because a tenth of the labels may be wrong:

        >>> loss_fn = ConservativeDPOLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0))
        >>> loss_fn.pair_losses(torch.tensor([0.0, 2.0, 20.0]), torch.zeros(3), beta=1.0)
        tensor([0.6931, 0.3269, 2.0000])
    """

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.label_smoothing = getattr(cfg, "label_smoothing", 0.1)
        if not (isinstance(self.label_smoothing, float | int) and 0 <= self.label_smoothing <= 0.5):
            raise ValueError(
                f"label_smoothing: got {self.label_smoothing!r}, expected a number in [0, 0.5]"
            )

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        margin, epsilon = beta * (chosen - rejected), self.label_smoothing
        return -(1 - epsilon) * logsigmoid(margin) - epsilon * logsigmoid(-margin)


class EXOPairLossFn(PairLossFn):
    r"""EXO for pairs: the KL divergence from the policy's preference to the smoothed label.

    .. math:: L = σ(βΔ) \log \frac{σ(βΔ)}{1-ε} + σ(-βΔ) \log \frac{σ(-βΔ)}{ε}

    Conservative DPO has the two distributions of this divergence the other way round. The gradient
    vanishes for very wrong pairs too. ε is the config key ``label_smoothing``, 0.001 if not given.

    Source: Ji et al. (2024), https://arxiv.org/abs/2402.00856, Eq. 16.

    Raises:
        ValueError: if ``label_smoothing`` is not in (0, 0.5].

    Example:
        >>> loss_fn = EXOPairLossFn(
        ...     DPOLossConfig(reference_policy_kl_penalty=1.0, label_smoothing=0.1)
        ... )
        >>> loss_fn.pair_losses(torch.tensor([-2.0, 0.0, 2.0]), torch.zeros(3), beta=1.0)
        tensor([1.6753, 0.5108, 0.0019])
    """

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.label_smoothing = getattr(cfg, "label_smoothing", 0.001)
        if not (isinstance(self.label_smoothing, float | int) and 0 < self.label_smoothing <= 0.5):
            raise ValueError(
                f"label_smoothing: got {self.label_smoothing!r}, expected a number in (0, 0.5]"
            )

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        margin, epsilon = beta * (chosen - rejected), self.label_smoothing
        right, wrong = logsigmoid(margin), logsigmoid(-margin)
        return right.exp() * (right - math.log1p(-epsilon)) + wrong.exp() * (
            wrong - math.log(epsilon)
        )


class NCAPairLossFn(PairLossFn):
    r"""Noise-contrastive alignment for pairs: holds the chosen response up by itself.

    .. math:: L = -\log σ(β h_w) - \tfrac12 \log σ(-β h_w) - \tfrac12 \log σ(-β h_l)

    Source: Chen et al. (2024), https://arxiv.org/abs/2402.05369, the loss "NCA" with K = 2
    responses, one of which has all the reward.

    Example:
        The same margin with both responses up, and with both down:

        >>> loss_fn = NCAPairLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0))
        >>> loss_fn.pair_losses(torch.tensor([2.0, -1.0]), torch.tensor([1.0, -2.0]), beta=1.0)
        tensor([1.8470, 1.5334])
    """

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        chosen, rejected = beta * chosen, beta * rejected
        return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


class SPPOHardLossFn(PairLossFn):
    r"""Self-play preference optimization with a winning probability of 1 for the chosen response.

    .. math:: L = \Big(h_w - \frac{1}{2β}\Big)^2 + \Big(h_l + \frac{1}{2β}\Big)^2

    The paper regresses h to η (P - 1/2), P being the probability that the response beats the
    policy's own. Here, as in TRL, P is 1 for the chosen and 0 for the rejected response, η is 1/β,
    and the responses of a pair are added. ``preference_average_log_probs`` should stay off.

    Source: Wu et al. (2024), https://arxiv.org/abs/2405.00675, Eq. 4.7.

    Raises:
        ValueError: if ``reference_policy_kl_penalty`` is not positive.

    Example:
        The two log-ratios are pulled to 1/(2β) and -1/(2β):

        >>> loss_fn = SPPOHardLossFn(DPOLossConfig(reference_policy_kl_penalty=0.5))
        >>> loss_fn.pair_losses(torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 0.0]), beta=0.5)
        tensor([0., 1.])
    """

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        beta = self.reference_policy_kl_penalty
        if not beta > 0:
            raise ValueError(f"reference_policy_kl_penalty: got {beta!r}, expected more than 0")

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        target = 1 / (2 * beta)
        return (chosen - target).square() + (rejected + target).square()


class APOZeroLossFn(PairLossFn):
    r"""Anchored preference optimization, zero: chosen up, rejected down.

    .. math:: L = 1 - σ(β h_w) + σ(β h_l)

    For chosen responses that are better than what the policy writes. The paper has no 1: it keeps
    the loss positive, as in TRL, and changes no gradient.

    Source: D'Oosterlinck et al. (2024), https://arxiv.org/abs/2408.06266, Eq. 7.

    Example:
        The same margin with both responses up, and with both down:

        >>> loss_fn = APOZeroLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0))
        >>> loss_fn.pair_losses(torch.tensor([2.0, -1.0]), torch.tensor([1.0, -2.0]), beta=1.0)
        tensor([0.8503, 0.8503])
    """

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


class APODownLossFn(PairLossFn):
    r"""Anchored preference optimization, down: both down, the rejected response further.

    .. math:: L = σ(β h_w) + 1 - σ(β (h_w - h_l))

    For chosen responses that are worse than what the policy writes. The paper has no 1, see
    `APOZeroLossFn`.

    Source: D'Oosterlinck et al. (2024), https://arxiv.org/abs/2408.06266, Eq. 8.

    Example:
        The same margin with both responses up, and with both down:

        >>> loss_fn = APODownLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0))
        >>> loss_fn.pair_losses(torch.tensor([2.0, -1.0]), torch.tensor([1.0, -2.0]), beta=1.0)
        tensor([1.1497, 0.5379])
    """

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        return torch.sigmoid(beta * chosen) + torch.sigmoid(beta * (rejected - chosen))


class DiscoPOPLossFn(PairLossFn):
    r"""DiscoPOP: a blend of the logistic and the exponential loss, found by a language model.

    .. math:: L = -σ(-βΔ/τ) \log σ(βΔ) + σ(βΔ/τ) \exp(-βΔ)

    Not convex: with τ = 0.05 it has a local minimum at βΔ = -0.12 and a local maximum at 0.07, and
    pairs to the left of the maximum are pulled to the minimum. τ is the config key
    ``discopop_tau``, 0.05 if not given; above 1 the exponential would win for very wrong pairs and
    overflow.

    Source: Lu et al. (2024), https://arxiv.org/abs/2406.08414, Eq. 5.

    Raises:
        ValueError: if ``discopop_tau`` is not in (0, 1].

    Example:
        >>> loss_fn = DiscoPOPLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0))
        >>> loss_fn.pair_losses(torch.tensor([-1.0, 0.0, 1.0]), torch.zeros(3), beta=1.0)
        tensor([1.3133, 0.8466, 0.3679])
    """

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.tau = getattr(cfg, "discopop_tau", 0.05)
        if not (isinstance(self.tau, float | int) and 0 < self.tau <= 1):
            raise ValueError(f"discopop_tau: got {self.tau!r}, expected a number in (0, 1]")

    def pair_losses(self, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
        margin = beta * (chosen - rejected)
        logistic = -torch.sigmoid(-margin / self.tau) * logsigmoid(margin)
        # One exponential of a sum: the product would be 0 times infinity for very wrong pairs.
        return logistic + torch.exp(logsigmoid(margin / self.tau) - margin)


class LengthNormalizedDPOLossFn(DPOLossFn):
    r"""DPO on mean log-ratios, so that a long response counts no more than a short one.

    .. math:: L = -\log σ\Big(β \Big(\frac{h_w}{|y_w|} - \frac{h_l}{|y_l|}\Big)\Big)

    with h the sums over tokens. NeMo RL has it: this is `DPOLossFn` with
    ``preference_average_log_probs``, whatever the config says. TRL calls it "sigmoid_norm".

    Source: Lambert et al. (2024), https://arxiv.org/abs/2411.15124, Section 5.

    Example:
        >>> loss_fn = LengthNormalizedDPOLossFn(DPOLossConfig())
        >>> loss_fn.preference_average_log_probs
        True
    """

    def __init__(self, cfg: DPOLossConfig, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)
        self.preference_average_log_probs = True
