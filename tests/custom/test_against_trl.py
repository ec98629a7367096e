# SPDX-License-Identifier: Apache-2.0
"""The preference losses against TRL's own code, on the cases of ``help/trl_cases.py``.

Values and gradients with respect to every token agree to 1e-5 of their size.
"""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from preference_checks import config, run
from trl_cases import (
    FROM_LOGITS,
    PAIRS,
    SAME,
    dpo_trainer_loss,
    kto_trainer_loss,
    logits_and_labels,
    make_pairs,
)
from trl_differences import differences

from nemo_rl_ref.custom import batch, f_divergence, pairwise
from nemo_rl_ref.logprobs import token_logprobs


def assert_same(loss_fn, theirs, policy, data):
    """`theirs` maps log-probabilities and data to TRL's loss."""
    loss, grad, _ = run(loss_fn, policy, data)
    policy = policy.detach().clone().requires_grad_()
    expected = theirs(policy, data)
    (expected_grad,) = torch.autograd.grad(expected, policy)
    scale = expected_grad.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-12, check_dtype=False)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("loss_class", "settings", "theirs"), SAME.values(), ids=SAME)
def test_same_as_trl(loss_class, settings, theirs, seed):
    assert_same(loss_class(config(**settings)), theirs, *make_pairs(seed))


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
def test_alpha_divergence(alpha):
    """TRL's coefficient is 1 - α. TRL has float32 only, and an exp where we have an expm1."""
    settings = {"f_divergence_type": "alpha_divergence", "f_divergence_alpha": alpha}
    theirs = partial(
        dpo_trainer_loss,
        loss_type="sigmoid",
        f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=1 - alpha,
    )
    loss_fn = f_divergence.FDivergenceDPOLossFn(config(**settings))
    assert_same(loss_fn, theirs, *make_pairs(1, torch.float32))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_where_kto_clamps_its_reference_point(seed):
    policy, data = make_pairs(seed)
    data["mismatched_logprobs"] -= 30.0
    theirs = partial(kto_trainer_loss, desirable_weight=1.0, undesirable_weight=1.0)
    assert_same(batch.KTOLossFn(config()), theirs, policy, data)


def test_where_trl_differs():
    """What the docstrings say of TRL is still so."""
    policy, data = make_pairs(0)

    def theirs(loss_type, **settings):
        return dpo_trainer_loss(policy, data, loss_type, **settings).item()

    def ours(loss_class, **settings):
        return run(loss_class(config(**settings)), policy, data)[0].item()

    # IPO of sums, and BCO with a threshold: the papers', not TRL's.
    assert ours(pairwise.IPOLossFn) != pytest.approx(theirs("ipo"), rel=0.01)
    assert ours(batch.BCOPairLossFn) != pytest.approx(theirs("bco_pair"), rel=1e-3)
    # TRL's plain DPO does not read label_smoothing.
    assert theirs("sigmoid", label_smoothing=0.3) == theirs("sigmoid")
    # TRL's forward KL is not clamped.
    data["reference_policy_logprobs"] += 1e4 * data["token_mask"].roll(-1, 1)
    assert not math.isfinite(theirs("sigmoid", f_divergence_type="forward_kl"))
    forward = {"f_divergence_type": "forward_kl"}
    assert math.isfinite(ours(f_divergence.FDivergenceDPOLossFn, **forward))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("loss_class", "settings", "theirs", "shape"), FROM_LOGITS.values(), ids=FROM_LOGITS
)
def test_same_as_trl_from_logits(loss_class, settings, theirs, shape, seed):
    _, data = make_pairs(seed, **shape)
    logits, ids = logits_and_labels(seed)
    logits.requires_grad_()
    logprobs = token_logprobs(logits[:, :-1], ids[:, 1:])
    tokens = data["token_mask"][:, 1:].sum()
    loss, _ = loss_class(config(**settings))(
        logprobs, data, torch.tensor(2.0 * PAIRS, dtype=torch.float64), tokens
    )
    (grad,) = torch.autograd.grad(loss, logits)
    expected = theirs(logits, ids, data)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    scale = expected_grad.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-12, check_dtype=False)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5 * scale)


def test_the_recorded_differences_are_those_of_now():
    """The site prints the record; another processor rounds differently, by no more than this."""
    path = Path(__file__).parents[2] / "benchmarks/results/trl-differences.json"
    recorded, now = json.loads(path.read_text())["differences"], differences()
    assert list(recorded) == list(now)
    for name, worst in now.items():
        assert max(worst, 1e-15) < 10 * max(recorded[name], 1e-15), name
