# SPDX-License-Identifier: Apache-2.0
"""Batches, definitions in naive float64, and the promises that every preference loss is held to."""

import math
import pickle

import pytest
import torch

from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict

BETA = 0.3
DPO_METRICS = {
    *("loss", "sft_loss", "preference_loss", "accuracy"),
    *("rewards_chosen_mean", "rewards_rejected_mean", "num_valid_samples"),
}


def config(**settings):
    return DPOLossConfig(**{"reference_policy_kl_penalty": BETA, **settings})


def make_batch(pairs=4, length=7, seed=0, dtype=torch.float64, mask_dtype=torch.float32):
    """Log-probabilities (2P, S-1) and data (2P, S): holes in the masks, some pairs masked."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    rows = 2 * pairs
    logprobs = (-3 * rand(rows, length - 1) - 0.01).to(dtype)
    data = BatchedDataDict(
        {
            "token_mask": (rand(rows, length) < 0.6).to(mask_dtype),
            "sample_mask": (rand(pairs) < 0.7).repeat_interleave(2).to(mask_dtype),
            "reference_policy_logprobs": (-3 * rand(rows, length)).to(dtype),
            "gt_rewards": (4 * rand(rows) - 2).to(dtype),
            "mismatched_logprobs": (-9 * rand(rows)).to(dtype),
            "mismatched_reference_logprobs": (-9 * rand(rows) - 1).to(dtype),
        }
    )
    return logprobs, data


def counts(data):
    """The global counts if this batch is the global batch."""
    sample_mask = data["sample_mask"].double()
    tokens = data["token_mask"][:, 1:].double() * sample_mask[:, None]
    return {"global_valid_seqs": sample_mask.sum(), "global_valid_toks": tokens.sum()}


def run(loss_fn, logprobs, data, **overrides):
    """Loss, gradient and metrics."""
    logprobs = logprobs.detach().clone().requires_grad_()
    loss, metrics = loss_fn(logprobs, data, **{**counts(data), **overrides})
    assert loss.shape == ()
    loss.backward()
    return loss.detach(), logprobs.grad, metrics


def row_sums(values, data, average=False):
    """Sums (B, S-1) over the response; with `average`, divides by its length."""
    mask = data["token_mask"][:, 1:].double()
    sums = (values.double() * mask).sum(-1)
    return sums / mask.sum(-1).clamp(min=1) if average else sums


def check_definition(loss_fn, pair_loss, batch, average=False, reference=True):
    """The loss is the mean over valid pairs of `pair_loss`, and so is its gradient.

    `pair_loss` takes log-ratios (or, without a `reference`, log-probabilities) of the chosen and
    the rejected responses and is written as the paper has it, without numerical care.
    """
    logprobs, data = batch
    loss, grad, metrics = run(loss_fn, logprobs, data)
    policy = logprobs.detach().clone().double().requires_grad_()
    ratios = policy - data["reference_policy_logprobs"][:, :-1].double() if reference else policy
    h = row_sums(ratios, data, average)
    valid = data["sample_mask"][::2].double()
    pairs = valid.sum().clamp(min=1)
    expected = (pair_loss(h[::2], h[1::2]) * valid).sum() / pairs
    (expected_grad,) = torch.autograd.grad(expected, policy)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-7, check_dtype=False)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-7, check_dtype=False)

    assert metrics.keys() == DPO_METRICS
    means = {
        "loss": expected,
        "preference_loss": expected,
        "sft_loss": torch.tensor(0.0),
        "accuracy": ((h[::2] > h[1::2]) * valid).sum() / pairs,
        "rewards_chosen_mean": (h[::2] * valid).sum() / pairs,
        "rewards_rejected_mean": (h[1::2] * valid).sum() / pairs,
        "num_valid_samples": valid.sum(),
    }
    assert metrics == pytest.approx({k: v.item() for k, v in means.items()}, rel=1e-6, abs=1e-7)


def check_micro_batches_sum(loss_fn, batch, cut):
    """Loss, gradient and metrics of two micro-batches, cut after `cut` pairs, sum to the whole."""
    logprobs, data = batch
    total = counts(data)
    whole, whole_grad, whole_metrics = run(loss_fn, logprobs, data)
    parts = []
    for rows in (slice(0, 2 * cut), slice(2 * cut, None)):
        part = {key: value[rows] for key, value in data.items()}
        parts.append(run(loss_fn, logprobs[rows], part, **total))
    torch.testing.assert_close(sum(part[0] for part in parts), whole)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole_grad)
    summed = {name: sum(part[2][name] for part in parts) for name in whole_metrics}
    assert summed == pytest.approx(whole_metrics, abs=1e-9)


def check_masks(loss_fn, batch):
    """Nothing flows to masked tokens and pairs, and garbage in masked pairs changes nothing."""
    logprobs, data = batch
    loss, grad, metrics = run(loss_fn, logprobs, data)
    valid = data["sample_mask"].bool()
    assert (grad[~valid] == 0).all()
    assert (grad[~data["token_mask"][:, 1:].bool()] == 0).all()

    for garbage in (1e30, -1e30, math.inf, -math.inf, math.nan):
        # Not infinite where the token mask is 0: there NeMo RL multiplies by 0 as well.
        spoilt = logprobs.masked_fill(~valid[:, None], garbage)
        spoilt = spoilt.where(data["token_mask"][:, 1:].bool(), logprobs)
        spoilt_data = BatchedDataDict(data)
        for key in ("gt_rewards", "mismatched_logprobs"):
            spoilt_data[key] = data[key].masked_fill(~valid, garbage)
        again = run(loss_fn, spoilt, spoilt_data)
        assert torch.equal(again[0], loss), garbage
        assert torch.equal(again[1], grad), garbage
        assert again[2] == metrics, garbage


def check_extremes(loss_fn, dtype=torch.float32):
    """Finite for log-ratios of ±1e4 in all combinations, for empty responses, for no pairs."""
    logprobs, data = make_batch(pairs=4, length=3, dtype=dtype)
    data["sample_mask"].fill_(1)
    data["token_mask"].fill_(0)
    data["token_mask"][:, 1] = 1
    data["reference_policy_logprobs"].fill_(0)
    logprobs[:, 0] = torch.tensor([1e4, 1e4, 1e4, -1e4, -1e4, 1e4, -1e4, -1e4], dtype=dtype)
    for empty in (False, True):
        if empty:
            data["token_mask"].fill_(0)
        loss, grad, metrics = run(loss_fn, logprobs, data)
        assert loss.isfinite() and grad.isfinite().all()
        assert all(math.isfinite(value) for value in metrics.values())
        assert not empty or (grad == 0).all()
    data["sample_mask"].fill_(0)
    loss, grad, metrics = run(loss_fn, logprobs, data)
    assert loss == 0 and (grad == 0).all() and set(metrics.values()) == {0.0}


def check_promises(loss_fn, sums=True):
    """All of the above that need no definition; `sums` if micro-batches sum to the batch."""
    batch = make_batch(pairs=5, seed=3)
    before = {key: value.clone() for key, value in batch[1].items()}
    result = run(loss_fn, *batch)
    assert all(torch.equal(batch[1][key], before[key]) for key in before), "inputs were modified"
    if sums:
        check_micro_batches_sum(loss_fn, batch, cut=2)
    check_masks(loss_fn, batch)
    check_extremes(loss_fn)
    check_extremes(loss_fn, torch.bfloat16)
    again = run(pickle.loads(pickle.dumps(loss_fn)), *batch)
    assert torch.equal(again[0], result[0]) and torch.equal(again[1], result[1])
    # The metrics that do not depend on the formula are DPO's, to the bit, where h is the same.
    assert result[2].keys() == DPO_METRICS
    assert isinstance(loss_fn, DPOLossFn)
    assert all(type(value) is float for value in result[2].values())


def check_setting(loss_class, key, good, bad, **others):
    """Each good value is accepted; each bad one raises an error that names key and value."""
    for value in good:
        loss_class(config(**{key: value}, **others))
    for value in bad:
        with pytest.raises(ValueError) as error:
            loss_class(config(**{key: value}, **others))
        assert key in str(error.value) and repr(value) in str(error.value)
        assert "expected" in str(error.value)
