# SPDX-License-Identifier: Apache-2.0
r"""The pieces of a policy-gradient loss, one function each.

`ClippedPGLossFn` is made of them; a loss of your own can take the ones it needs. In the order in
which they are used:

- ratio: `token_ratios`, `sequence_ratios`, `on_policy_ratios`, `clip_ratios`
- surrogate, the loss of one token: `clipped_surrogate`, `dual_clip`, `cispo_surrogate`
- importance correction: `importance_weights`, `sequence_importance_weights`, then one of
  `truncate_weights`, `zero_outside_weights`, `zero_outside_sequences`
- KL term: `kl_term`
- positive examples: `positive_nll`
- reduction: `reduce_tokens`
- metrics: `mismatch_metrics`, `ratio_metrics`, `entropy_estimate`

Tensors are (B, T) with T = S - 1, one entry for each predicted token, unless said otherwise.
Log-probabilities are those of the sampled tokens in nats, from four policies: `logprobs` is the
policy π_θ that is trained, `prev_logprobs` the same policy π_old before this step's updates, both
computed by the trainer; `generation_logprobs` is the policy π_gen that sampled, computed by the
inference engine; `reference_logprobs` is the frozen π_ref. Only `logprobs` has a gradient.
"""

from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.algorithms.loss.interfaces import LossType
from nemo_rl_ref.algorithms.utils import calculate_kl, masked_mean

# Ratio


def token_ratios(logprobs: Tensor, prev_logprobs: Tensor) -> Tensor:
    """π_θ/π_old of each token (PPO, https://arxiv.org/abs/1707.06347)."""
    return (logprobs - prev_logprobs).exp()


def sequence_ratios(logprobs: Tensor, prev_logprobs: Tensor, token_mask: Tensor) -> Tensor:
    """The geometric mean of a response's token ratios, repeated for each of its tokens.

    It is (π_θ(y)/π_old(y))^(1/n) for a response y of n tokens
    (GSPO, https://arxiv.org/abs/2507.18071, Eq. 7).
    """
    log_ratios = logprobs - prev_logprobs
    return masked_mean(log_ratios, token_mask, dim=-1).exp().unsqueeze(-1).expand_as(log_ratios)


def on_policy_ratios(logprobs: Tensor) -> Tensor:
    """Ones whose gradient is that of `logprobs`: the ratio to the policy itself."""
    return (logprobs - logprobs.detach()).exp()


def clip_ratios(ratios: Tensor, clip_min: float, clip_max: float) -> Tensor:
    """Ratios clamped to [1 - clip_min, 1 + clip_max]; no gradient outside.

    DAPO (https://arxiv.org/abs/2503.14476, Section 3.1) makes the upper distance larger.
    """
    return ratios.clamp(1.0 - clip_min, 1.0 + clip_max)


# Surrogate


def clipped_surrogate(advantages: Tensor, ratios: Tensor, clipped_ratios: Tensor) -> Tensor:
    """-min(r A, clip(r) A), PPO's loss of a token.

    Where the ratio has left the interval in the direction that the advantage rewards, there is no
    gradient. That removes the incentive to go further; it does not keep the ratio inside.
    """
    return torch.maximum(-advantages * ratios, -advantages * clipped_ratios)


def dual_clip(losses: Tensor, advantages: Tensor, limit: float) -> Tensor:
    """Where A < 0, bounds the loss of a token by -limit A (https://arxiv.org/abs/1912.09729).

    Without it the loss of a token with a negative advantage grows with its ratio without bound.
    Above the bound there is no gradient.
    """
    return torch.where(advantages < 0, torch.minimum(losses, -advantages * limit), losses)


def cispo_surrogate(advantages: Tensor, clipped_ratios: Tensor, logprobs: Tensor) -> Tensor:
    """-sg(clip(r)) A log π_θ (CISPO, https://arxiv.org/abs/2506.13585, Eq. 4).

    sg stops the gradient. Every token keeps a gradient, also where its ratio is clipped.
    """
    return -advantages * clipped_ratios.detach() * logprobs


# Importance correction: the trainer's policy against the one that sampled


def importance_weights(prev_logprobs: Tensor, generation_logprobs: Tensor) -> Tensor:
    """π_old/π_gen of each token; 0 where that is not a finite number. No gradient."""
    return _finite_or_zero((prev_logprobs - generation_logprobs).exp().detach())


def sequence_importance_weights(
    prev_logprobs: Tensor, generation_logprobs: Tensor, mask: Tensor
) -> Tensor:
    """π_old(y)/π_gen(y) of each response, (B, 1): the product of its unmasked token weights.

    0 where that is not a finite number. No gradient.
    """
    log_weights = ((prev_logprobs - generation_logprobs) * mask).sum(-1, keepdim=True)
    return _finite_or_zero(log_weights.exp().detach())


def truncate_weights(weights: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Weights clamped to [low, high], and where they were outside.

    Truncated importance sampling ("tis"), Yao et al. (2025),
    https://fengyao.notion.site/off-policy-rl.
    """
    outside = (weights > high) | (weights < low)
    return weights.clamp(low, high), outside


def zero_outside_weights(weights: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Weights that are 0 outside [low, high], and where that is.

    IcePop ("icepop"), Ling Team (2025), https://arxiv.org/abs/2510.18855.
    """
    outside = ~((weights >= low) & (weights <= high))
    return weights.masked_fill(outside, 0.0), outside


def zero_outside_sequences(
    weights: Tensor,
    prev_logprobs: Tensor,
    generation_logprobs: Tensor,
    token_mask: Tensor,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """Weights that are 0 in whole responses, (B, T), and which these are, (B,).

    A response is dropped if the geometric mean of its token weights is outside [low, high]. The
    weights of the others stay as they are ("seq-mask-tis").
    """
    log_weights = _finite_or_zero(prev_logprobs - generation_logprobs)
    mean = masked_mean(log_weights, token_mask, dim=-1).exp().detach()
    outside = ~((mean >= low) & (mean <= high))
    return weights * (~outside).to(weights.dtype).unsqueeze(-1), outside


def _finite_or_zero(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


# KL term


def kl_term(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    kl_type: str,
    input_clamp_value: float | None,
    output_clamp_value: float | None,
    sampled_logprobs: Tensor | None = None,
) -> Tensor:
    """An estimate of KL(π_θ‖π_ref) at each token, with the gradient of its expectation.

    The expectation is over tokens drawn from π_θ, so its gradient has a part that comes from the
    sampling. The weight π_θ/sg(π_θ) has the value 1 and brings in that part
    (https://arxiv.org/abs/2506.09477).

    Args:
        logprobs: log π_θ.
        reference_logprobs: log π_ref.
        kl_type: "k1", "k2" or "k3", see `calculate_kl`.
        input_clamp_value: clamp of the log-ratio; None for none.
        output_clamp_value: clamp of the estimate; None for none.
        sampled_logprobs: log-probabilities under the policy that drew the tokens, if that is not
            π_θ. They make the weight π_θ/π_gen, whose value is not 1.

    Returns:
        The estimate, (B, T), nats.
    """
    drawn_from = logprobs.detach() if sampled_logprobs is None else sampled_logprobs
    return calculate_kl(
        logprobs,
        reference_logprobs,
        kl_type=kl_type,
        input_clamp_value=input_clamp_value,
        output_clamp_value=output_clamp_value,
        importance_sampling_weights=_finite_or_zero((logprobs - drawn_from).exp()),
    )


# Positive examples


def positive_nll(logprobs: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """Mean of -log π_θ over the unmasked tokens of responses with a positive reward; scalar.

    0 if there are none (VAPO, https://arxiv.org/abs/2504.05118, Eq. 10). It divides by the
    number of such tokens in this micro-batch: over micro-batches it does not sum to anything.

    `rewards` is (B,).
    """
    correct = mask * (rewards > 0).unsqueeze(-1)
    return masked_mean(-logprobs, correct)


# Reduction


def reduce_tokens(
    values: Tensor,
    token_mask: Tensor,
    sample_mask: Tensor,
    loss_type: LossType,
    global_valid_seqs: Tensor | float,
    global_valid_toks: Tensor | float,
) -> Tensor:
    """The micro-batch's share of the mean over the global batch; scalar.

    Args:
        values: (B, T).
        token_mask: (B, T).
        sample_mask: (B,).
        loss_type: TOKEN_LEVEL for the mean over all tokens (DAPO), where a long response has more
            weight than a short one; SEQUENCE_LEVEL for the mean over responses of the mean over
            their tokens (GRPO as published), where each token of a long response has less.
        global_valid_seqs: number of responses in the global batch.
        global_valid_toks: number of unmasked tokens in the global batch.
    """
    if loss_type is LossType.TOKEN_LEVEL:
        mask = token_mask * sample_mask.unsqueeze(-1)
        return masked_mean(values, mask, global_normalization_factor=global_valid_toks)
    return masked_mean(
        masked_mean(values, token_mask, dim=-1),
        sample_mask,
        global_normalization_factor=global_valid_seqs,
    )


# Metrics


@torch.no_grad()
def mismatch_metrics(
    prev_logprobs: Tensor,
    generation_logprobs: Tensor,
    mask: Tensor,
    kl_type: str,
    global_valid_toks: Tensor | float,
) -> dict[str, Tensor]:
    """How far the trainer's π_old is from the inference engine's π_gen, on the sampled tokens.

    Returns:
        Scalars, shares of means over the global batch's tokens: ``token_mult_prob_error`` of
        exp(abs(log π_old - log π_gen)), which is 1 if the two agree; ``gen_kl_error`` and
        ``policy_kl_error``, estimates of KL(π_gen‖π_old) and KL(π_old‖π_gen);
        ``js_divergence_error``, half the sum of the two k3 estimates against the mixture of both.
        Tokens were drawn from π_gen: only ``gen_kl_error`` (k1, k3) is unbiased.
    """
    mixture = (0.5 * prev_logprobs.exp() + 0.5 * generation_logprobs.exp()).log()
    unclamped = {"input_clamp_value": None, "output_clamp_value": None}
    values = {
        "token_mult_prob_error": ((generation_logprobs - prev_logprobs).abs() * mask).exp(),
        "gen_kl_error": calculate_kl(generation_logprobs, prev_logprobs, kl_type, **unclamped),
        "policy_kl_error": calculate_kl(prev_logprobs, generation_logprobs, kl_type, **unclamped),
        # k3 with the mixture in the place of the policy: exp(x) - x - 1, x = log π - log mixture.
        "js_divergence_error": 0.5 * calculate_kl(mixture, prev_logprobs, "k3", **unclamped)
        + 0.5 * calculate_kl(mixture, generation_logprobs, "k3", **unclamped),
    }
    return {
        name: masked_mean(value, mask, global_normalization_factor=global_valid_toks)
        for name, value in values.items()
    }


@torch.no_grad()
def ratio_metrics(
    name: str, ratios: Tensor, mask: Tensor, global_valid_toks: Tensor | float
) -> dict[str, Any]:
    """Mean, minimum and maximum of ratios over unmasked tokens.

    Returns:
        ``<name>``, the share of the mean over the global batch's tokens, and ``<name>_min`` and
        ``<name>_max`` of this micro-batch, inf and -inf if all its tokens are masked.
    """
    mean = masked_mean(ratios, mask, global_normalization_factor=global_valid_toks)
    low, high = (ratios.masked_fill(~mask.bool(), end) for end in (torch.inf, -torch.inf))
    empty = ratios.numel() == 0
    return {
        name: mean,
        f"{name}_min": ratios.new_tensor(torch.inf) if empty else low.amin(),
        f"{name}_max": ratios.new_tensor(-torch.inf) if empty else high.amax(),
    }


@torch.no_grad()
def entropy_estimate(
    logprobs: Tensor, generation_logprobs: Tensor, mask: Tensor, global_valid_toks: Tensor | float
) -> Tensor:
    """-Σ (π_θ/π_gen) log π_θ over unmasked tokens, divided by the global token count; scalar.

    The weight makes the tokens, drawn from π_gen, count as drawn from π_θ: an unbiased estimate of
    the mean entropy of π_θ at the visited positions, in nats.
    """
    weighted = (logprobs - generation_logprobs).exp() * logprobs
    return -masked_mean(weighted, mask, global_normalization_factor=global_valid_toks)
