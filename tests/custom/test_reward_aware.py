# SPDX-License-Identifier: Apache-2.0
"""RPO: its three distances in naive float64, its limits, and the promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preference_checks import (
    BETA,
    check_definition,
    check_extremes,
    check_promises,
    check_setting,
    config,
    make_batch,
    run,
)
from torch import sigmoid

from nemo_rl_ref.algorithms.loss import DPOLossFn
from nemo_rl_ref.custom.reward_aware import OBJECTIVES, RPOLossFn, bernoulli_kl

SCALE = 1.7


def kl(p, q):
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


DISTANCES = {
    "rpo_sq": lambda a, b: (a - b) ** 2,
    "rpo_fwd_kl": lambda a, b: kl(sigmoid(a), sigmoid(b)),
    "rpo_bwd_kl": lambda a, b: kl(sigmoid(b), sigmoid(a)),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(
    batch=st.builds(
        make_batch,
        pairs=st.integers(0, 4),
        length=st.integers(1, 7),
        seed=st.integers(0, 999),
        mask_dtype=st.sampled_from([torch.float32, torch.bool, torch.int64]),
    ),
    average=st.booleans(),
)
def test_definition(objective, batch, average):
    settings = {"preference_loss": objective, "gt_reward_scale": SCALE}
    loss_fn = RPOLossFn(config(**settings, preference_average_log_probs=average))
    rewards = batch[1]["gt_rewards"]
    difference = SCALE * (rewards[::2] - rewards[1::2])
    check_definition(
        loss_fn, lambda w, l: DISTANCES[objective](BETA * (w - l), difference), batch, average
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_promises(objective):
    check_promises(RPOLossFn(config(preference_loss=objective)))
    check_extremes(RPOLossFn(config(preference_loss=objective, gt_reward_scale=1e4)))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_where_the_margin_is_that_of_the_rewards(objective):
    logprobs, data = make_batch(pairs=2, length=2)
    data["token_mask"].fill_(1)
    data["sample_mask"].fill_(1)
    h = logprobs[:, 0] - data["reference_policy_logprobs"][:, 0]
    data["gt_rewards"] = BETA * h / SCALE + torch.tensor([5.0, 5.0, -1.0, -1.0])
    settings = {"preference_loss": objective, "gt_reward_scale": SCALE}
    loss, grad, _ = run(RPOLossFn(config(**settings)), logprobs, data)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


def test_backward_kl_with_certain_rewards_is_dpo():
    logprobs, data = make_batch(seed=2)
    data["gt_rewards"] = torch.tensor([40.0, 0.0], dtype=torch.float64).repeat(4)
    ours = run(RPOLossFn(config()), logprobs, data)
    of_dpo = run(DPOLossFn(config()), logprobs, data)
    torch.testing.assert_close(ours[0], of_dpo[0])
    torch.testing.assert_close(ours[1], of_dpo[1])


def test_bernoulli_kl_far_out():
    far = torch.tensor([1e4, -1e4])
    values = bernoulli_kl(far, -far)
    torch.testing.assert_close(values, torch.full((2,), 1e4))
    assert (bernoulli_kl(far, far) == 0).all()


def test_missing_and_misshapen_rewards():
    logprobs, data = make_batch()
    data["gt_rewards"] = data["gt_rewards"][::2]
    with pytest.raises(ValueError, match=r"data\['gt_rewards'\] has shape \(4,\), expected .*8"):
        run(RPOLossFn(config()), logprobs, data)
    del data["gt_rewards"]
    with pytest.raises(KeyError, match="'gt_rewards', which RPOLossFn needs"):
        run(RPOLossFn(config()), logprobs, data)
    assert RPOLossFn.needs_data == ("gt_rewards",)


def test_settings():
    check_setting(RPOLossFn, "preference_loss", OBJECTIVES, ["rpo", "dpo", None])
    check_setting(RPOLossFn, "gt_reward_scale", [0.1, 10], [0, -1, "1", math.nan])
