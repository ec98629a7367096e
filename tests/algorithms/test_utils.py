# SPDX-License-Identifier: Apache-2.0
"""`calculate_kl` by exact enumeration of a small vocabulary, and `masked_mean`."""

import math

import pytest
import torch

from nemo_rl_ref.algorithms.utils import calculate_kl, masked_mean, maybe_pad_last_batch
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict

NO_CLAMP = {"input_clamp_value": None, "output_clamp_value": None}


@pytest.fixture
def world():
    """Logits of a policy and log-probabilities of a reference and an older policy, 6 tokens."""
    generator = torch.Generator().manual_seed(3)
    logits, reference, old = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), reference.log_softmax(-1), old.log_softmax(-1)


def kl_divergence(logp, logq):
    return (logp.exp() * (logp - logq)).sum()


def gradient(value, logits):
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


@pytest.mark.parametrize("kl_type", ["k1", "k3"])
def test_unbiased_under_the_policy(world, kl_type):
    logits, reference, _ = world
    logp = logits.log_softmax(-1)
    mean = (logp.exp() * calculate_kl(logp, reference, kl_type, **NO_CLAMP)).sum()
    torch.testing.assert_close(mean, kl_divergence(logp, reference), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kl_type", ["k1", "k3"])
def test_biased_under_another_distribution_until_weighted(world, kl_type):
    logits, reference, old = world
    logp = logits.log_softmax(-1)
    exact = kl_divergence(logp, reference)
    plain = calculate_kl(logp, reference, kl_type, **NO_CLAMP)
    assert abs((old.exp() * plain).sum() - exact) > 0.01
    weights = (logp - old).exp()
    weighted = calculate_kl(
        logp, reference, kl_type, importance_sampling_weights=weights, **NO_CLAMP
    )
    torch.testing.assert_close((old.exp() * weighted).sum(), exact, rtol=0, atol=1e-12)


def test_k2_is_biased_and_right_to_second_order(world):
    logits, reference, _ = world
    errors, exact = [], []
    for size in (1.0, 0.1, 0.01):  # how far the policy is from the reference
        logp = (reference + size * logits.detach()).log_softmax(-1)
        exact.append(kl_divergence(logp, reference).item())
        mean = (logp.exp() * calculate_kl(logp, reference, "k2", **NO_CLAMP)).sum().item()
        errors.append(abs(mean - exact[-1]))
    assert errors[0] > 0.01 * exact[0]
    # The KL shrinks with the square of the distance, the error with its cube.
    assert errors[1] / errors[2] == pytest.approx(1000, rel=0.2)
    assert exact[1] / exact[2] == pytest.approx(100, rel=0.2)


def test_expected_gradients(world):
    """The gradient of an estimator is not that of what it estimates, unless it is weighted."""
    logits, reference, _ = world
    logp = logits.log_softmax(-1)
    p = logp.exp().detach()
    forward = gradient(kl_divergence(logp, reference), logits)
    backward = gradient(kl_divergence(reference, logp), logits)

    def mean_gradient(kl_type, weights=None):
        kl = calculate_kl(logp, reference, kl_type, importance_sampling_weights=weights, **NO_CLAMP)
        return gradient((p * kl).sum(), logits)

    one = (logp - logp.detach()).exp()  # value 1, gradient that of the log-probability
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(mean_gradient("k1"), torch.zeros_like(logits), **close)
    torch.testing.assert_close(mean_gradient("k2"), forward, **close)
    torch.testing.assert_close(mean_gradient("k3"), backward, **close)
    torch.testing.assert_close(mean_gradient("k1", one), forward, **close)
    torch.testing.assert_close(mean_gradient("k3", one), forward, **close)
    assert (forward - backward).abs().max() > 0.01


def test_clamped_tokens_get_no_gradient():
    logp = torch.tensor([-1.0, -6.0, -1.0], requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -6.0])
    weights = torch.full((3,), 0.5, requires_grad=True)
    kl = calculate_kl(logp, reference, "k2", 3.0, None, weights)
    torch.testing.assert_close(kl, torch.tensor([0.0625, 2.25, 2.25]))  # r: -0.5, 5 -> 3, -5 -> -3
    kl.sum().backward()
    assert logp.grad[0] != 0 and weights.grad[0] != 0
    assert logp.grad[1:].tolist() == weights.grad[1:].tolist() == [0.0, 0.0]

    kl = calculate_kl(logp, reference, "k1", None, 2.0, torch.tensor(1.0))
    assert kl.tolist() == [0.5, -2.0, 2.0]


def test_default_clamps():
    logp, reference = torch.tensor([-100.0, 0.0]), torch.tensor([0.0, -100.0])
    # r = 100 is clamped to 20, where k3 is e^20, clamped to 10; r = -100 to -20, k3 = 19, to 10.
    assert calculate_kl(logp, reference).tolist() == [10.0, 10.0]
    clamped = calculate_kl(logp, reference, output_clamp_value=None)
    torch.testing.assert_close(clamped, torch.tensor([math.exp(20) - 21, math.exp(-20) + 19]))


def test_calculate_kl_bad_input():
    logp = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"kl_type is 'kl', expected 'k1', 'k2' or 'k3'"):
        calculate_kl(logp, logp, "kl")
    with pytest.raises(ValueError, match=r"logprobs_reference has shape \(2, 4\).*\(2, 3\)"):
        calculate_kl(logp, torch.zeros(2, 4))


def test_masked_mean():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert masked_mean(values, mask).item() == pytest.approx(2.0)
    assert masked_mean(values, mask, dim=-1).tolist() == pytest.approx([2.0, 0.0])
    assert masked_mean(values, mask, global_normalization_factor=8).item() == pytest.approx(0.5)
    factor = torch.tensor(8.0)
    assert masked_mean(values, mask, global_normalization_factor=factor).item() == 0.5
    assert masked_mean(values > 2, mask).item() == pytest.approx(0.5)


def test_masked_mean_adds_1e_8():
    """An empty mask, or a global count of 0, gives 0 and not NaN; a tiny count shows the 1e-8."""
    ones = torch.ones(4, dtype=torch.float64)
    assert masked_mean(ones, ones * 0).item() == 0.0
    assert masked_mean(ones, ones * 0, global_normalization_factor=0.0).item() == 0.0
    assert masked_mean(ones, ones * 1e-8).item() == pytest.approx(4 / 5, rel=1e-12)


def test_masked_mean_does_not_hide_nan():
    values, mask = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 0.0])
    assert masked_mean(values, mask).isnan()


def test_a_batch_is_filled_up_with_its_last_row_that_does_not_count():
    rows = {
        "input_ids": torch.arange(10).view(5, 2),
        "logits": torch.arange(30).view(5, 2, 3),
        "sample_mask": torch.ones(5),
    }
    filled = maybe_pad_last_batch(BatchedDataDict(dict(rows)), dp_size=2, mbs=2)
    for name, value in rows.items():
        assert torch.equal(filled[name][:5], value) and len(filled[name]) == 8, name
    assert torch.equal(filled["logits"][5:], rows["logits"][-1:].repeat(3, 1, 1))
    assert not filled["sample_mask"][5:].any()
    even = BatchedDataDict({"sample_mask": torch.ones(4)})
    assert maybe_pad_last_batch(even, dp_size=2, mbs=2).size == 4
