# SPDX-License-Identifier: Apache-2.0
"""Tensor functions that several losses and advantage estimators share."""

import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_rl_ref.data.chat_templates import COMMON_CHAT_TEMPLATES


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

    Example:
        Two tokens that the reference finds twice as likely, and half as likely:

        >>> policy = torch.tensor([0.25, 0.25]).log()
        >>> reference = torch.tensor([0.5, 0.125]).log()
        >>> calculate_kl(policy, reference, kl_type="k1")
        tensor([-0.6931,  0.6931])
        >>> calculate_kl(policy, reference, kl_type="k3")
        tensor([0.3069, 0.1931])
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

    Example:
        Two micro-batches, each divided by the three tokens of both, add up to the mean, 3:

        >>> masked_mean(
        ...     torch.tensor([3.0, 9.0]), torch.tensor([1, 0]), global_normalization_factor=3
        ... )
        tensor(1.)
        >>> masked_mean(
        ...     torch.tensor([0.0, 6.0]), torch.tensor([1, 1]), global_normalization_factor=3
        ... )
        tensor(2.)
    """
    count = global_normalization_factor
    if count is None:
        count = mask.sum(dim=dim)
    return (values * mask).sum(dim=dim) / (count + 1e-8)


def masked_var(
    values: torch.Tensor,
    mask: torch.Tensor,
    mean: torch.Tensor | float | None = None,
    unbiased: bool = True,
) -> torch.Tensor:
    """Variance of the values under a mask.

    A mask with a single 1 has no unbiased variance: the result is NaN, or an infinity if `mean`
    is not the value itself. An empty mask gives 0.

    Args:
        values: any shape, floating.
        mask: 0 and 1, same shape.
        mean: the mean to take the deviations from; None for that of the values under the mask.
        unbiased: divide by n - 1 instead of n, with n the sum of the mask.

    Returns:
        The variance, scalar.

    Example:
        >>> values, mask = torch.tensor([1.0, 3.0, 100.0]), torch.tensor([1, 1, 0])
        >>> masked_var(values, mask)
        tensor(2.)
        >>> masked_var(values, mask, unbiased=False)
        tensor(1.)
    """
    if mean is None:
        mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    if unbiased:
        n = mask.sum()
        variance = variance * (n / (n - 1))
    return variance


def mask_out_neg_inf_logprobs(
    logprobs: torch.Tensor, mask: torch.Tensor, logprobs_name: str
) -> torch.Tensor:
    """Sets log-probabilities to 0 where they are infinite and where the mask is 0.

    A token that was sampled under top-k or top-p filtering can fall out of the filter when the
    trainer recomputes it: its log-probability is then -inf. If that happens to an unmasked token,
    a warning with the number of such tokens is printed.

    Args:
        logprobs: any shape, nats.
        mask: 0 and 1, same shape.
        logprobs_name: what to call `logprobs` in the warning.

    Returns:
        The log-probabilities, finite wherever `logprobs` has no NaN; a new tensor. A zeroed entry
        gets no gradient.

    Example:
        >>> logprobs = torch.tensor([-1.0, -torch.inf, -2.0])
        >>> mask_out_neg_inf_logprobs(logprobs, torch.tensor([1, 0, 1]), "prev_logprobs")
        tensor([-1.,  0., -2.])
    """
    infinite = logprobs.isinf()
    keep = mask.bool()
    lost = int((infinite & keep).sum())
    if lost:
        print(
            f"[WARNING]: {logprobs_name}: {lost} of {int(mask.sum())} unmasked tokens are -inf "
            "(outside the policy's top-k/top-p) and count as 0."
        )
    return torch.where(keep & ~infinite, logprobs, 0.0)


def get_gdpo_reward_component_keys(batch: Mapping[Any, Any]) -> list[str]:
    """Lists the keys of a batch that are reward components, ``reward/<name>``, sorted.

    Args:
        batch: a batch; keys that are no strings are passed over.

    Returns:
        The keys. Weights that are given as a list belong to them in this order.

    Example:
        >>> get_gdpo_reward_component_keys(
        ...     {"reward/length": 0, "reward/answer": 1, "total_reward": 1}
        ... )
        ['reward/answer', 'reward/length']
    """
    return sorted(key for key in batch if isinstance(key, str) and key.startswith("reward/"))


def calculate_baseline_and_std_per_prompt(
    prompts: torch.Tensor,
    rewards: torch.Tensor,
    valid_mask: torch.Tensor,
    leave_one_out_baseline: bool = True,
    std_rewards: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Mean and standard deviation of the rewards of the responses to the same prompt.

    For response i to a prompt, with the sums over the valid responses j to that prompt, without
    i itself if `leave_one_out_baseline`, and n the number of responses summed:

    .. math::
        b_i = \frac{1}{n} \sum_j r_j \qquad
        s_i^2 = \frac{n}{n-1} \Big( \frac{1}{n} \sum_j r_j^2 - b_i^2 \Big)

    - Leaving one out makes the standard deviation, too, differ within a group: rewards
      [1, 0, 0, 0] have baselines [0, 1/3, 1/3, 1/3] and standard deviations [0, 0.577, 0.577,
      0.577].
    - A group with one valid response or none has its own rewards as baseline, so that the
      advantage is 0, and standard deviation 0. Where n is 1 the standard deviation is 0.
    - With `leave_one_out_baseline`, n is the number of valid responses minus 1 also for a
      response that is itself not valid, and whose sum therefore has n + 1 terms, as in NeMo RL.
      Such a response should be masked in the loss.
    - The variance is a difference of two means in the dtype of the rewards, as in NeMo RL. In
      float32 it is rounding noise where the rewards vary by less than about 1e-3 of their size:
      eight rewards of 0.7 can have a standard deviation of 3e-4 instead of 0.

    Args:
        prompts: (B, P), token ids; rows that are equal are the same prompt.
        rewards: (B,) floating.
        valid_mask: (B,), 1 for responses that count, 0 for the others.
        leave_one_out_baseline: leave response i out of its own baseline, which makes the
            policy-gradient estimate unbiased.
        std_rewards: (B,) floating, the rewards to take the standard deviation of; None for
            `rewards`. DAPO filters on the raw reward while its baseline is that of the shaped one.

    Returns:
        Baseline and standard deviation, each (B,), device and dtype of `rewards`.

    Raises:
        TypeError: if `rewards` is not floating.
        ValueError: if a shape does not fit.

    Source:
        Shao et al. (2024), https://arxiv.org/abs/2402.03300 (GRPO), Section 4.1; leaving one out:
        Ahmadian et al. (2024), https://arxiv.org/abs/2402.14740 (RLOO).

    Example:
        Four responses to one prompt, one of them right:

        >>> rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
        >>> calculate_baseline_and_std_per_prompt(torch.ones(4, 1), rewards, torch.ones(4))
        (tensor([0.0000, 0.3333, 0.3333, 0.3333]), tensor([0.0000, 0.5774, 0.5774, 0.5774]))
    """
    if std_rewards is None:
        std_rewards = rewards
    _check_groups(prompts, rewards, valid_mask, std_rewards)

    _, group_of_row = prompts.unique(dim=0, return_inverse=True)
    group_of_row = group_of_row.to(rewards.device)
    baseline, std = rewards.clone(), torch.zeros_like(rewards)
    for group in group_of_row.unique():
        rows = (group_of_row == group).nonzero().squeeze(-1)
        valid = valid_mask[rows]
        if valid.sum() <= 1:
            continue
        counted = rewards.new_ones(len(rows), len(rows))
        if leave_one_out_baseline:
            counted.fill_diagonal_(0)
        n = valid.to(rewards.dtype).sum() - int(leave_one_out_baseline)

        baseline[rows] = counted @ (rewards[rows] * valid) / n
        mean = counted @ (std_rewards[rows] * valid) / n
        mean_square = counted @ (std_rewards[rows].square() * valid) / n
        # Rounding can make the variance negative, and n = 1 makes it 0 times infinity: both NaN.
        std[rows] = ((mean_square - mean.square()) * (n / (n - 1))).sqrt().nan_to_num(0)
    return baseline, std


def _check_groups(
    prompts: torch.Tensor,
    rewards: torch.Tensor,
    valid_mask: torch.Tensor,
    std_rewards: torch.Tensor,
) -> None:
    if rewards.ndim != 1:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}, expected (B,)")
    for name, tensor in (("rewards", rewards), ("std_rewards", std_rewards)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")
    if prompts.ndim != 2 or len(prompts) != len(rewards):
        raise ValueError(
            f"prompts has shape {tuple(prompts.shape)}, expected (B, P) with B = {len(rewards)}: "
            "one row of token ids for each reward"
        )
    for name, tensor in (("valid_mask", valid_mask), ("std_rewards", std_rewards)):
        if tensor.shape != rewards.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected (B,) = {tuple(rewards.shape)}"
            )


def set_seed(seed: int) -> None:
    """Seeds the generators of Python, NumPy and PyTorch, on all devices.

    Example:
        >>> set_seed(0)
        >>> first = torch.rand(3)
        >>> set_seed(0)
        >>> torch.equal(first, torch.rand(3))
        True
    """
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def get_tokenizer(tokenizer_config: Mapping[str, Any], get_processor: bool = False) -> Any:
    """Loads the tokenizer of a configuration.

    Unlike in NeMo RL, code that comes with a tokenizer is not run.

    Args:
        tokenizer_config: the section ``policy.tokenizer``: ``name``; ``chat_template``, a Jinja
            template, the path of a ``.jinja`` file, "default" for the tokenizer's own, or None for
            one that only joins the contents, the tokenizer's own if it is not there;
            ``chat_template_kwargs``, passed to the template every time.
        get_processor: must be False; processors for images are left out.

    Returns:
        The tokenizer. Where it has no pad token, its end token is used.

    Raises:
        FileNotFoundError: if there is no such ``.jinja`` file.
        ValueError: if the tokenizer has no chat template and none is given, or
            ``chat_template_kwargs`` is no mapping.

    Example:
        The tokenizer that is shipped, with a template that joins the contents:

        >>> from nemo_rl_ref import tiny
        >>> tokenizer = get_tokenizer({"name": str(tiny.MODEL), "chat_template": None})
        >>> tokenizer.apply_chat_template([{"role": "user", "content": "3+4="}], tokenize=False)
        '3+4='
    """
    from transformers import AutoTokenizer

    if get_processor:
        raise NotImplementedError("get_processor: processors for images are left out")
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_config["name"]))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    template = tokenizer_config.get("chat_template", "default")
    if template is None:
        template = COMMON_CHAT_TEMPLATES.passthrough_prompt_response
    if template.endswith(".jinja"):
        if not Path(template).is_file():
            raise FileNotFoundError(f"policy.tokenizer.chat_template: no file at {template}")
        template = Path(template).read_text(encoding="utf-8")
    if template.lower() != "default":
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise ValueError(
            "policy.tokenizer.chat_template: not set, and the tokenizer "
            f"{tokenizer_config['name']} has none of its own; expected a Jinja template, "
            "or null to join the contents"
        )
    settings = tokenizer_config.get("chat_template_kwargs")
    if settings is not None:
        if not isinstance(settings, Mapping):
            raise ValueError(
                f"policy.tokenizer.chat_template_kwargs: got {settings!r}, expected a mapping"
            )
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **settings)
    return tokenizer


def maybe_pad_last_batch(batch: Any, dp_size: int, mbs: int) -> Any:
    """Fills a batch up so that every rank gets the same number of full micro-batches.

    Args:
        batch: a `BatchedDataDict`; changed in place.
        dp_size: number of data-parallel ranks.
        mbs: rows of a micro-batch.

    Returns:
        The batch, its last row repeated with ``sample_mask`` 0.

    Example:
        Three rows for two ranks with micro-batches of one:

        >>> from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict
        >>> batch = BatchedDataDict(
        ...     {"sample_mask": torch.ones(3), "reward": torch.tensor([5.0, 6.0, 7.0])}
        ... )
        >>> dict(maybe_pad_last_batch(batch, dp_size=2, mbs=1))
        {'sample_mask': tensor([1., 1., 1., 0.]), 'reward': tensor([5., 6., 7., 7.])}
    """
    missing = -batch.size % (dp_size * mbs)
    if missing:
        for key, value in batch.items():
            last = value[-1:] if key != "sample_mask" else torch.zeros_like(value[-1:])
            batch[key] = torch.cat([value, last.repeat(missing, *[1] * (value.ndim - 1))])
    return batch
