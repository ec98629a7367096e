# SPDX-License-Identifier: Apache-2.0
"""Policy-gradient losses: TRL's numbers, their definitions, the promises, bad settings."""

import math
import pickle
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_checks import counts, run
from trl import GRPOTrainer

from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl_ref.algorithms.loss.interfaces import LossInputType, LossType, MetricNormalizer
from nemo_rl_ref.custom.policy_gradient import (
    BNPOLossFn,
    DrGRPOLossFn,
    LUSPOLossFn,
    SAPOLossFn,
    TokenPGLossFn,
    VESPOLossFn,
)
from nemo_rl_ref.custom.policy_gradient_extras import DAPOLossFn, EntropyPGLossFn, MaxRLLossFn

ROWS, LENGTH, LONGEST, BETA = 6, 8, 11, 0.05
POLICIES = ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs")


def config(**flags):
    defaults = {"reference_policy_kl_penalty": 0.0, "max_response_length": LONGEST}
    return ClippedPGLossConfig(**{**defaults, **flags})


def make_batch(seed=0, rows=ROWS, length=LENGTH, spread=0.5, dtype=torch.float64, masked=True):
    """Log-probabilities (B, S-1) and data; one advantage a row; every row has a token."""
    generator = torch.Generator().manual_seed(seed)
    rand = partial(torch.rand, generator=generator, dtype=torch.float64)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    logprobs = -0.01 - 3 * rand(rows, length - 1)
    token_mask = (rand(rows, length) < 0.7).double()
    token_mask[:, 1 + seed % (length - 1)] = 1
    sample_mask = (rand(rows) < 0.7).double() if masked else torch.ones(rows, dtype=torch.float64)
    sample_mask[seed % rows] = 1
    advantages = randn(rows, 1).expand(rows, length).contiguous()
    data = {"token_mask": token_mask, "sample_mask": sample_mask, "advantages": advantages}
    for key in POLICIES:
        others = (logprobs + spread * randn(rows, length - 1)).clamp(max=-1e-3)
        data[key] = torch.cat([randn(rows, 1), others], 1)
    return logprobs.to(dtype), {
        key: value if "mask" in key else value.to(dtype) for key, value in data.items()
    }


def assert_close(result, expected, expected_grad, rel=1e-5):
    """Value and gradient to a relative difference of `rel`."""
    loss, grad, metrics = result
    scale = expected_grad.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(loss, expected.detach(), rtol=rel, atol=1e-9, check_dtype=False)
    torch.testing.assert_close(grad, expected_grad, rtol=rel, atol=rel * scale, check_dtype=False)
    assert metrics["loss"] == loss.item()


# TRL


def trl_loss(logprobs, data, loss_type, entropies=None, trainer_settings=None, **args):
    """GRPOTrainer's loss on a stand-in for the trainer, a prompt of one token before the rest."""
    mask = data["token_mask"][:, 1:]
    entropies = torch.zeros_like(logprobs) if entropies is None else entropies
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1,
            sync_gradients=False,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
        ),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropies, None),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        loss_type=loss_type,
        max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1,
        use_adaptive_entropy=False,
        _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(
            **{
                "use_bias_correction_kl": True,
                "delta": None,
                "steps_per_generation": 1,
                "sapo_temperature_pos": 1.0,
                "sapo_temperature_neg": 1.05,
                "vespo_k_pos": 2.0,
                "vespo_lambda_pos": 3.0,
                "vespo_k_neg": 3.0,
                "vespo_lambda_neg": 2.0,
                **args,
            }
        ),
        **{
            "importance_sampling_level": "token",
            "beta": 0.0,
            "epsilon_low": 0.2,
            "epsilon_high": 0.2,
            "use_vllm": False,
            "vllm_importance_sampling_correction": False,
            "_entropy_bonus_enabled": False,
            **(trainer_settings or {}),
        },
    )
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": data["advantages"][:, 1],
        "old_per_token_logps": data["prev_logprobs"][:, 1:],
        "ref_per_token_logps": data["reference_policy_logprobs"][:, 1:],
        "num_items_in_batch": mask.sum(),
    }
    if stub.use_vllm:
        # As the trainer computes it: at masked positions both are 0, so that the ratio is 1.
        difference = (data["prev_logprobs"] - data["generation_logprobs"])[:, 1:] * mask
        inputs["importance_sampling_ratio"] = difference.exp().clamp(max=1.1)
    return GRPOTrainer._compute_loss(stub, None, inputs)


def with_grad(function, logprobs, *args, **kwargs):
    logprobs = logprobs.detach().clone().requires_grad_()
    value = function(logprobs, *args, **kwargs)
    return value, *torch.autograd.grad(value, logprobs)


SEQUENCE = {"importance_sampling_level": "sequence"}
SAME = {
    "dr_grpo": (DrGRPOLossFn, {}, "dr_grpo", {}, {}),
    "dr_grpo of sequences": (
        DrGRPOLossFn,
        {"sequence_level_importance_ratios": True, "token_level_loss": False},
        *("dr_grpo", SEQUENCE, {}),
    ),
    "bnpo": (BNPOLossFn, {}, "bnpo", {}, {}),
    "dapo": (DAPOLossFn, {"token_level_loss": False}, "dapo", {}, {}),
    "luspo": (LUSPOLossFn, {}, "luspo", SEQUENCE, {}),
    "sapo": (SAPOLossFn, {}, "sapo", {}, {}),
    "sapo, other temperatures": (
        SAPOLossFn,
        {"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 3},
        *("sapo", {}, {"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 3.0}),
    ),
    "vespo": (VESPOLossFn, {}, "vespo", {}, {}),
    "vespo, other weights": (
        VESPOLossFn,
        {"vespo_k_pos": 1, "vespo_lambda_pos": 0.5, "vespo_k_neg": 2, "vespo_lambda_neg": 0.7},
        *("vespo", {}),
        {"vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_k_neg": 2.0, "vespo_lambda_neg": 0.7},
    ),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("loss_class", "flags", "name", "trainer_settings", "args"), SAME.values(), ids=SAME
)
def test_same_as_trl(loss_class, flags, name, trainer_settings, args, seed):
    logprobs, data = make_batch(seed, masked=False)
    expected = with_grad(trl_loss, logprobs, data, name, None, trainer_settings, **args)
    assert_close(run(loss_class(config(**flags)), logprobs, data), *expected)


@pytest.mark.parametrize("name", ["dr_grpo", "bnpo", "sapo", "vespo"])
def test_same_as_trl_with_correction_and_kl(name):
    """Other clipping, "token_truncate" and β > 0; the KL estimates weighted with π_θ/π_old."""
    loss_class = SAME[name][0]
    logprobs, data = make_batch(4, masked=False)
    flags = {
        "reference_policy_kl_penalty": BETA,
        "kl_input_clamp_value": None,
        "kl_output_clamp_value": None,
        "ratio_clip_max": 0.3,
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "tis",
        "truncated_importance_sampling_ratio": 1.1,
    }
    theirs = {"use_vllm": True, "vllm_importance_sampling_correction": True, "epsilon_high": 0.3}
    value, grad = with_grad(trl_loss, logprobs, data, name, None, theirs)
    no_kl = config(**{**flags, "reference_policy_kl_penalty": 0.0})
    assert_close(run(loss_class(no_kl), logprobs, data), value, grad)
    # TRL weighs with π_θ/π_old, NeMo RL with π_θ/π_gen: the same without another engine.
    data["generation_logprobs"] = data["prev_logprobs"]
    theirs["beta"] = BETA
    value, grad = with_grad(trl_loss, logprobs, data, name, None, theirs)
    flags["use_on_policy_kl_approximation"] = True
    assert_close(run(loss_class(config(**flags)), logprobs, data), value, grad)


def test_bnpo_of_equal_micro_batches_is_trl_mean():
    logprobs, data = make_batch(2, masked=False)
    total = counts(data)
    ours = theirs = 0.0
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        part = {key: value[rows] for key, value in data.items()}
        ours += run(BNPOLossFn(config()), logprobs[rows], part, **total)[0]
        theirs += trl_loss(logprobs[rows], part, "bnpo") / 3
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)
    whole = run(BNPOLossFn(config()), logprobs, data)[0]
    assert abs(whole - ours) > 1e-4, "by design, the split matters"


def test_where_trl_differs():
    """What the docstrings say of TRL is still so."""
    logprobs, data = make_batch(1, masked=False)
    paper = run(VESPOLossFn(config(vespo_reduction="sequences")), logprobs, data)[0]
    tokens_a_row = data["token_mask"][:, 1:].sum() / ROWS
    theirs = trl_loss(logprobs, data, "vespo")
    torch.testing.assert_close(paper / tokens_a_row, theirs, rtol=1e-6, atol=0)
    # Without the flag for it, TRL's KL term has the gradient of KL(π_ref‖π_θ).
    args = {"trainer_settings": {"beta": BETA}, "use_bias_correction_kl": False}
    value, grad = with_grad(trl_loss, logprobs, data, "bnpo", **args)
    loss, ours, _ = run(BNPOLossFn(config(reference_policy_kl_penalty=BETA)), logprobs, data)
    torch.testing.assert_close(loss, value, rtol=1e-6, atol=0)
    assert (ours - grad).abs().max() > 0.01 * grad.abs().max()


# Definitions, by loops over rows and tokens, in float64


def loop(logprobs, data, row_loss):
    """Sum of `row_loss(log ρ, log π, A)` over valid rows; the tensors hold the row's tokens."""
    total = 0.0
    for i in range(len(logprobs)):
        keep = data["token_mask"][i, 1:] == 1
        if data["sample_mask"][i] and keep.any():
            log_ratios = (logprobs[i] - data["prev_logprobs"][i, 1:])[keep]
            total = total + row_loss(log_ratios, logprobs[i][keep], data["advantages"][i, 1])
    return total


def clipped(ratios, a):
    return -torch.min(ratios * a, ratios.clip(0.8, 1.2) * a)


def dr_grpo_row(log_ratios, logp, a):
    return clipped(log_ratios.exp(), a).sum() / LONGEST


def luspo_row(log_ratios, logp, a):
    root = (log_ratios.exp().prod() ** (1 / len(logp)))[None]
    return len(logp) * clipped(root, a).sum()


def sapo_row(log_ratios, logp, a):
    tau = 1.0 if a > 0 else 1.05
    gate = 1 / (1 + torch.exp(-tau * (log_ratios.exp() - 1))) * 4 / tau
    return -(gate * a).mean()


def vespo_row(log_ratios, logp, a):
    k, lam = (2, 3) if a >= 0 else (3, 2)
    w = log_ratios.exp().prod().detach()
    return -(w**k * math.e ** (lam * (1 - w))) * a * logp.sum()


DEFINITIONS = {
    "dr_grpo": (DrGRPOLossFn, {}, dr_grpo_row, "global_valid_seqs"),
    "bnpo": (BNPOLossFn, {}, lambda r, p, a: clipped(r.exp(), a).sum(), "global_valid_toks"),
    "dapo": (DAPOLossFn, {}, lambda r, p, a: clipped(r.exp(), a).sum(), "global_valid_toks"),
    "luspo": (LUSPOLossFn, {}, luspo_row, "global_valid_seqs"),
    "sapo": (SAPOLossFn, {}, sapo_row, "global_valid_seqs"),
    "vespo": (VESPOLossFn, {}, vespo_row, "global_valid_toks"),
    "vespo of sequences": (
        VESPOLossFn,
        {"vespo_reduction": "sequences"},
        *(vespo_row, "global_valid_seqs"),
    ),
}


@pytest.mark.parametrize(
    ("loss_class", "flags", "row_loss", "count"), DEFINITIONS.values(), ids=DEFINITIONS
)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(1, 5), length=st.integers(2, 7))
def test_definition(loss_class, flags, row_loss, count, seed, rows, length):
    logprobs, data = make_batch(seed, rows, length)
    result = run(loss_class(config(**flags)), logprobs, data)
    value, grad = with_grad(lambda p: loop(p, data, row_loss) / counts(data)[count], logprobs)
    torch.testing.assert_close(result[0], value.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(result[1], grad, rtol=1e-6, atol=1e-9)


EVERYTHING = {
    "plain": {},
    "dual clip": {"ratio_clip_c": 1.3},
    "on policy": {"force_on_policy_ratio": True},
    "k1": {"reference_policy_kl_penalty": BETA, "reference_policy_kl_type": "k1"},
    "k3 weighted": {
        "reference_policy_kl_penalty": BETA,
        "use_on_policy_kl_approximation": True,
        "kl_output_clamp_value": 0.1,
    },
    "kl in reward": {"reference_policy_kl_penalty": BETA, "use_kl_in_reward": True},
    "correction": {"use_importance_sampling_correction": True},
    **{
        kind: {
            "use_importance_sampling_correction": True,
            "truncated_importance_sampling_type": kind,
            "truncated_importance_sampling_ratio_min": 0.7,
            "truncated_importance_sampling_ratio": 1.1,
        }
        for kind in ("tis", "icepop", "seq-mask-tis")
    },
}


@pytest.mark.parametrize("flags", EVERYTHING.values(), ids=EVERYTHING)
def test_flags_mean_what_they_mean_in_nemo_rl(flags):
    """The base class is `ClippedPGLossFn`, value, gradient and metrics, for every flag it takes."""
    logprobs, data = make_batch(3)
    value, grad, metrics = run(ClippedPGLossFn(config(**flags)), logprobs, data)
    result = run(TokenPGLossFn(config(**flags)), logprobs, data)
    assert_close(result, value, grad, rel=1e-7)
    assert result[2] == pytest.approx(metrics, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("name", ["plain", "correction", "tis", "icepop"])
def test_sequence_flags_mean_what_they_mean_in_nemo_rl(name):
    """LUSPO is GSPO where all responses have one length, but for that length."""
    logprobs, data = make_batch(3)
    data["token_mask"][:] = 1
    flags = {**EVERYTHING[name], "reference_policy_kl_penalty": BETA}
    gspo = {"sequence_level_importance_ratios": True, "token_level_loss": False}
    value, grad, _ = run(ClippedPGLossFn(config(**flags, **gspo)), logprobs, data)
    length = LENGTH - 1
    assert_close(run(LUSPOLossFn(config(**flags)), logprobs, data), value * length, grad * length)


def test_curr_logprobs_unfiltered_is_used_for_the_kl():
    logprobs, data = make_batch(5)
    data["curr_logprobs_unfiltered"] = logprobs - 0.3
    cfg = config(reference_policy_kl_penalty=BETA)
    expected = run(ClippedPGLossFn(cfg), logprobs, data)
    assert_close(run(TokenPGLossFn(cfg), logprobs, data), *expected[:2])


def test_vespo_correction_is_in_the_weight():
    """With π_old/π_gen, π_old cancels from W."""
    logprobs, data = make_batch(6)
    cfg = config(use_importance_sampling_correction=True)
    other = {**data, "prev_logprobs": data["generation_logprobs"]}
    result = run(VESPOLossFn(cfg), logprobs, data)
    assert_close(result, *run(VESPOLossFn(config()), logprobs, other)[:2], rel=1e-7)
    assert abs(result[0] - run(VESPOLossFn(config()), logprobs, data)[0]) > 1e-4


# Entropy and MaxRL


def test_entropy_gradient_is_exact_in_the_mean():
    """Over all tokens of a vocabulary, weighted by π_gen: the entropy of the softmax, as in TRL."""
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    logits, old = randn(7).requires_grad_(), randn(7).log_softmax(0)
    loss_fn = EntropyPGLossFn(config(entropy_coefficient=0.3))
    advantages, one = randn(7), torch.ones((), dtype=torch.float64)
    ours = theirs = estimate = 0.0
    for token in range(7):
        logprobs = logits.log_softmax(0)
        row = logprobs[token].view(1, 1)
        stored = torch.nn.functional.pad(old[token].view(1, 1), (1, 0))
        data = {
            "token_mask": torch.ones(1, 2, dtype=torch.float64),
            "sample_mask": torch.ones(1, dtype=torch.float64),
            "advantages": advantages[token].expand(1, 2),
            **dict.fromkeys(POLICIES, stored),
        }
        loss, metrics = loss_fn(row, data, one, one)
        assert metrics["loss"] == loss.item()
        entropy = -(logprobs.exp() * logprobs).sum().view(1, 1)
        bonus = {"_entropy_bonus_enabled": True, "entropy_coef": 0.3}
        ours = ours + old[token].exp() * loss
        estimate += old[token].exp().item() * metrics["entropy_estimate"]
        theirs = theirs + old[token].exp() * trl_loss(row, data, "dapo", entropy, bonus)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert estimate == pytest.approx(entropy.item(), rel=1e-6)
    (grad,) = torch.autograd.grad(ours, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("token_level", [True, False])
def test_entropy_term(token_level):
    """It is NeMo RL's loss less c times the estimate, which is reduced as the loss is."""
    logprobs, data = make_batch(7)
    cfg = config(token_level_loss=token_level, entropy_coefficient=0.4)
    base, base_grad, base_metrics = run(ClippedPGLossFn(cfg), logprobs, data)

    def bonus(p):
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        h = -(p - data["generation_logprobs"][:, 1:]).exp() * p * mask
        if token_level:
            return h.sum() / mask.sum()
        return (h.sum(1) / mask.sum(1).clamp(min=1)).sum() / data["sample_mask"].sum()

    value, grad = with_grad(bonus, logprobs)
    loss_fn = EntropyPGLossFn(cfg)
    result = run(loss_fn, logprobs, data)
    assert_close(result, base - 0.4 * value, base_grad - 0.4 * grad, rel=1e-6)
    assert result[2]["entropy_estimate"] == pytest.approx(value.item(), rel=1e-6)
    assert result[2].keys() == {*base_metrics, "entropy_estimate"}
    level = MetricNormalizer.TOKENS if token_level else MetricNormalizer.SEQUENCES
    assert loss_fn.metric_normalizations["entropy_estimate"] == level
    without = run(EntropyPGLossFn(config(entropy_coefficient=0)), logprobs, data)
    assert torch.equal(without[1], run(ClippedPGLossFn(config()), logprobs, data)[1])


def test_entropy_stays_finite_where_the_ratio_does_not():
    logprobs, data = make_batch(7, masked=False)
    data["generation_logprobs"] -= 1e4
    data["advantages"].zero_()
    loss, grad, _ = run(EntropyPGLossFn(config()), logprobs, data)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maxrl(dtype):
    """Prompts with 0, 1, 2 and all of 3 successes: the paper's gradient estimator."""
    rewards = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 1]], dtype=dtype)
    mean = rewards.mean(1, keepdim=True)
    logprobs, data = make_batch(8, rows=12, masked=False, dtype=dtype)
    data["advantages"] = (rewards - mean).view(12, 1).expand(12, LENGTH)
    before = data["advantages"].clone()
    cfg = config(disable_ppo_ratio=True)
    result = run(MaxRLLossFn(cfg), logprobs, data)
    assert torch.equal(data["advantages"], before)

    weights = torch.zeros(4, 3, dtype=torch.float64)
    for prompt in range(4):  # (1/K) Σ over successes of the score, less the mean score
        k = rewards[prompt].sum()
        if k > 0:
            weights[prompt] = rewards[prompt] / k - 1 / 3
    scores = weights.view(12, 1) * 3 * data["token_mask"][:, 1:]
    tokens = data["token_mask"][:, 1:].sum()
    value, grad = with_grad(lambda p: -(p * scores).sum() / tokens, logprobs.double())
    assert_close(result, value, grad.to(dtype), rel=1e-5)


def test_maxrl_is_finite_where_the_baseline_is_zero():
    """A success rate below a thousandth counts as one: what a lone success is worth has a bound."""
    logprobs, data = make_batch(8, masked=False)
    data["advantages"].fill_(1.0)
    loss, grad, _ = run(MaxRLLossFn(config(disable_ppo_ratio=True)), logprobs, data)
    data["advantages"].fill_(0.999)
    expected, expected_grad, _ = run(MaxRLLossFn(config(disable_ppo_ratio=True)), logprobs, data)
    torch.testing.assert_close(loss * 0.999, expected)
    torch.testing.assert_close(grad * 0.999, expected_grad)


# Promises

MINE = {
    "base": TokenPGLossFn,
    "dr_grpo": DrGRPOLossFn,
    "bnpo": BNPOLossFn,
    "luspo": LUSPOLossFn,
    "sapo": SAPOLossFn,
    "vespo": VESPOLossFn,
}
ON_NEMO_RL = {"dapo": DAPOLossFn, "entropy": EntropyPGLossFn, "maxrl": MaxRLLossFn}
ALL = {**MINE, **ON_NEMO_RL}
SUMMED = [name for name in ALL if name != "bnpo"]


@pytest.mark.parametrize("name", SUMMED)
def test_micro_batches_sum(name):
    logprobs, data = make_batch(9)
    cfg = config(reference_policy_kl_penalty=BETA)
    loss_fn, total = ALL[name](cfg), counts(data)
    assert not getattr(loss_fn, "needs_whole_batch", False)
    whole, grad, metrics = run(loss_fn, logprobs, data)
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, None)):
        part = {key: value[rows] for key, value in data.items()}
        parts.append(run(loss_fn, logprobs[rows], part, **total))
    torch.testing.assert_close(sum(part[0] for part in parts), whole)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad)
    for key in metrics:
        if not key.endswith(("_min", "_max")) and key != "sampling_importance_ratio":
            assert sum(part[2][key] for part in parts) == pytest.approx(metrics[key], rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_counts_of_one_can_be_divided_later(name):
    """What a trainer does that knows the counts only in the end: by `loss_type`, and the table."""
    logprobs, data = make_batch(10)
    loss_fn = ALL[name](config(reference_policy_kl_penalty=BETA))
    whole, _, metrics = run(loss_fn, logprobs, data)
    one = torch.ones((), dtype=torch.float64)
    raw, _, raw_metrics = run(loss_fn, logprobs, data, global_valid_seqs=one, global_valid_toks=one)
    seqs, toks = counts(data).values()
    count = toks if loss_fn.loss_type == LossType.TOKEN_LEVEL else seqs
    torch.testing.assert_close(raw / count, whole)
    divisor = {
        MetricNormalizer.TOKENS: toks.item(),
        MetricNormalizer.SEQUENCES: seqs.item(),
        MetricNormalizer.NONE: 1.0,
    }
    for key, value in metrics.items():
        level = loss_fn.metric_normalizations[key]
        assert raw_metrics[key] / divisor[level] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_masked_tokens_and_rows_have_no_gradient(name):
    logprobs, data = make_batch(11)
    before = {key: value.clone() for key, value in data.items()}
    _, grad, metrics = run(ALL[name](config(reference_policy_kl_penalty=BETA)), logprobs, data)
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    assert (grad[mask == 0] == 0).all() and grad.abs().sum() > 0
    assert all(torch.equal(data[key], before[key]) for key in before), "inputs were modified"
    assert all(type(value) in (float, int) for value in metrics.values())


@pytest.mark.parametrize("garbage", [1e30, -math.inf, math.inf, math.nan])
@pytest.mark.parametrize("name", MINE)
def test_garbage_under_the_mask_changes_nothing(name, garbage):
    logprobs, data = make_batch(12)
    data["curr_logprobs_unfiltered"] = logprobs - 0.1
    cfg = config(reference_policy_kl_penalty=BETA, use_importance_sampling_correction=True)
    loss, grad, metrics = run(MINE[name](cfg), logprobs, data)
    masked = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]) == 0
    wide = torch.nn.functional.pad(masked, (1, 0), value=True)
    spoilt = {key: data[key] for key in ("token_mask", "sample_mask")}
    for key in (*POLICIES, "advantages"):
        spoilt[key] = data[key].masked_fill(wide, garbage)
    key = "curr_logprobs_unfiltered"
    spoilt[key] = data[key].masked_fill(masked, garbage)
    again = run(MINE[name](cfg), logprobs.masked_fill(masked, garbage), spoilt)
    assert torch.equal(again[0], loss) and torch.equal(again[1], grad)
    assert again[2] == metrics


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_dtype_of_the_masks(name, dtype):
    logprobs, data = make_batch(16)
    loss_fn = ALL[name](config(reference_policy_kl_penalty=BETA))
    loss, grad, _ = run(loss_fn, logprobs, data)
    data = {key: value.to(dtype) if "mask" in key else value for key, value in data.items()}
    again = run(loss_fn, logprobs, data)
    torch.testing.assert_close(again[0], loss)
    torch.testing.assert_close(again[1], grad)


@pytest.mark.parametrize("name", ALL)
def test_padding_changes_nothing(name):
    """Also with importance weights bounded away from 1, which masked tokens would have."""
    logprobs, data = make_batch(15)
    flags = EVERYTHING["tis"] | {"truncated_importance_sampling_ratio": 0.8}
    loss_fn = ALL[name](config(reference_policy_kl_penalty=BETA, **flags))
    loss, grad, _ = run(loss_fn, logprobs, data)
    wide = {
        key: value if key == "sample_mask" else torch.nn.functional.pad(value, (0, 3))
        for key, value in data.items()
    }
    padded = run(loss_fn, torch.nn.functional.pad(logprobs, (0, 3)), wide)
    torch.testing.assert_close(padded[0], loss)
    torch.testing.assert_close(padded[1], torch.nn.functional.pad(grad, (0, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MINE)
def test_extremes_are_finite(name, dtype):
    logprobs, data = make_batch(13, rows=4, length=3, masked=False, dtype=dtype)
    data["token_mask"][:] = 1
    data["advantages"] = torch.tensor([1, 1, -1, -1], dtype=dtype).view(4, 1).expand(4, 3)
    loss_fn = MINE[name](config(reference_policy_kl_penalty=BETA))
    for size in (1e4, 40.0):
        far = logprobs + torch.tensor([size, -size, size, -size], dtype=dtype).view(4, 1)
        loss, grad, _ = run(loss_fn, far, data)
        assert loss.isfinite() and grad.isfinite().all()
    for key in ("token_mask", "sample_mask"):
        empty = {**data, key: torch.zeros_like(data[key])}
        loss, grad, _ = run(loss_fn, logprobs, empty)
        assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("name", ALL)
def test_protocol(name):
    logprobs, data = make_batch(14)
    loss_fn = ALL[name](config())
    assert isinstance(loss_fn, ClippedPGLossFn) and loss_fn.input_type == LossInputType.LOGPROB
    assert loss_fn.metric_normalizations["loss"].value.startswith(loss_fn.loss_type.value[:5])
    again = pickle.loads(pickle.dumps(loss_fn))
    assert torch.equal(run(again, logprobs, data)[1], run(loss_fn, logprobs, data)[1])
    expected = {"dapo", "base", "vespo", "entropy", "maxrl"}
    assert (loss_fn.loss_type == LossType.TOKEN_LEVEL) == (name in expected)
    assert ALL[name](config(), use_fused_linear_logprobs=True).use_fused_linear_logprobs


# Bad input

POSITIVE = [0, -1.0, math.inf, math.nan, "1", True]
SETTINGS = [
    (DrGRPOLossFn, "max_response_length", [*POSITIVE, None]),
    (SAPOLossFn, "sapo_temperature_pos", POSITIVE),
    (SAPOLossFn, "sapo_temperature_neg", POSITIVE),
    (VESPOLossFn, "vespo_k_pos", POSITIVE),
    (VESPOLossFn, "vespo_lambda_pos", POSITIVE),
    (VESPOLossFn, "vespo_k_neg", POSITIVE),
    (VESPOLossFn, "vespo_lambda_neg", POSITIVE),
    (VESPOLossFn, "vespo_reduction", ["mean", None]),
    (EntropyPGLossFn, "entropy_coefficient", [-0.1, math.nan, math.inf, "1", True]),
    (TokenPGLossFn, "disable_ppo_ratio", [True]),
    (LUSPOLossFn, "use_cispo", [True]),
    (BNPOLossFn, "positive_example_nll_weight", [0.1]),
    (SAPOLossFn, "ratio_clip_c", [3.0]),
    (SAPOLossFn, "sequence_level_importance_ratios", [True]),
    (VESPOLossFn, "sequence_level_importance_ratios", [True]),
    (MaxRLLossFn, "use_kl_in_reward", [True]),
]


@pytest.mark.parametrize(
    ("loss_class", "key", "value"),
    [(loss_class, key, value) for loss_class, key, values in SETTINGS for value in values],
)
def test_bad_settings_are_named(loss_class, key, value):
    with pytest.raises(ValueError, match=f"^{key}: got .*expected") as error:
        loss_class(config(**{key: value}))
    assert repr(value) in str(error.value)


def test_vespo_refuses_a_second_weight_of_responses():
    with pytest.raises(ValueError, match="truncated_importance_sampling_type.*seq-mask-tis"):
        VESPOLossFn(config(**EVERYTHING["seq-mask-tis"]))


def test_missing_length_and_wrong_config():
    with pytest.raises(ValueError, match="max_response_length: got None"):
        DrGRPOLossFn(ClippedPGLossConfig())
    for loss_class in (SAPOLossFn, DAPOLossFn):
        with pytest.raises(TypeError, match="cfg is a dict, expected a ClippedPGLossConfig"):
            loss_class({})


@pytest.mark.parametrize("key", ["token_mask", "sample_mask", "advantages", "prev_logprobs"])
def test_missing_data_is_named(key):
    logprobs, data = make_batch(0)
    total = counts(data)
    del data[key]
    with pytest.raises(KeyError, match=key):
        run(SAPOLossFn(config()), logprobs, data, **total)


def test_bad_shape_is_named():
    logprobs, data = make_batch(0)
    data["prev_logprobs"] = data["prev_logprobs"][:, :-1]
    with pytest.raises(ValueError, match="prev_logprobs.*shape"):
        run(SAPOLossFn(config()), logprobs, data)
