# SPDX-License-Identifier: Apache-2.0
"""How far each loss is from TRL's own code: the same calls as the tests make, as numbers."""

import torch
from preference_checks import config, run
from trl_cases import FROM_LOGITS, PAIRS, SAME, logits_and_labels, make_pairs

from nemo_rl_ref.logprobs import token_logprobs


def relative(loss, grad, expected, expected_grad):
    """The larger of the relative differences in value and in gradient (of its largest entry)."""
    by_value = (loss - expected).abs() / expected.abs()
    by_gradient = (grad - expected_grad).abs().max() / expected_grad.abs().max()
    return max(by_value.item(), by_gradient.item())


def from_logprobs(loss_class, settings, theirs, seed):
    """Of a loss that TRL computes from log-probabilities."""
    policy, data = make_pairs(seed)
    loss, grad, _ = run(loss_class(config(**settings)), policy, data)
    policy = policy.detach().clone().requires_grad_()
    expected = theirs(policy, data)
    return relative(loss, grad, expected, torch.autograd.grad(expected, policy)[0])


def from_logits(loss_class, settings, theirs, shape, seed):
    """Of a loss that TRL computes from logits."""
    _, data = make_pairs(seed, **shape)
    logits, ids = logits_and_labels(seed)
    logits.requires_grad_()
    logprobs = token_logprobs(logits[:, :-1], ids[:, 1:])
    counts = torch.tensor(2.0 * PAIRS, dtype=torch.float64), data["token_mask"][:, 1:].sum()
    loss, _ = loss_class(config(**settings))(logprobs, data, *counts)
    (grad,) = torch.autograd.grad(loss, logits)
    expected = theirs(logits, ids, data)
    return relative(loss, grad, expected, torch.autograd.grad(expected, logits)[0])


def differences(seeds=(0, 1, 2)):
    """The largest relative difference over the seeds, by the name that the tests give a loss."""
    found = {}
    for cases, compare in ((SAME, from_logprobs), (FROM_LOGITS, from_logits)):
        for name, case in cases.items():
            found[name] = max(compare(*case, seed) for seed in seeds)
    return found
