# SPDX-License-Identifier: Apache-2.0
"""Losses without a reference policy: the papers' equations in naive float64, and the promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preference_checks import (
    BETA,
    check_definition,
    check_extremes,
    check_masks,
    check_micro_batches_sum,
    check_promises,
    check_setting,
    config,
    make_batch,
    run,
)
from torch import sigmoid

from nemo_rl_ref.algorithms.loss import DPOLossFn
from nemo_rl_ref.custom.reference_free import (
    CPOLossFn,
    ORPOLossFn,
    SimPOLossFn,
    SLiCLossFn,
    log_odds,
)

batches = st.builds(
    make_batch,
    pairs=st.integers(0, 4),
    length=st.integers(1, 7),
    seed=st.integers(0, 999),
    mask_dtype=st.sampled_from([torch.float32, torch.bool, torch.int64]),
)


@given(batch=batches, average=st.booleans())
def test_cpo(batch, average):
    loss_fn = CPOLossFn(config(preference_average_log_probs=average))
    equation = lambda w, l: -torch.log(sigmoid(BETA * (w - l)))  # noqa: E731
    check_definition(loss_fn, equation, batch, average, reference=False)


@given(batch=batches, average=st.booleans())
def test_slic(batch, average):
    loss_fn = SLiCLossFn(config(slic_delta=0.7, preference_average_log_probs=average))
    equation = lambda w, l: torch.clamp(0.7 - BETA * (w - l), min=0)  # noqa: E731
    check_definition(loss_fn, equation, batch, average, reference=False)


@given(batch=batches)
def test_simpo(batch):
    loss_fn = SimPOLossFn(config(simpo_gamma=0.4))
    equation = lambda w, l: -torch.log(sigmoid(BETA * w - BETA * l - 0.4))  # noqa: E731
    check_definition(loss_fn, equation, batch, average=True, reference=False)


def filled(batch):
    """The batch with a token in every response: an empty one has p = 1 and infinite odds."""
    logprobs, data = batch
    data["token_mask"][:, 1] = 1
    return logprobs, data


@given(
    batch=st.builds(
        make_batch, pairs=st.integers(0, 4), length=st.integers(2, 7), seed=st.integers(0, 999)
    ).map(filled)
)
def test_orpo(batch):
    """The SFT term has its own definition: the mean over pairs of the response's mean loss."""
    logprobs, data = batch
    weights = {"sft_loss_weight": 1.0, "preference_loss_weight": 0.1}
    loss, grad, metrics = run(
        ORPOLossFn(config(**weights, sft_average_log_probs=True)), logprobs, data
    )
    policy = logprobs.clone().requires_grad_()
    mask = data["token_mask"][:, 1:].double()
    p = torch.exp((policy * mask).sum(1) / mask.sum(1))
    odds = p / (1 - p)
    valid = data["sample_mask"][::2].double()
    ratio = -torch.log(sigmoid(torch.log(odds[::2] / odds[1::2])))
    expected = ((-torch.log(p[::2]) + 0.1 * ratio) * valid).sum() / valid.sum().clamp(min=1)
    (expected_grad,) = torch.autograd.grad(expected, policy)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-7)
    assert metrics["loss"] == loss.item()


def test_log_odds():
    p = torch.tensor([1e-30, 1e-9, 0.25, 0.5, 0.999], dtype=torch.float64)
    torch.testing.assert_close(log_odds(p.log()), torch.log(p) - torch.log1p(-p))
    # In float32 1 - exp(-1e-6) keeps 1 digit; log_odds keeps them all.
    near_one = torch.tensor(-1e-6)
    assert log_odds(near_one).item() == pytest.approx(-math.log(1e-6), rel=1e-6)
    at_one = torch.zeros((), requires_grad=True)
    log_odds(at_one).backward()
    assert log_odds(at_one).isfinite() and at_one.grad == 0


@pytest.mark.parametrize("loss_class", [CPOLossFn, SimPOLossFn, SLiCLossFn])
def test_promises(loss_class):
    check_promises(loss_class(config()))
    check_promises(loss_class(config(preference_average_log_probs=True)))


def test_promises_of_orpo():
    """Garbage in masked pairs reaches the SFT term, as in NeMo RL: infinity times 0."""
    loss_fn = ORPOLossFn(config(sft_loss_weight=1.0))
    check_micro_batches_sum(loss_fn, make_batch(pairs=5, seed=3), cut=2)
    check_extremes(loss_fn)
    check_extremes(loss_fn, torch.bfloat16)
    loss_fn.sft_loss_weight = 0.0
    check_masks(loss_fn, make_batch(pairs=5, seed=3))


@given(batch=batches)
def test_cpo_is_dpo_against_a_reference_of_zero(batch):
    logprobs, data = batch
    weights = {"sft_loss_weight": 1.0}
    ours = run(CPOLossFn(config(**weights)), logprobs, data)
    data["reference_policy_logprobs"].zero_()
    of_dpo = run(DPOLossFn(config(**weights)), logprobs, data)
    torch.testing.assert_close(ours[0], of_dpo[0])
    torch.testing.assert_close(ours[1], of_dpo[1])
    assert ours[2] == pytest.approx(of_dpo[2])


@pytest.mark.parametrize("loss_class", [CPOLossFn, SimPOLossFn, SLiCLossFn])
def test_the_reference_is_not_needed_and_not_read(loss_class):
    logprobs, data = make_batch(seed=1)
    with_reference = run(loss_class(config()), logprobs, data)
    kept = {key: data[key] for key in ("token_mask", "sample_mask")}
    without = run(loss_class(config()), logprobs, kept)
    assert torch.equal(with_reference[0], without[0])
    assert torch.equal(with_reference[1], without[1])
    assert kept.keys() == {"token_mask", "sample_mask"}


def test_settings():
    check_setting(SimPOLossFn, "simpo_gamma", [0, 1.4], [-0.1, "1", math.nan])
    check_setting(SLiCLossFn, "slic_delta", [0.1, 3], [0, -1, "1"])
    check_setting(ORPOLossFn, "sft_loss_weight", [1.0], [0.0, -1.0])
    with pytest.raises(ValueError, match="Set sft_loss_weight=1"):
        ORPOLossFn(config())
