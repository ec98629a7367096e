# SPDX-License-Identifier: Apache-2.0
"""DPO with an f-divergence: derivatives by autograd of f itself, limits, and the promises."""

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

from nemo_rl_ref.algorithms.loss import DPOLossFn
from nemo_rl_ref.custom.f_divergence import DIVERGENCES, FDivergenceDPOLossFn, f_derivative

ALPHA = 0.3
# f itself: the divergence is the mean of f(π/π_ref) under π_ref.
F = {
    "reverse_kl": lambda u: u * torch.log(u),
    "forward_kl": lambda u: -torch.log(u),
    "js_divergence": lambda u: u * torch.log(u) - (u + 1) * torch.log((u + 1) / 2),
    "alpha_divergence": lambda u: (
        (u ** (1 - ALPHA) - (1 - ALPHA) * u - ALPHA) / (ALPHA * (ALPHA - 1))
    ),
}
CONSTANT = {"reverse_kl": 1.0, "forward_kl": -1.0}  # f'(1); it cancels within a pair


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_derivative(divergence):
    u = torch.logspace(-3, 3, 25, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(F[divergence](u).sum(), u)
    ours = f_derivative(u.detach().log(), divergence, ALPHA)
    torch.testing.assert_close(ours + CONSTANT.get(divergence, 0.0), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@given(
    batch=st.builds(
        make_batch, pairs=st.integers(0, 4), length=st.integers(1, 7), seed=st.integers(0, 999)
    ),
    average=st.booleans(),
)
def test_definition(divergence, batch, average):
    def score(h):
        u = h.exp()
        return {
            "reverse_kl": lambda: torch.log(u) + 1,
            "forward_kl": lambda: -1 / u,
            "js_divergence": lambda: torch.log(2 * u / (1 + u)),
            "alpha_divergence": lambda: (1 - u**-ALPHA) / ALPHA,
        }[divergence]()

    # Not sigmoid and log: the forward KL's margins reach e^15.
    def pair_loss(w, l):
        return torch.nn.functional.softplus(-BETA * (score(w) - score(l)))

    settings = {"f_divergence_type": divergence, "f_divergence_alpha": ALPHA}
    loss_fn = FDivergenceDPOLossFn(config(**settings, preference_average_log_probs=average))
    check_definition(loss_fn, pair_loss, batch, average)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_promises(divergence):
    check_promises(FDivergenceDPOLossFn(config(f_divergence_type=divergence)))
    hardest = {"f_divergence_alpha": 0.01, "reference_policy_kl_penalty": 5.0}
    check_extremes(FDivergenceDPOLossFn(config(f_divergence_type=divergence, **hardest)))


def test_default_is_dpo():
    batch = make_batch(seed=5)
    ours, of_dpo = run(FDivergenceDPOLossFn(config()), *batch), run(DPOLossFn(config()), *batch)
    assert torch.equal(ours[0], of_dpo[0]) and torch.equal(ours[1], of_dpo[1])
    assert ours[2] == of_dpo[2]


def test_alpha_runs_from_reverse_to_forward_kl():
    h = torch.linspace(-3, 3, 13, dtype=torch.float64)
    ends = [f_derivative(h, "alpha_divergence", alpha) for alpha in (1e-9, 1.0)]
    torch.testing.assert_close(ends[0], f_derivative(h, "reverse_kl"))
    torch.testing.assert_close(ends[1], f_derivative(h, "forward_kl"))


def test_upper_bounds_and_small_differences():
    large = torch.tensor(50.0, dtype=torch.float64)
    for divergence, bound in (
        ("forward_kl", 1.0),
        ("js_divergence", math.log(2)),
        ("alpha_divergence", 1 / ALPHA),
    ):
        assert f_derivative(large, divergence, ALPHA).item() == pytest.approx(bound, rel=1e-5)
    tiny = torch.tensor(1e-12)  # 1 - exp(-h) would be 0 in float32
    for divergence in ("forward_kl", "alpha_divergence"):
        assert f_derivative(tiny, divergence).item() == pytest.approx(1e-12, rel=1e-5, abs=0)


def test_clamp_stops_the_gradient_where_it_binds():
    h = torch.tensor([-7.0, -5.0], requires_grad=True)
    values = f_derivative(h, "forward_kl", max_exponent=6.0)
    values.sum().backward()
    assert values[0].item() == pytest.approx(1 - math.exp(6))
    assert h.grad[0] == 0 and h.grad[1].item() == pytest.approx(math.exp(5))


def test_settings():
    check_setting(FDivergenceDPOLossFn, "f_divergence_type", DIVERGENCES, ["kl", None])
    check_setting(FDivergenceDPOLossFn, "f_divergence_alpha", [0.01, 1], [0, 1.5, "0.5"])
    check_setting(FDivergenceDPOLossFn, "f_max_exponent", [1, 80], [0, 81, "8"])
    with pytest.raises(ValueError, match="f_divergence_type: got 'tv'"):
        f_derivative(torch.zeros(1), "tv")
