# SPDX-License-Identifier: Apache-2.0
"""Tensor functions that several losses share."""

import torch


def calculate_kl(
    logprobs: torch.Tensor,
    logprobs_reference: torch.Tensor,
    kl_type: str = "k3",
    input_clamp_value: float | None = 20.0,
    output_clamp_value: float | None = 10.0,
    importance_sampling_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Estimates KL(π‖π_ref) at each token from the log-probability of the sampled token alone.

    With r = log π_ref(a) - log π(a) for a token a drawn from π:

    ====  ================  ===========================================================
    type  value             mean over a ~ π, without clamps
    ====  ================  ===========================================================
    k1    -r                KL(π‖π_ref): unbiased; single values are often negative
    k2    r²/2              biased; agrees with the KL to second order where π ≈ π_ref
    k3    exp(r) - 1 - r    KL(π‖π_ref): unbiased if π > 0 wherever π_ref > 0; never negative
    ====  ================  ===========================================================

    "Unbiased" holds only for tokens drawn from π, the distribution of `logprobs`. For tokens
    drawn from an older policy, weight each token by π(a)/π_old(a): that is what
    `importance_sampling_weights` is for. The weights matter for the gradient even where their
    value is 1. Averaged over a ~ π, the gradient of k1 alone is zero, that of k2 is the gradient
    of KL(π‖π_ref), and that of k3 is the gradient of KL(π_ref‖π). With the weight
    π/π_old, the gradients of weighted k1 and k3 are those of KL(π‖π_ref).

    Both clamps bias the estimate; where a clamp binds, the token gets no gradient.

    Args:
        logprobs: log π of the sampled tokens, nats, floating, any shape, usually (B, S-1).
        logprobs_reference: log π_ref of the same tokens, nats, same shape.
        kl_type: "k1", "k2" or "k3".
        input_clamp_value: r is clamped to ± this value, nats; None for no clamp. A token whose r
            is clamped has its importance weight detached, so that it gets no gradient at all.
        output_clamp_value: the weighted estimate is clamped to ± this value; None for no clamp.
        importance_sampling_weights: weights multiplied in before the output clamp, broadcastable
            to the shape of `logprobs`.

    Returns:
        The estimate at each token, nats, shape of `logprobs`.

    Raises:
        ValueError: if `kl_type` is unknown or the two shapes differ.

    Source:
        J. Schulman, "Approximating KL Divergence" (2020),
        http://joschu.net/blog/kl-approx.html.
    """
    if logprobs_reference.shape != logprobs.shape:
        raise ValueError(
            f"logprobs_reference has shape {tuple(logprobs_reference.shape)}, "
            f"expected that of logprobs, {tuple(logprobs.shape)}"
        )
    weights = importance_sampling_weights
    r = logprobs_reference - logprobs
    if input_clamp_value is not None:
        clamped = r.clamp(-input_clamp_value, input_clamp_value)
        if weights is not None:
            weights = torch.where(r == clamped, weights, weights.detach())
        r = clamped

    if kl_type == "k1":
        kl = -r
    elif kl_type == "k2":
        kl = r.square() / 2
    elif kl_type == "k3":
        kl = r.exp() - 1 - r
    else:
        raise ValueError(f"kl_type is {kl_type!r}, expected 'k1', 'k2' or 'k3'")

    if weights is not None:
        kl = weights * kl
    if output_clamp_value is not None:
        kl = kl.clamp(-output_clamp_value, output_clamp_value)
    return kl


def masked_mean(
    values: torch.Tensor,
    mask: torch.Tensor,
    dim: int | None = None,
    global_normalization_factor: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Sums the values under a mask and divides by a count.

    The count is that of the mask, or, if given, that of the whole global batch. With the global
    count the results of all micro-batches and ranks *sum* to the mean over the global batch,
    however unequal their sizes.

    1e-8 is added to the count, so that an empty mask gives 0. A NaN or an infinity under a zero
    of the mask is not hidden: it is multiplied by 0, which is NaN.

    Args:
        values: any shape, floating or boolean.
        mask: 0 and 1 (or weights), shape broadcastable with `values`.
        dim: the dimension to reduce; None for all.
        global_normalization_factor: the number to divide by instead of the sum of the mask.

    Returns:
        The mean: a scalar, or `values` without dimension `dim`.
    """
    count = global_normalization_factor
    if count is None:
        count = mask.sum(dim=dim)
    return (values * mask).sum(dim=dim) / (count + 1e-8)
