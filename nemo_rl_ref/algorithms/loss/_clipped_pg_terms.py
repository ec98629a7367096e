# SPDX-License-Identifier: Apache-2.0
"""The loss and the metrics of the clipped policy gradient: plain PyTorch, or CUDA kernels.

`clipped_pg_terms` is what `ClippedPGLossFn` calls. In plain PyTorch it is `named_terms`, made of
the functions in `Parts`, which a subclass of the loss may replace; the kernels are those of
``kernels/clipped_pg.cu``, in ``_clipped_pg_op``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_rl_ref.algorithms.loss import _policy_gradient as pg
from nemo_rl_ref.algorithms.loss._clipped_pg_op import run_op
from nemo_rl_ref.algorithms.loss.interfaces import LossType
from nemo_rl_ref.algorithms.utils import masked_mean
from nemo_rl_ref.kernels.backend import use_kernels

#: What `clipped_pg_terms` returns, in this order. The names are those of the loss's metrics.
TERMS = (
    "loss",
    "probs_ratio",
    "probs_ratio_min",
    "probs_ratio_max",
    "probs_ratio_clamped",
    "probs_ratio_clamped_min",
    "probs_ratio_clamped_max",
    "kl_penalty",
    "token_mult_prob_error",
    "gen_kl_error",
    "policy_kl_error",
    "js_divergence_error",
    "sampling_importance_ratio",
    "is_oob_ratio",
    "num_valid_samples",
    "approx_entropy",
    "positive_nll_loss",
)


@dataclass(frozen=True)
class Settings:
    """What the loss computes: flags and numbers.

    Attributes are those of `ClippedPGLossFn`, which checks them; `ClippedPGLossConfig` says what
    they mean. `loss_type` is its ``token_level_loss``, and `reference_policy_kl_penalty` is 0 with
    its ``use_kl_in_reward``.
    """

    loss_type: LossType
    disable_ppo_ratio: bool
    force_on_policy_ratio: bool
    sequence_level_importance_ratios: bool
    use_cispo: bool
    ratio_clip_min: float
    ratio_clip_max: float
    ratio_clip_c: float | None
    reference_policy_kl_penalty: float
    reference_policy_kl_type: str
    kl_input_clamp_value: float | None
    kl_output_clamp_value: float | None
    use_on_policy_kl_approximation: bool
    use_importance_sampling_correction: bool
    truncated_importance_sampling_type: str | None
    truncated_importance_sampling_ratio: float | None
    truncated_importance_sampling_ratio_min: float | None
    positive_example_nll_weight: float

    @classmethod
    def of(cls, loss_fn: Any) -> Settings:
        """Read the attributes of a loss as they are now."""
        return cls(**{field.name: getattr(loss_fn, field.name) for field in fields(cls)})


def clipped_pg_terms(
    logprobs: Tensor,
    prev_logprobs: Tensor | None,
    generation_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    settings: Settings,
    *,
    sample_mask: Tensor | None = None,
    rewards: Tensor | None = None,
    unfiltered_logprobs: Tensor | None = None,
    global_valid_seqs: Tensor | float | None = None,
    global_valid_toks: Tensor | float | None = None,
    backend: str | None = None,
    plain: Callable[..., dict[str, Tensor]] | None = None,
) -> Tensor:
    """Compute the clipped policy-gradient loss and all its metrics: one vector on the device.

    `ClippedPGLossFn` says what they are and turns them into numbers. Everything is a sum over the
    micro-batch under the masks, divided by a count of the global batch. On CUDA it is one kernel
    forward and one backward; neither waits for the host, and both give the same bits for the same
    input. Plain PyTorch runs instead, whatever the backend, where the kernels would compute
    something else or nothing:

    - with no tokens at all;
    - where a tensor other than `logprobs` and `unfiltered_logprobs` requires a gradient, which
      the kernels do not give;
    - where `plain` is given.

    What stands under a mask is multiplied by 0: a NaN there makes the loss NaN, as in NeMo RL. Two
    values can be a number or an infinity from the kernels where plain PyTorch has NaN: the terms
    of a response whose ratio (``sequence_level_importance_ratios``) is more than float32 can hold,
    and ``js_divergence_error`` where both policies give a token less than e^-100.

    Args:
        logprobs: log π_θ, (B, T) floating, nats, one a predicted token.
        prev_logprobs: log π_old, (B, T); None with ``force_on_policy_ratio``.
        generation_logprobs: log π_gen, (B, T).
        reference_logprobs: log π_ref, (B, T); None without a KL term.
        advantages: (B, T).
        mask: (B, T), 1 on response tokens.
        settings: the flags and numbers.
        sample_mask: (B,), 1 for responses that count; all, if None.
        rewards: (B,), for the NLL of positive examples, which is left out without them.
        unfiltered_logprobs: log π_θ for the KL term, (B, T); `logprobs`, if None.
        global_valid_seqs: responses in the global batch, scalar. None for 1: means over responses
            are sums.
        global_valid_toks: unmasked tokens in the global batch, scalar. None for 1: means over
            tokens are sums.
        backend: "cuda", "torch", or None for what `NEMO_RL_REF_BACKEND` says, else by device.
        plain: what computes the terms instead, with the arguments of `named_terms` after the
            first two.

    Returns:
        (17,): the values named in `TERMS`, 0 for what the flags leave out. float32, or the widest
        floating dtype of the inputs. ``loss``, ``kl_penalty`` and ``positive_nll_loss`` have a
        gradient in `logprobs` and `unfiltered_logprobs`.

    Raises:
        TypeError: if log-probabilities are not floating.
        ValueError: if a shape does not fit, a tensor is missing that the flags need, or the
            backend is unknown or not to be had.
    """
    with_kl = settings.reference_policy_kl_penalty != 0
    others = {
        "generation_logprobs": generation_logprobs,
        "advantages": advantages,
        "mask": mask,
        "unfiltered_logprobs": unfiltered_logprobs,
    }
    if settings.force_on_policy_ratio:
        prev = logprobs.detach()
    else:
        prev = others["prev_logprobs"] = _given(
            prev_logprobs, "prev_logprobs", "force_on_policy_ratio"
        )
    if with_kl:
        others["reference_logprobs"] = _given(
            reference_logprobs, "reference_logprobs", "reference_policy_kl_penalty=0"
        )
    _check(logprobs, others, sample_mask, rewards)
    if sample_mask is None:
        sample_mask = torch.ones(len(logprobs), device=logprobs.device)
    if settings.positive_example_nll_weight <= 0:
        rewards = None
    if not with_kl:
        reference_logprobs = unfiltered_logprobs = None
    tensors = (logprobs, prev, generation_logprobs, reference_logprobs, advantages)
    tensors = (*tensors, unfiltered_logprobs, mask, sample_mask, rewards)
    counts = (global_valid_seqs, global_valid_toks)

    # Asked first, because it also says what is wrong with `backend`.
    on_kernels = use_kernels(backend, logprobs.device)
    if on_kernels and plain is None and not _needs_plain(*tensors):
        return run_op(settings, tensors, counts)
    compute = plain or partial(named_terms, settings, Parts.of(settings))
    terms = compute(*tensors, *(1.0 if count is None else count for count in counts))
    zero = logprobs.new_zeros(())
    vector = torch.stack([terms.get(name, zero) for name in TERMS])
    return vector.to(torch.promote_types(vector.dtype, torch.float32))


def _given(tensor: Tensor | None, name: str, without: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"{name} is None, expected (B, T): only {without} goes without")
    return tensor


def _check(
    logprobs: Tensor,
    others: dict[str, Tensor | None],
    sample_mask: Tensor | None,
    rewards: Tensor | None,
) -> None:
    if logprobs.ndim != 2:
        raise ValueError(f"logprobs has shape {tuple(logprobs.shape)}, expected (B, T)")
    for name, tensor in (("logprobs", logprobs), *others.items()):
        if tensor is None:
            continue
        if name.endswith("logprobs") and not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")
        if tensor.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected that of logprobs, "
                f"{tuple(logprobs.shape)}"
            )
    for name, tensor in (("sample_mask", sample_mask), ("rewards", rewards)):
        if tensor is not None and tensor.shape != logprobs.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected (B,) = "
                f"{tuple(logprobs.shape[:1])}"
            )


def _needs_plain(logprobs: Tensor, *rest: Tensor | None) -> bool:
    """Whether the kernels would compute something else than plain PyTorch, or nothing."""
    prev, generation, reference, advantages, _, *masks_and_rewards = rest
    fixed = (prev, generation, reference, advantages, *masks_and_rewards)
    return logprobs.numel() == 0 or (
        torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in fixed)
    )


# ---- in plain PyTorch ---------------------------------------------------------------------------


def ratios(
    settings: Settings, logprobs: Tensor, prev_logprobs: Tensor, token_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ratios and clipped ratios; the same tensor twice where nothing is clipped."""
    if settings.force_on_policy_ratio:
        ones = pg.on_policy_ratios(logprobs)
        return ones, ones
    if settings.disable_ppo_ratio:
        return logprobs, logprobs
    if settings.sequence_level_importance_ratios:
        raw = pg.sequence_ratios(logprobs, prev_logprobs, token_mask)
    else:
        raw = pg.token_ratios(logprobs, prev_logprobs)
    return raw, pg.clip_ratios(raw, settings.ratio_clip_min, settings.ratio_clip_max)


def surrogate(
    settings: Settings, logprobs: Tensor, advantages: Tensor, ratios: Tensor, clipped: Tensor
) -> Tensor:
    """Compute the policy-gradient loss of each token."""
    if settings.use_cispo:
        return pg.cispo_surrogate(advantages, clipped, logprobs)
    losses = pg.clipped_surrogate(advantages, ratios, clipped)
    if settings.ratio_clip_c is not None:
        losses = pg.dual_clip(losses, advantages, settings.ratio_clip_c)
    return losses


def importance_weights(
    settings: Settings,
    prev_logprobs: Tensor,
    generation_logprobs: Tensor,
    token_mask: Tensor,
    mask: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Return π_old/π_gen, (B, T) or (B, 1), and what the truncation found outside its bounds."""
    if settings.sequence_level_importance_ratios:
        weights = pg.sequence_importance_weights(prev_logprobs, generation_logprobs, mask)
    else:
        weights = pg.importance_weights(prev_logprobs, generation_logprobs)
    kind = settings.truncated_importance_sampling_type
    low = settings.truncated_importance_sampling_ratio_min or 0.0
    high = settings.truncated_importance_sampling_ratio
    if kind is None or high is None:
        return weights, None
    if kind == "tis":
        return pg.truncate_weights(weights, low, high)
    if kind == "icepop":
        return pg.zero_outside_weights(weights, low, high)
    return pg.zero_outside_sequences(
        weights, prev_logprobs, generation_logprobs, token_mask, low, high
    )


def kl_estimate(
    settings: Settings, logprobs: Tensor, generation: Tensor, reference: Tensor
) -> Tensor:
    """Estimate the KL at each token, nats."""
    return pg.kl_term(
        logprobs,
        reference,
        settings.reference_policy_kl_type,
        settings.kl_input_clamp_value,
        settings.kl_output_clamp_value,
        sampled_logprobs=generation if settings.use_on_policy_kl_approximation else None,
    )


def importance_metrics(
    settings: Settings,
    weights: Tensor,
    outside: Tensor | None,
    mask: Tensor,
    sample_mask: Tensor,
    valid_seqs: Tensor | float,
    valid_toks: Tensor | float,
) -> dict[str, Tensor]:
    """Return the mean weight and the share outside the bounds: of responses or of tokens."""
    over_tokens, over_responses = (mask, valid_toks), (sample_mask, valid_seqs)

    def mean(values: Tensor, over: tuple[Tensor, Tensor | float]) -> Tensor:
        return masked_mean(values, over[0], global_normalization_factor=over[1])

    # (B, 1) weights against a (B,) mask make a (B, B) product, as in NeMo RL.
    level = over_responses if settings.sequence_level_importance_ratios else over_tokens
    metrics = {"sampling_importance_ratio": mean(weights, level)}
    if outside is not None:
        whole = settings.truncated_importance_sampling_type == "seq-mask-tis"
        metrics["is_oob_ratio"] = mean(outside, over_responses if whole else over_tokens)
    return metrics


class Parts(NamedTuple):
    """The parts of the loss, each a function above without its first argument, or another."""

    ratios: Callable[..., tuple[Tensor, Tensor]]
    surrogate: Callable[..., Tensor]
    importance_weights: Callable[..., tuple[Tensor, Tensor | None]]
    kl_estimate: Callable[..., Tensor]
    importance_metrics: Callable[..., dict[str, Tensor]]

    @classmethod
    def of(cls, settings: Settings) -> Parts:
        """Return the functions above, with their settings."""
        return cls(
            partial(ratios, settings),
            partial(surrogate, settings),
            partial(importance_weights, settings),
            partial(kl_estimate, settings),
            partial(importance_metrics, settings),
        )


def named_terms(
    settings: Settings,
    parts: Parts,
    logprobs: Tensor,
    prev: Tensor,
    generation: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    unfiltered: Tensor | None,
    token_mask: Tensor,
    sample_mask: Tensor,
    rewards: Tensor | None,
    valid_seqs: Tensor | float,
    valid_toks: Tensor | float,
) -> dict[str, Tensor]:
    """Compute the loss and its metrics as scalar tensors, in plain PyTorch.

    Args:
        settings: the flags and numbers.
        parts: the loss's own, or `Parts.of` the settings.
        logprobs: log π_θ, (B, T), nats.
        prev: log π_old, (B, T).
        generation: log π_gen, (B, T).
        reference: log π_ref, (B, T); read with a KL penalty only.
        advantages: (B, T).
        unfiltered: log π_θ for the KL term, (B, T); None for `logprobs`.
        token_mask: (B, T).
        sample_mask: (B,).
        rewards: (B,), or None for no NLL of positive examples.
        valid_seqs: valid responses of the global batch.
        valid_toks: unmasked tokens of the global batch.

    Returns:
        What `TERMS` names, but for what the flags leave out.
    """
    counts = (valid_seqs, valid_toks)
    mask = token_mask * sample_mask.unsqueeze(-1)
    ratios, clipped = parts.ratios(logprobs, prev, token_mask)
    losses = parts.surrogate(logprobs, advantages, ratios, clipped)
    weights, outside = parts.importance_weights(prev, generation, token_mask, mask)
    if settings.use_importance_sampling_correction:
        losses = weights * losses
    actor_loss = pg.reduce_tokens(losses, token_mask, sample_mask, settings.loss_type, *counts)

    kl = nll = torch.zeros((), device=mask.device)
    if settings.reference_policy_kl_penalty != 0:
        policy = logprobs if unfiltered is None else unfiltered
        estimate = parts.kl_estimate(policy, generation, reference)
        kl = pg.reduce_tokens(estimate, token_mask, sample_mask, settings.loss_type, *counts)
    if settings.positive_example_nll_weight > 0 and rewards is not None:
        nll = pg.positive_nll(logprobs, rewards, mask)

    loss = (
        actor_loss
        + settings.reference_policy_kl_penalty * kl
        + settings.positive_example_nll_weight * nll
    )
    return {
        "loss": loss,
        **pg.ratio_metrics("probs_ratio", ratios, mask, valid_toks),
        **pg.ratio_metrics("probs_ratio_clamped", clipped, mask, valid_toks),
        "kl_penalty": kl,
        **pg.mismatch_metrics(
            prev, generation, mask, settings.reference_policy_kl_type, valid_toks
        ),
        **parts.importance_metrics(weights, outside, mask, sample_mask, *counts),
        "num_valid_samples": sample_mask.sum(),
        "approx_entropy": pg.entropy_estimate(logprobs, generation, mask, valid_toks),
        "positive_nll_loss": nll,
    }
