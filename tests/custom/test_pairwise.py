# SPDX-License-Identifier: Apache-2.0
"""Losses of a pair's two log-ratios: the papers' equations in naive float64, and the promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preference_checks import (
    BETA,
    check_definition,
    check_extremes,
    check_micro_batches_sum,
    check_promises,
    check_setting,
    config,
    make_batch,
    run,
)
from torch import sigmoid

from nemo_rl_ref.algorithms.loss import DPOLossFn
from nemo_rl_ref.custom import pairwise

EPS, TAU = 0.2, 0.3


def dpo(w, l):
    return -torch.log(sigmoid(BETA * (w - l)))


def disco(w, l):
    x = BETA * (w - l)
    return (1 - sigmoid(x / TAU)) * torch.log(1 + torch.exp(-x)) + sigmoid(x / TAU) * torch.exp(-x)


def exo(w, l):
    p = sigmoid(BETA * (w - l))
    return p * torch.log(p / (1 - EPS)) + (1 - p) * torch.log((1 - p) / EPS)


def nca(w, l):
    w, l = BETA * w, BETA * l
    return -torch.log(sigmoid(w)) - torch.log(sigmoid(-w)) / 2 - torch.log(sigmoid(-l)) / 2


# class, settings, the paper's equation
LOSSES = [
    (pairwise.IPOLossFn, {}, lambda w, l: (w - l - 1 / (2 * BETA)) ** 2),
    (pairwise.HingeLossFn, {}, lambda w, l: torch.clamp(1 - BETA * (w - l), min=0)),
    (
        pairwise.DPOPLossFn,
        {"dpop_penalty": 3.0},
        lambda w, l: -torch.log(sigmoid(BETA * (w - l - 3.0 * torch.clamp(-w, min=0)))),
    ),
    (
        pairwise.RobustDPOLossFn,
        {"label_smoothing": EPS},
        lambda w, l: ((1 - EPS) * dpo(w, l) - EPS * dpo(l, w)) / (1 - 2 * EPS),
    ),
    (
        pairwise.ConservativeDPOLossFn,
        {"label_smoothing": EPS},
        lambda w, l: (1 - EPS) * dpo(w, l) + EPS * dpo(l, w),
    ),
    (pairwise.EXOPairLossFn, {"label_smoothing": EPS}, exo),
    (pairwise.NCAPairLossFn, {}, nca),
    (
        pairwise.SPPOHardLossFn,
        {},
        lambda w, l: (w - (1 - 0.5) / BETA) ** 2 + (l - (0 - 0.5) / BETA) ** 2,
    ),
    (pairwise.APOZeroLossFn, {}, lambda w, l: 1 - sigmoid(BETA * w) + sigmoid(BETA * l)),
    (pairwise.APODownLossFn, {}, lambda w, l: sigmoid(BETA * w) + 1 - sigmoid(BETA * (w - l))),
    (pairwise.DiscoPOPLossFn, {"discopop_tau": TAU}, disco),
]
IDS = [loss_class.__name__ for loss_class, *_ in LOSSES]
batches = st.builds(
    make_batch,
    pairs=st.integers(0, 4),
    length=st.integers(1, 7),
    seed=st.integers(0, 999),
    mask_dtype=st.sampled_from([torch.float32, torch.float64, torch.bool, torch.int64]),
)


@pytest.mark.parametrize(("loss_class", "settings", "equation"), LOSSES, ids=IDS)
@given(batch=batches, average=st.booleans())
def test_definition(loss_class, settings, equation, batch, average):
    loss_fn = loss_class(config(**settings, preference_average_log_probs=average))
    check_definition(loss_fn, equation, batch, average)


@pytest.mark.parametrize(("loss_class", "settings", "equation"), LOSSES, ids=IDS)
def test_promises(loss_class, settings, equation):
    check_promises(loss_class(config(**settings)))
    check_promises(loss_class(config()))  # the defaults
    check_extremes(loss_class(config(reference_policy_kl_penalty=5.0)))


@pytest.mark.parametrize(("loss_class", "settings", "equation"), LOSSES, ids=IDS)
def test_sft_term_and_weights_are_those_of_dpo(loss_class, settings, equation):
    batch = make_batch(seed=1)
    weights = {"sft_loss_weight": 0.3, "preference_loss_weight": 0.7, "sft_average_log_probs": True}
    loss, _, metrics = run(loss_class(config(**settings, **weights)), *batch)
    _, _, of_dpo = run(DPOLossFn(config(**weights)), *batch)
    assert metrics["sft_loss"] == of_dpo["sft_loss"] > 0
    expected = 0.3 * metrics["sft_loss"] + 0.7 * metrics["preference_loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    for name in ("accuracy", "rewards_chosen_mean", "rewards_rejected_mean", "num_valid_samples"):
        assert metrics[name] == of_dpo[name]


@given(batch=batches, cut=st.integers(0, 4))
def test_micro_batches_sum(batch, cut):
    check_micro_batches_sum(pairwise.NCAPairLossFn(config(sft_loss_weight=0.5)), batch, cut)


def loss_of_margin(loss_class, margins, **settings):
    """The loss of pairs with β(h_w - h_l) as given, h_l = 0."""
    loss_fn = loss_class(config(**settings))
    margins = torch.as_tensor(margins, dtype=torch.float64)
    return loss_fn.pair_losses(margins / BETA, torch.zeros_like(margins), BETA)


def test_where_the_losses_are_least():
    grid = torch.linspace(-6, 6, 12001)

    def least(loss_class, **settings):
        return grid[loss_of_margin(loss_class, grid, **settings).argmin()].item()

    assert least(pairwise.IPOLossFn) == pytest.approx(0.5, abs=1e-3)  # Δ = 1 / 2β
    logit = math.log(0.9 / 0.1)
    assert least(pairwise.ConservativeDPOLossFn) == pytest.approx(logit, abs=1e-3)
    assert least(pairwise.EXOPairLossFn, label_smoothing=0.1) == pytest.approx(logit, abs=1e-3)
    assert least(pairwise.HingeLossFn) == pytest.approx(1, abs=1e-3)
    assert least(pairwise.RobustDPOLossFn) == 6  # without bound


def test_without_smoothing_it_is_dpo():
    batch = make_batch(seed=2)
    loss, grad, _ = run(DPOLossFn(config()), *batch)
    for loss_class in (pairwise.RobustDPOLossFn, pairwise.ConservativeDPOLossFn):
        ours = run(loss_class(config(label_smoothing=0)), *batch)
        torch.testing.assert_close(ours[0], loss)
        torch.testing.assert_close(ours[1], grad)


def test_robust_dpo_is_unbiased():
    """Labels flipped with probability ε: on average the loss is DPO's with the true labels."""
    margins = torch.linspace(-4, 4, 9, dtype=torch.float64)
    settings = {"label_smoothing": EPS}
    true = loss_of_margin(pairwise.RobustDPOLossFn, margins, **settings)
    flipped = loss_of_margin(pairwise.RobustDPOLossFn, -margins, **settings)
    mean = (1 - EPS) * true + EPS * flipped
    torch.testing.assert_close(mean, torch.log1p(torch.exp(-margins)))


def test_length_normalized_dpo():
    batch = make_batch(seed=4)
    loss_fn = pairwise.LengthNormalizedDPOLossFn(config())
    check_definition(loss_fn, dpo, batch, average=True)
    check_micro_batches_sum(loss_fn, batch, cut=1)
    check_extremes(loss_fn)


def test_settings():
    check_setting(pairwise.RobustDPOLossFn, "label_smoothing", [0, 0.49], [-0.1, 0.5, "0.1", None])
    check_setting(pairwise.ConservativeDPOLossFn, "label_smoothing", [0, 0.5], [-0.1, 0.6, "0.1"])
    check_setting(pairwise.EXOPairLossFn, "label_smoothing", [1e-3, 0.5], [0, 0.6, math.nan, "1"])
    check_setting(pairwise.DiscoPOPLossFn, "discopop_tau", [0.05, 1], [0, 1.1, "0.05"])
    check_setting(pairwise.DPOPLossFn, "dpop_penalty", [0, 5.0], [-0.1, math.nan, "5"])
    for loss_class in (pairwise.IPOLossFn, pairwise.SPPOHardLossFn):
        check_setting(loss_class, "reference_policy_kl_penalty", [0.1], [0.0, -1.0])


def test_base_class_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="PairLossFn has no pair_losses"):
        run(pairwise.PairLossFn(config()), *make_batch())


def test_discopop_has_the_two_extrema_of_its_docstring():
    grid = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    slope = loss_of_margin(pairwise.DiscoPOPLossFn, grid).diff()
    turns = grid[1:-1][slope[1:] * slope[:-1] < 0]
    assert turns.tolist() == pytest.approx([-0.1186, 0.0720], abs=2e-4)
