# SPDX-License-Identifier: Apache-2.0
"""NLL, preference and DPO losses: definitions in plain Python, invariances, hooks, bad input."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn, NLLLossFn, PreferenceLossFn
from nemo_rl_ref.algorithms.loss.interfaces import LossInputType, LossType, MetricNormalizer
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict

MASK_DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bool, torch.int64])


def make_batch(pairs=3, length=6, seed=0, dtype=torch.float64, mask_dtype=torch.float32):
    """Random log-probabilities (2P, S-1) and data (2P, S), with whole pairs masked."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    rows = 2 * pairs
    logprobs = (-4 * rand(rows, length - 1)).to(dtype)
    data = {
        "token_mask": (rand(rows, length) < 0.6).to(mask_dtype),
        "sample_mask": (rand(pairs) < 0.7).repeat_interleave(2).to(mask_dtype),
        "reference_policy_logprobs": (-4 * rand(rows, length)).to(dtype),
    }
    return logprobs, data


def counts(data):
    """The global counts if this batch is the global batch."""
    sample_mask = data["sample_mask"].double()
    tokens = data["token_mask"][:, 1:].double() * sample_mask[:, None]
    return {"global_valid_seqs": sample_mask.sum(), "global_valid_toks": tokens.sum()}


def run(loss_fn, output, data, **overrides):
    """Loss as a float, gradient and metrics."""
    output = output.detach().clone().requires_grad_()
    loss, metrics = loss_fn(output, data, **{**counts(data), **overrides})
    loss.backward()
    return loss.item(), output.grad, metrics


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def dpo_in_plain_python(cfg, logprobs, data):
    """The definition, pair by pair and token by token. Returns the loss and the metrics."""
    rows, steps = logprobs.shape
    policy, reference = logprobs.tolist(), data["reference_policy_logprobs"].tolist()
    token_mask, sample_mask = data["token_mask"].tolist(), data["sample_mask"].tolist()
    log_ratio, nll = [], []
    for row in range(rows):
        tokens = [t for t in range(steps) if token_mask[row][t + 1]]  # t predicts token t+1
        ratio = sum(policy[row][t] - reference[row][t] for t in tokens)
        score = -sum(policy[row][t] for t in tokens)
        length = max(len(tokens), 1)
        log_ratio.append(ratio / length if cfg.preference_average_log_probs else ratio)
        nll.append(score / length if cfg.sft_average_log_probs else score)
    pairs = [(i, i + 1) for i in range(0, rows, 2) if sample_mask[i]]

    def mean(values):
        values = list(values)
        return sum(values) / len(values) if values else 0.0

    beta = cfg.reference_policy_kl_penalty
    preference = mean(-math.log(sigmoid(beta * (log_ratio[w] - log_ratio[l]))) for w, l in pairs)
    sft = mean(nll[w] for w, _ in pairs) if cfg.sft_loss_weight else 0.0
    loss = cfg.sft_loss_weight * sft + cfg.preference_loss_weight * preference
    return {
        "loss": loss,
        "sft_loss": sft,
        "preference_loss": preference,
        "accuracy": mean(float(log_ratio[w] > log_ratio[l]) for w, l in pairs),
        "rewards_chosen_mean": mean(log_ratio[w] for w, _ in pairs),
        "rewards_rejected_mean": mean(log_ratio[l] for _, l in pairs),
        "num_valid_samples": len(pairs),
    }


configs = st.builds(
    DPOLossConfig,
    reference_policy_kl_penalty=st.sampled_from([0.01, 0.1, 1.0]),
    preference_loss_weight=st.sampled_from([0.0, 1.0, 0.3]),
    sft_loss_weight=st.sampled_from([0.0, 0.2]),
    preference_average_log_probs=st.booleans(),
    sft_average_log_probs=st.booleans(),
)
batches = st.builds(
    make_batch,
    pairs=st.integers(0, 4),
    length=st.integers(1, 7),
    seed=st.integers(0, 999),
    mask_dtype=MASK_DTYPES,
)


@given(configs, batches)
def test_dpo_is_its_definition(cfg, batch):
    loss, _, metrics = run(DPOLossFn(cfg), *batch)
    assert metrics == pytest.approx(dpo_in_plain_python(cfg, *batch), rel=1e-6, abs=1e-7)
    assert loss == metrics["loss"]


@given(st.integers(0, 999))
def test_dpo_gradient_of_a_pair(seed):
    """A chosen token gets -β σ(-β margin) / P, a rejected one the opposite, others nothing."""
    logprobs, data = make_batch(pairs=1, seed=seed)
    data["sample_mask"].fill_(1)
    beta = 0.3
    _, grad, metrics = run(
        DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=beta)), logprobs, data
    )
    margin = metrics["rewards_chosen_mean"] - metrics["rewards_rejected_mean"]
    weight = beta * sigmoid(-beta * margin)
    expected = torch.tensor([[-weight], [weight]]) * data["token_mask"][:, 1:]
    torch.testing.assert_close(grad, expected.double(), rtol=1e-5, atol=1e-8)


def test_dpo_of_the_reference_itself_is_log_2():
    """Entry t of the stored reference belongs to token t+1, as the policy's; the last is unused."""
    logprobs, data = make_batch(pairs=4)
    unused = torch.full((8, 1), 1e9, dtype=torch.float64)
    data["reference_policy_logprobs"] = torch.cat([logprobs, unused], 1)
    loss, _, metrics = run(DPOLossFn(DPOLossConfig()), logprobs, data)
    assert loss == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["rewards_chosen_mean"] == metrics["rewards_rejected_mean"] == 0.0
    assert metrics["accuracy"] == 0.0  # a tie counts as wrong


def test_dpo_metrics_are_not_scaled_by_beta():
    batch = make_batch()
    small, large = (
        run(DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=beta)), *batch)[2]
        for beta in (0.01, 1.0)
    )
    assert small["rewards_chosen_mean"] == large["rewards_chosen_mean"]
    assert small["preference_loss"] != large["preference_loss"]


def test_dpo_loss_does_not_underflow():
    """log(sigmoid(-200)) is -inf in float32 if taken in two steps."""
    logprobs = torch.tensor([[-200.0], [0.0]])
    data = {
        "token_mask": torch.ones(2, 2),
        "sample_mask": torch.ones(2),
        "reference_policy_logprobs": torch.zeros(2, 2),
    }
    loss, grad, _ = run(DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0)), logprobs, data)
    assert loss == pytest.approx(200.0)
    assert grad.flatten().tolist() == pytest.approx([-1.0, 1.0])


@given(batches)
def test_nll_is_its_definition(batch):
    logprobs, data = batch
    rows = [
        [-logp for logp, on in zip(row, mask[1:], strict=True) if on and valid]
        for row, mask, valid in zip(
            logprobs.tolist(),
            data["token_mask"].tolist(),
            data["sample_mask"].tolist(),
            strict=True,
        )
    ]
    tokens = sum(len(row) for row in rows)
    loss, _, metrics = run(NLLLossFn(), logprobs, data)
    expected = sum(sum(row) for row in rows) / max(tokens, 1)
    assert loss == pytest.approx(expected, rel=1e-7, abs=1e-12)
    assert metrics == {
        "loss": loss,
        "num_unmasked_tokens": tokens,
        "num_valid_samples": data["sample_mask"].sum().item(),
    }

    for average in (False, True):
        per_row, metrics = NLLLossFn()(
            logprobs, data, None, None, dpo_loss=True, dpo_average_log_probs=average
        )
        expected = [sum(row) / (max(len(row), 1) if average else 1) for row in rows]
        assert per_row.tolist() == pytest.approx(expected)
        assert metrics["loss"] is per_row


@given(st.integers(0, 4), st.integers(0, 999), MASK_DTYPES, st.booleans())
def test_preference_is_its_definition(pairs, seed, mask_dtype, flat):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(2 * pairs, generator=generator, dtype=torch.float64)
    mask = (torch.rand(pairs, generator=generator) < 0.7).repeat_interleave(2).to(mask_dtype)
    valid = [(2 * i, 2 * i + 1) for i in range(pairs) if mask[2 * i]]

    def mean(values):
        return sum(values) / max(len(values), 1)

    loss, metrics = PreferenceLossFn()(
        rewards if flat else rewards[:, None], {"sample_mask": mask}, mask.double().sum(), None
    )
    r = rewards.tolist()
    expected = {
        "loss": mean([-math.log(sigmoid(r[w] - r[l])) for w, l in valid]),
        "accuracy": mean([float(r[w] > r[l]) for w, l in valid]),
        "rewards_chosen_mean": mean([r[w] for w, _ in valid]),
        "rewards_rejected_mean": mean([r[l] for _, l in valid]),
        "num_valid_samples": len(valid),
    }
    assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert loss.item() == metrics["loss"]


def split_pairs(output, data, cut):
    """Two micro-batches of unequal size: pairs before and after `cut`."""
    for rows in (slice(0, 2 * cut), slice(2 * cut, None)):
        yield output[rows], {key: value[rows] for key, value in data.items()}


@given(configs, batches.filter(lambda batch: len(batch[0])), st.data())
def test_micro_batches_sum_to_the_batch(cfg, batch, draw):
    """Loss, gradient and every metric of DPO, NLL and the preference loss, whatever the cut."""
    logprobs, data = batch
    cut = draw.draw(st.integers(0, len(logprobs) // 2))
    rewards = logprobs.sum(-1, keepdim=True)
    for loss_fn, output in (
        (DPOLossFn(cfg), logprobs),
        (NLLLossFn(), logprobs),
        (PreferenceLossFn(), rewards),
    ):
        loss, grad, metrics = run(loss_fn, output, data)
        parts = [run(loss_fn, *part, **counts(data)) for part in split_pairs(output, data, cut)]
        assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-12)
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad)
        for name in metrics:
            assert sum(part[2][name] for part in parts) == pytest.approx(metrics[name], abs=1e-6)


@given(configs, st.integers(0, 999))
def test_masked_entries_do_not_matter(cfg, seed):
    """Not the masked tokens, masked rows, first mask column or last reference column."""
    logprobs, data = make_batch(seed=seed)
    other = {key: value.clone() for key, value in data.items()}
    off = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]) == 0
    noise = torch.where(off, -7.0, 0.0)
    other["reference_policy_logprobs"][:, :-1] += 2 * noise
    other["reference_policy_logprobs"][:, -1] = 123.0
    other["token_mask"][:, 0] = 1 - other["token_mask"][:, 0]
    for loss_fn in (DPOLossFn(cfg), NLLLossFn()):
        a, b = run(loss_fn, logprobs, data), run(loss_fn, logprobs + noise, other)
        assert a[0] == pytest.approx(b[0], abs=1e-9)
        torch.testing.assert_close(a[1], b[1])
        assert not a[1][off].any()
        assert a[2] == pytest.approx(b[2], abs=1e-6)


def test_sample_masks_that_differ_in_a_pair_or_are_weights():
    """NeMo RL's numbers for masks it does not expect: each row's own, and twice in the loss."""
    rewards = torch.tensor([1.0, 0.0, 2.0, 0.5])
    mask = torch.tensor([0.5, 1.0, 1.0, 0.0])
    _, metrics = PreferenceLossFn()(rewards, {"sample_mask": mask}, torch.tensor(2.0), None)
    first, second = (-math.log(sigmoid(delta)) for delta in (1.0, 1.5))
    assert metrics["loss"] == pytest.approx(0.5 * 0.5 * first + second)
    assert metrics["accuracy"] == pytest.approx(0.5 + 1)
    assert metrics["rewards_chosen_mean"] == pytest.approx(0.5 * 1 + 2)
    assert metrics["rewards_rejected_mean"] == pytest.approx(0.0)
    assert metrics["num_valid_samples"] == 1.25


@pytest.mark.parametrize("loss_fn", [DPOLossFn(DPOLossConfig()), NLLLossFn()])
def test_nan_under_a_mask_is_not_hidden(loss_fn):
    logprobs, data = make_batch()
    data["token_mask"][0, 1] = 0
    logprobs[0, 0] = float("nan")
    data["sample_mask"].fill_(1)
    assert math.isnan(run(loss_fn, logprobs, data)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("loss_fn", [DPOLossFn(DPOLossConfig(sft_loss_weight=0.1)), NLLLossFn()])
def test_dtypes(loss_fn, dtype):
    logprobs, data = make_batch(dtype=dtype)
    double = {key: value.double() for key, value in data.items()}
    loss, grad, _ = run(loss_fn, logprobs, data)
    assert grad.dtype == dtype
    assert loss == pytest.approx(run(loss_fn, logprobs.double(), double)[0], rel=0.02)


def test_plain_dict_and_batched_data_dict_give_the_same():
    logprobs, data = make_batch()
    for loss_fn in (DPOLossFn(DPOLossConfig(sft_loss_weight=0.1)), NLLLossFn()):
        a, b = run(loss_fn, logprobs, data), run(loss_fn, logprobs, BatchedDataDict(data))
        assert a[0] == b[0] and a[2] == b[2] and torch.equal(a[1], b[1])


def test_inputs_are_not_changed():
    logprobs, data = make_batch()
    before = {key: value.clone() for key, value in data.items()}
    run(DPOLossFn(DPOLossConfig(sft_loss_weight=0.1)), logprobs, data)
    assert data.keys() == before.keys()
    assert all(torch.equal(data[key], before[key]) for key in data)


def test_attributes():
    assert (NLLLossFn.loss_type, NLLLossFn.input_type) == (
        LossType.TOKEN_LEVEL,
        LossInputType.LOGPROB,
    )
    assert PreferenceLossFn.input_type is LossInputType.LOGIT
    assert DPOLossFn.input_type is LossInputType.LOGPROB
    assert DPOLossFn.loss_type is PreferenceLossFn.loss_type is LossType.SEQUENCE_LEVEL
    assert NLLLossFn().metric_normalizations == {
        "loss": MetricNormalizer.TOKENS,
        "num_unmasked_tokens": MetricNormalizer.NONE,
        "num_valid_samples": MetricNormalizer.NONE,
    }


def test_the_fused_flag_is_kept_and_changes_nothing():
    cfg = DPOLossConfig(sft_loss_weight=0.1)
    plain, fused = DPOLossFn(cfg), DPOLossFn(cfg, use_fused_linear_logprobs=True)
    assert not plain.use_fused_linear_logprobs and not plain.sft_loss.use_fused_linear_logprobs
    assert fused.use_fused_linear_logprobs and fused.sft_loss.use_fused_linear_logprobs
    assert run(plain, *make_batch())[2] == run(fused, *make_batch())[2]


def test_config_takes_other_fields_and_other_classes():
    assert DPOLossConfig(max_num_steps=3).max_num_steps == 3
    cfg = SimpleNamespace(**DPOLossConfig().model_dump())  # the protocol is attributes
    assert DPOLossFn(cfg).reference_policy_kl_penalty == 0.05


class TestHooks:
    """What a subclass overrides is what runs: NeMo RL's hook names, arguments and order."""

    def test_preference_loss(self):
        class Hinge(DPOLossFn):
            def _preference_loss(self, rewards, sample_mask, global_valid_seqs, beta=1.0):
                chosen, rejected = self.split_output_tensor(rewards)
                loss = (1 - beta * (chosen - rejected)).relu().sum() / (global_valid_seqs / 2)
                return loss, loss * 0 + 1, loss * 0 + 2, loss * 0 + 3

        logprobs, data = make_batch()
        data["sample_mask"].fill_(1)
        cfg = DPOLossConfig(reference_policy_kl_penalty=0.5)
        loss, _, metrics = run(Hinge(cfg), logprobs, data)
        difference = logprobs - data["reference_policy_logprobs"][:, :-1]
        ratios = (difference * data["token_mask"][:, 1:]).sum(-1)
        expected = (1 - 0.5 * (ratios[::2] - ratios[1::2])).clamp(min=0).mean().item()
        assert loss == pytest.approx(expected)
        assert metrics["accuracy"] == 1 and metrics["rewards_rejected_mean"] == 3

    def test_dpo_loss(self):
        class Constant(DPOLossFn):
            def _dpo_loss(self, next_token_logprobs, data, global_valid_seqs):
                four = 0 * next_token_logprobs.sum() + torch.tensor([1.0, 2.0, 3.0, 4.0])
                return tuple(four)

        cfg = DPOLossConfig(preference_loss_weight=10.0)
        _, _, metrics = run(Constant(cfg), *make_batch())
        names = ("preference_loss", "accuracy", "rewards_chosen_mean", "rewards_rejected_mean")
        assert [metrics[name] for name in names] == [1, 2, 3, 4]
        assert metrics["loss"] == 10

    def test_split_output_tensor(self):
        """Overridden, it decides which rows are chosen, for both terms."""

        class Swapped(DPOLossFn):
            def split_output_tensor(self, tensor):
                return tensor[1::2], tensor[::2]

        logprobs, data = make_batch()
        cfg = DPOLossConfig(sft_loss_weight=0.3)
        order = torch.arange(6).view(3, 2).flip(1).flatten()
        swapped = {key: value[order] for key, value in data.items()}
        a, b = run(Swapped(cfg), logprobs, data), run(DPOLossFn(cfg), logprobs[order], swapped)
        assert a[2] == pytest.approx(b[2])


DPO = DPOLossFn(DPOLossConfig())
DPO_SFT = DPOLossFn(DPOLossConfig(sft_loss_weight=0.1))
BAD_DATA = [
    (NLLLossFn(), "token_mask", None, KeyError, r"data has no 'token_mask', which NLLLossFn needs"),
    (NLLLossFn(), "sample_mask", None, KeyError, r"data has no 'sample_mask', which NLLLossFn"),
    (DPO, "token_mask", None, KeyError, r"data has no 'token_mask', which DPOLossFn needs"),
    (
        *(DPO, "reference_policy_logprobs", None, KeyError),
        r"no 'reference_policy_logprobs', which DPOLossFn needs; it has \['sample_mask', 'token_m",
    ),
    (
        *(NLLLossFn(), "token_mask", torch.ones(6, 5), ValueError),
        r"data\['token_mask'\] has shape \(6, 5\), expected \(B, S\) = \(6, 6\) because "
        r"next_token_logprobs is \(B, S-1\) = \(6, 5\)",
    ),
    (
        *(DPO, "reference_policy_logprobs", torch.ones(6, 5), ValueError),
        r"data\['reference_policy_logprobs'\] has shape \(6, 5\), expected \(B, S\) = \(6, 6\)",
    ),
    (
        *(DPO, "sample_mask", torch.ones(3), ValueError),
        r"data\['sample_mask'\] has shape \(3,\), expected \(B,\) = \(6,\)",
    ),
    (
        *(DPO, "sample_mask", torch.ones(6, 1), ValueError),
        r"data\['sample_mask'\] has shape \(6, 1\), expected \(B,\) = \(6,\)",
    ),
    (
        *(DPO, "sample_mask", [1] * 6, TypeError),
        r"data\['sample_mask'\] is a list, expected a tensor",
    ),
    (
        *(DPO, "reference_policy_logprobs", torch.ones(6, 6, dtype=torch.int64), TypeError),
        r"data\['reference_policy_logprobs'\] has dtype torch.int64, expected a floating dtype",
    ),
]


@pytest.mark.parametrize(("loss_fn", "key", "value", "error", "message"), BAD_DATA)
def test_bad_data(loss_fn, key, value, error, message):
    logprobs, data = make_batch()
    good = counts(data)
    del data[key]
    if value is not None:
        data[key] = value
    with pytest.raises(error, match=message):
        loss_fn(logprobs, data, **good)


BAD_OUTPUT = [
    (torch.ones(6, 5, dtype=torch.int64), TypeError, r"has dtype torch.int64, expected a floating"),
    ([[0.0]], TypeError, r"next_token_logprobs is a list, expected a floating tensor"),
    (torch.ones(6, 5, 9), ValueError, r"has shape \(6, 5, 9\), expected \(B, S-1\)"),
    (torch.ones(6), ValueError, r"next_token_logprobs has shape \(6,\), expected \(B, S-1\)"),
    (torch.ones(6, 6), ValueError, r"\['token_mask'\] has shape \(6, 6\), expected .* \(6, 7\)"),
]


@pytest.mark.parametrize(("output", "error", "message"), BAD_OUTPUT)
@pytest.mark.parametrize("loss_fn", [DPO, NLLLossFn()])
def test_bad_logprobs(loss_fn, output, error, message):
    _, data = make_batch()
    with pytest.raises(error, match=message):
        loss_fn(output, data, **counts(data))


def test_odd_rows():
    logprobs, data = make_batch()
    odd = {key: value[:5] for key, value in data.items()}
    with pytest.raises(ValueError, match=r"next_token_logprobs has 5 rows, expected an even numb"):
        DPO(logprobs[:5], odd, **counts(odd))
    with pytest.raises(ValueError, match=r"logits has 5 rows, expected an even number"):
        PreferenceLossFn()(torch.ones(5, 1), odd, torch.tensor(5.0), None)
    NLLLossFn()(logprobs[:5], odd, **counts(odd))  # rows are independent there


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.ones(6, 2), ValueError, r"logits has shape \(6, 2\), expected \(B, 1\) or \(B,\)"),
        (torch.tensor(1.0), ValueError, r"logits has shape \(\), expected \(B, 1\) or \(B,\)"),
        (torch.ones(6, 1, dtype=torch.int64), TypeError, r"logits has dtype torch.int64"),
        (
            torch.ones(4, 1),
            ValueError,
            r"data\['sample_mask'\] has shape \(6,\), expected .*\(4,\)",
        ),
    ],
)
def test_bad_rewards(logits, error, message):
    with pytest.raises(error, match=message):
        PreferenceLossFn()(logits, {"sample_mask": torch.ones(6)}, torch.tensor(6.0), None)


def test_missing_counts_and_configs():
    logprobs, data = make_batch()
    seqs = torch.tensor(6.0)
    with pytest.raises(ValueError, match=r"global_valid_seqs is None, expected the number"):
        DPO(logprobs, data, None, None)
    with pytest.raises(ValueError, match=r"global_valid_toks is None, .*sft_loss_weight is 0.1"):
        DPO_SFT(logprobs, data, seqs, None)
    with pytest.raises(ValueError, match=r"global_valid_toks is None, expected the number"):
        NLLLossFn()(logprobs, data, None, None)
    with pytest.raises(TypeError, match=r"cfg is a dict, expected a DPOLossConfig"):
        DPOLossFn({"reference_policy_kl_penalty": 0.1})
    DPO(logprobs, data, seqs, None)  # without the SFT term the token count is not needed
