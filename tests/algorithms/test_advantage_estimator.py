# SPDX-License-Identifier: Apache-2.0
"""Advantage estimators and group statistics: definitions in plain Python, GAE against its loop."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl_ref.algorithms._recurrence import discounted_suffix_sums, masked_gae
from nemo_rl_ref.algorithms.advantage_estimator import (
    AdvEstimatorConfig,
    GDPOAdvantageEstimator,
    GeneralizedAdvantageEstimator,
    GRPOAdvantageEstimator,
    OPDAdvantageEstimator,
    RawRewardAdvantageEstimator,
    ReinforcePlusPlusAdvantageEstimator,
)
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig
from nemo_rl_ref.algorithms.utils import (
    calculate_baseline_and_std_per_prompt,
    get_gdpo_reward_component_keys,
    mask_out_neg_inf_logprobs,
    masked_var,
)

PLAIN = ClippedPGLossConfig()
MASK_DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bool, torch.int64])


def make_groups(sizes=(4, 3, 1), length=5, seed=0, mask_dtype=torch.float64):
    """Shuffled responses to prompts of two tokens; rewards are multiples of 1/4."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)])
    group = group[torch.randperm(len(group), generator=generator)]
    rewards = torch.randint(0, 5, (len(group),), generator=generator).double() / 4
    rand = torch.rand(len(group), length, generator=generator)
    return {
        "prompt_ids": torch.stack([group * 0 + 7, group], 1),
        "rewards": rewards,
        "mask": (rand < 0.7).to(mask_dtype),
    }


groups = st.builds(
    make_groups,
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    length=st.integers(1, 5),
    seed=st.integers(0, 999),
    mask_dtype=MASK_DTYPES,
)


def others_of(i, batch, leave_one_out):
    """Rewards of the responses to the prompt of response i."""
    prompts, rewards = batch["prompt_ids"].tolist(), batch["rewards"].tolist()
    return [
        r
        for j, r in enumerate(rewards)
        if prompts[j] == prompts[i] and not (leave_one_out and j == i)
    ]


def statistics_of(i, batch, leave_one_out):
    """Baseline and standard deviation of response i, with the statistics module."""
    if len(others_of(i, batch, False)) == 1:
        return batch["rewards"][i].item(), 0.0
    others = others_of(i, batch, leave_one_out)
    return statistics.mean(others), statistics.stdev(others) if len(others) > 1 else 0.0


class TestGroupStatistics:
    @given(groups, st.booleans())
    def test_definition(self, batch, leave_one_out):
        rewards = batch["rewards"]
        baseline, std = calculate_baseline_and_std_per_prompt(
            batch["prompt_ids"], rewards, torch.ones_like(rewards), leave_one_out
        )
        expected = [statistics_of(i, batch, leave_one_out) for i in range(len(rewards))]
        assert baseline.tolist() == pytest.approx([mean for mean, _ in expected], abs=1e-12)
        # The variance is a difference of two means: 1e-16 becomes 1e-8 after the root.
        assert std.tolist() == pytest.approx([std for _, std in expected], abs=1e-7)

    def test_the_example_of_the_docstring(self):
        rewards = torch.tensor([1.0, 0, 0, 0])
        baseline, std = calculate_baseline_and_std_per_prompt(
            torch.zeros(4, 1), rewards, torch.ones(4)
        )
        assert baseline.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
        assert std.tolist() == pytest.approx([0] + [1 / math.sqrt(3)] * 3)

    def test_responses_that_do_not_count(self):
        """Without leaving one out they are as good as absent; the group of one is left alone."""
        prompts = torch.tensor([[1], [1], [1], [2], [2]])
        rewards = torch.tensor([1.0, 3.0, 100.0, 5.0, 7.0])
        valid = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
        baseline, std = calculate_baseline_and_std_per_prompt(prompts, rewards, valid, False)
        assert baseline.tolist() == [2, 2, 2, 5, 7]
        assert std.tolist() == pytest.approx([math.sqrt(2)] * 3 + [0, 0])
        # NeMo RL divides the sum of the two others by 1 for the response that does not count.
        baseline, std = calculate_baseline_and_std_per_prompt(prompts, rewards, valid, True)
        assert baseline.tolist() == [3, 1, 4, 5, 7]
        assert std.tolist() == [0, 0, 0, 0, 0]

    def test_standard_deviation_of_other_rewards(self):
        prompts, rewards = torch.zeros(3, 1), torch.tensor([1.0, 2, 3])
        raw = torch.tensor([0.0, 0, 6])
        baseline, std = calculate_baseline_and_std_per_prompt(
            prompts, rewards, torch.ones(3), False, std_rewards=raw
        )
        assert baseline.tolist() == [2, 2, 2]
        assert std.tolist() == pytest.approx([math.sqrt(12)] * 3)

    def test_inputs_are_not_changed_and_the_dtype_is_kept(self):
        for dtype in (torch.float32, torch.float64):
            rewards = torch.tensor([1.0, 2.0, 4.0], dtype=dtype)
            before = rewards.clone()
            result = calculate_baseline_and_std_per_prompt(
                torch.zeros(3, 1), rewards, rewards * 0 + 1
            )
            assert torch.equal(rewards, before) and {x.dtype for x in result} == {dtype}

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"prompts": torch.zeros(3)}, ValueError, r"prompts has shape \(3,\), expected \(B, P"),
            ({"prompts": torch.zeros(4, 1)}, ValueError, r"\(4, 1\), expected .* B = 3"),
            ({"rewards": torch.zeros(3, 1)}, ValueError, r"rewards has shape \(3, 1\), expected"),
            ({"rewards": torch.zeros(3).long()}, TypeError, "rewards has dtype torch.int64"),
            (
                {"std_rewards": torch.zeros(3).long()},
                TypeError,
                "std_rewards has dtype torch.int64",
            ),
            ({"valid_mask": torch.ones(2)}, ValueError, r"valid_mask has shape \(2,\), expected"),
            ({"std_rewards": torch.ones(2)}, ValueError, r"std_rewards has shape \(2,\), expected"),
        ],
    )
    def test_bad_input(self, change, error, message):
        good = {
            "prompts": torch.zeros(3, 1),
            "rewards": torch.zeros(3),
            "valid_mask": torch.ones(3),
        }
        with pytest.raises(error, match=message):
            calculate_baseline_and_std_per_prompt(**{**good, **change})


class TestSmallFunctions:
    def test_masked_var(self):
        values = torch.tensor([[1.0, 2.0, 50.0], [6.0, 50.0, 50.0]], dtype=torch.float64)
        mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        assert masked_var(values, mask).item() == pytest.approx(statistics.variance([1, 2, 6]))
        assert masked_var(values, mask, unbiased=False).item() == pytest.approx(
            statistics.pvariance([1, 2, 6])
        )
        about_2 = masked_var(values, mask, mean=2.0, unbiased=False).item()
        assert about_2 == pytest.approx((1 + 0 + 16) / 3)
        one = torch.tensor([1.0, 0.0])
        assert masked_var(torch.tensor([0.0, 1.0]), one).isnan()
        assert masked_var(torch.tensor([3.0, 1.0]), one * 0) == 0

    def test_mask_out_neg_inf_logprobs(self, capsys):
        inf = math.inf
        logprobs = torch.tensor([[-1.0, -inf, -inf, -2.0]], requires_grad=True)
        mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
        finite = mask_out_neg_inf_logprobs(logprobs, mask, "curr_logprobs")
        assert finite.tolist() == [[-1.0, 0.0, 0.0, 0.0]]
        assert "curr_logprobs: 1 of 2 unmasked tokens" in capsys.readouterr().out
        finite.sum().backward()
        assert logprobs.grad.tolist() == [[1.0, 0.0, 0.0, 0.0]]
        mask_out_neg_inf_logprobs(torch.tensor([-1.0, -inf]), torch.tensor([1, 0]), "x")
        assert capsys.readouterr().out == ""

    def test_reward_component_keys(self):
        batch = {"reward/b": 0, 3: 0, "rewards": 0, "reward/a": 0}
        assert get_gdpo_reward_component_keys(batch) == ["reward/a", "reward/b"]


class TestGRPO:
    @given(groups, st.booleans(), st.booleans())
    def test_definition(self, batch, leave_one_out, normalize):
        cfg = AdvEstimatorConfig(
            use_leave_one_out_baseline=leave_one_out, normalize_rewards=normalize
        )
        advantages = GRPOAdvantageEstimator(cfg, PLAIN).compute_advantage(**batch, anything=1)
        assert advantages.shape == batch["mask"].shape
        for i, row in enumerate(advantages.tolist()):
            mean, std = statistics_of(i, batch, leave_one_out)
            expected = batch["rewards"][i].item() - mean
            if normalize and std > 0:
                expected /= std + 1e-6
            assert row == pytest.approx([expected] * len(row), rel=1e-5, abs=1e-7)

    def test_leave_one_out_example(self):
        batch = {"prompt_ids": torch.zeros(4, 1), "rewards": torch.tensor([1.0, 0, 0, 0])}
        advantages = GRPOAdvantageEstimator(AdvEstimatorConfig(), PLAIN).compute_advantage(
            **batch, mask=torch.ones(4, 2)
        )
        assert advantages[:, 1].tolist() == pytest.approx(
            [1, -0.57735, -0.57735, -0.57735], abs=1e-5
        )

    def test_equal_rewards_teach_nothing(self):
        batch = {
            "prompt_ids": torch.zeros(4, 1),
            "rewards": torch.ones(4),
            "mask": torch.ones(4, 2),
        }
        estimator = GRPOAdvantageEstimator(AdvEstimatorConfig(), PLAIN)
        assert not estimator.compute_advantage(**batch).any()

    def test_bad_input(self):
        estimator = GRPOAdvantageEstimator(AdvEstimatorConfig(), PLAIN)
        with pytest.raises(ValueError, match=r"mask has shape \(3,\), expected \(B, S\)"):
            estimator.compute_advantage(torch.zeros(3, 1), torch.zeros(3), torch.ones(3))
        with pytest.raises(ValueError, match=r"rewards has shape \(2,\), expected \(B,\) = \(3,\)"):
            estimator.compute_advantage(torch.zeros(3, 1), torch.zeros(2), torch.ones(3, 4))
        with pytest.raises(TypeError, match="rewards has dtype torch.int64"):
            estimator.compute_advantage(torch.zeros(3, 1), torch.zeros(3).long(), torch.ones(3, 4))


class TestGDPO:
    @given(groups, st.booleans(), st.sampled_from([None, [0.3, 1.7]]))
    def test_definition(self, batch, normalize, weights):
        cfg = AdvEstimatorConfig(normalize_rewards=normalize, reward_weights=weights)
        components = {
            "reward/b": batch["rewards"],
            "reward/a": batch["rewards"].flip(0) ** 2,
            "input_ids": None,
        }
        batch["rewards"] = None
        advantages = GDPOAdvantageEstimator(cfg, PLAIN).compute_advantage(
            **batch, repeated_batch=components
        )
        a, b = (
            GRPOAdvantageEstimator(cfg, PLAIN)
            .compute_advantage(**{**batch, "rewards": components[key]})[:, 0]
            .tolist()
            for key in ("reward/a", "reward/b")
        )
        w = weights or [1.0, 1.0]
        total = [w[0] * x + w[1] * y for x, y in zip(a, b, strict=True)]
        mean = statistics.mean(total)
        std = statistics.stdev(total) if len(total) > 1 else 0.0
        expected = [(x - mean) / std if std > 1e-9 else x - mean for x in total]
        if std > 1e-9 or len(total) == 1:
            assert advantages[:, -1].tolist() == pytest.approx(expected, abs=1e-6)
        assert advantages.shape == batch["mask"].shape

    def test_without_variation_it_does_not_divide(self):
        rewards = torch.ones(3)
        batch = {"reward/a": rewards, "reward/b": rewards}
        advantages = GDPOAdvantageEstimator(AdvEstimatorConfig(), PLAIN).compute_advantage(
            torch.zeros(3, 1), None, torch.ones(3, 2), repeated_batch=batch
        )
        assert advantages.tolist() == [[0, 0]] * 3

    def test_bad_input(self):
        cfg = AdvEstimatorConfig(reward_weights=[1.0])
        rewards, mask, prompts = torch.zeros(3), torch.ones(3, 2), torch.zeros(3, 1)
        estimator = GDPOAdvantageEstimator(cfg, PLAIN)
        with pytest.raises(ValueError, match=r"components \['reward/a'\], expected two or more"):
            estimator.compute_advantage(prompts, None, mask, {"reward/a": rewards})
        two = {"reward/a": rewards, "reward/b": rewards}
        with pytest.raises(ValueError, match=r"reward_weights has 1 entries, expected 2, one for"):
            estimator.compute_advantage(prompts, None, mask, two)
        with pytest.raises(TypeError, match="has dtype torch.int64"):
            GDPOAdvantageEstimator(AdvEstimatorConfig(), PLAIN).compute_advantage(
                prompts, None, mask, {**two, "reward/b": rewards.long()}
            )


def normalized(values, mask):
    """In plain Python: population statistics of the unmasked values, variance at least 1e-8."""
    valid = [
        v
        for row, on in zip(values, mask.tolist(), strict=True)
        for v, m in zip(row, on, strict=True)
        if m
    ]
    mean = sum(valid) / len(valid)
    variance = max(sum((v - mean) ** 2 for v in valid) / len(valid), 1e-8)
    return [[(v - mean) / math.sqrt(variance) for v in row] for row in values]


class TestReinforcePlusPlus:
    @given(groups, st.booleans(), st.booleans(), st.sampled_from(["k1", "k2", "k3"]))
    def test_definition(self, batch, minus_baseline, kl_in_reward, kind):
        batch["mask"][0, 0] = 1
        generator = torch.Generator().manual_seed(1)
        shape = batch["mask"].shape
        policy, reference = -torch.rand(2, *shape, generator=generator, dtype=torch.float64)
        loss_cfg = ClippedPGLossConfig(
            use_kl_in_reward=kl_in_reward,
            reference_policy_kl_penalty=0.3,
            reference_policy_kl_type=kind,
        )
        advantages = ReinforcePlusPlusAdvantageEstimator(
            AdvEstimatorConfig(minus_baseline=minus_baseline), loss_cfg
        ).compute_advantage(**batch, logprobs_policy=policy, logprobs_reference=reference)
        raw = []
        for i in range(shape[0]):
            reward = batch["rewards"][i].item()
            if minus_baseline:
                reward -= statistics.mean(others_of(i, batch, False))
            row = []
            for t in range(shape[1]):
                r = (reference[i, t] - policy[i, t]).item()
                kl = {"k1": -r, "k2": r * r / 2, "k3": math.exp(r) - 1 - r}[kind]
                row.append(reward - 0.3 * kl if kl_in_reward else reward)
            raw.append(row)
        expected = torch.tensor(normalized(raw, batch["mask"]), dtype=torch.float64)
        torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-6)

    def test_kl_needs_log_probabilities(self):
        loss_cfg = ClippedPGLossConfig(use_kl_in_reward=True)
        estimator = ReinforcePlusPlusAdvantageEstimator(AdvEstimatorConfig(), loss_cfg)
        batch, logprobs = make_groups(), torch.zeros(8, 5)
        with pytest.raises(
            ValueError, match="logprobs_policy is None, expected .*use_kl_in_reward"
        ):
            estimator.compute_advantage(**batch)
        with pytest.raises(ValueError, match="logprobs_reference is None, expected"):
            estimator.compute_advantage(**batch, logprobs_policy=logprobs)
        with pytest.raises(ValueError, match=r"logprobs_policy has shape \(8, 4\), expected that"):
            estimator.compute_advantage(
                **batch, logprobs_policy=logprobs[:, 1:], logprobs_reference=logprobs
            )
        off = ClippedPGLossConfig(use_kl_in_reward=True, reference_policy_kl_penalty=0.0)
        ReinforcePlusPlusAdvantageEstimator(AdvEstimatorConfig(), off).compute_advantage(**batch)


class TestRawReward:
    @given(groups, st.booleans())
    def test_definition(self, batch, normalize):
        batch["mask"][0, 0] = 1
        estimator = RawRewardAdvantageEstimator({"normalize_advantages": normalize}, PLAIN)
        advantages, returns = estimator.compute_advantage(**batch)
        expected = [[r] * batch["mask"].shape[1] for r in batch["rewards"].tolist()]
        if normalize:
            expected = normalized(expected, batch["mask"])
        torch.testing.assert_close(
            advantages, torch.tensor(expected).double(), rtol=1e-6, atol=1e-6
        )
        assert returns is None

    def test_all_masked_is_finite(self):
        estimator = RawRewardAdvantageEstimator({"normalize_advantages": True}, PLAIN)
        advantages, _ = estimator.compute_advantage(None, torch.ones(2), torch.zeros(2, 3))
        assert advantages.isfinite().all()

    def test_bad_config(self):
        with pytest.raises(
            KeyError, match="no 'normalize_advantages', which RawRewardAdvantageEst"
        ):
            RawRewardAdvantageEstimator({}, PLAIN)
        with pytest.raises(
            TypeError, match="estimator_config is a AdvEstimatorConfig, expected a d"
        ):
            RawRewardAdvantageEstimator(AdvEstimatorConfig(), PLAIN)


class TestOPD:
    def test_definition_and_metrics(self):
        teacher = torch.tensor([[-1.0, -2.0, -9.0]], requires_grad=True)
        student, mask = torch.tensor([[-1.5, -1.0, -1.0]]), torch.tensor([[1.0, 1.0, 0.0]])
        estimator = OPDAdvantageEstimator({}, {})
        assert estimator.last_metrics == {}
        advantages = estimator.compute_advantage(None, None, mask, teacher, student)
        assert advantages.tolist() == [[0.5, -1.0, 0.0]] and not advantages.requires_grad
        prefix = "on_policy_distillation/"
        assert estimator.last_metrics == pytest.approx(
            {
                f"{prefix}teacher_student_logprob_gap_mean": -0.25,
                f"{prefix}adv_mean": -0.25,
                f"{prefix}adv_std": statistics.stdev([0.5, -1.0]),
            }
        )

    def test_mean_is_minus_the_reverse_kl(self):
        """Over all tokens of a small vocabulary, weighted by the student."""
        student, teacher = torch.randn(
            2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ).log_softmax(-1)
        advantages = OPDAdvantageEstimator({}, {}).compute_advantage(
            None, None, torch.ones(1, 6), teacher[None], student[None]
        )
        kl = (student.exp() * (student - teacher)).sum()
        torch.testing.assert_close((student.exp() * advantages[0]).sum(), -kl)

    @pytest.mark.parametrize("unmasked", [0, 1])
    def test_metrics_of_too_few_tokens_are_0(self, unmasked):
        mask, logprobs = torch.zeros(1, 2), torch.zeros(1, 2)
        mask[0, :unmasked] = 1
        estimator = OPDAdvantageEstimator({}, {})
        estimator.compute_advantage(None, None, mask, logprobs + 0.5, logprobs)
        assert list(estimator.last_metrics.values()) == [0.5 * unmasked] * 2 + [0.0]

    def test_bad_input(self):
        estimator, x = OPDAdvantageEstimator({}, {}), torch.zeros(1, 2)
        with pytest.raises(ValueError, match="teacher_logprobs is None, expected"):
            estimator.compute_advantage(None, None, x, None, x)
        with pytest.raises(ValueError, match="prev_logprobs is None, expected"):
            estimator.compute_advantage(None, None, x, x, None)
        with pytest.raises(ValueError, match=r"prev_logprobs has shape \(1, 1\), expected that of"):
            estimator.compute_advantage(None, None, x, x, x[:, :1])


# GAE


def gae_config(**changes):
    return {
        "gae_lambda": 0.95,
        "gae_gamma": 0.99,
        "normalize_advantages": False,
        "gae_lambda_value": None,
        "gae_lambda_policy": None,
        "length_adaptive_alpha": 0.0,
        **changes,
    }


def make_episodes(rows=3, length=8, seed=0, dtype=torch.float64, mask_dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "prompt_ids": None,
        "rewards": randn(rows),
        "mask": (randn(rows, length) > -0.4).to(mask_dtype),
        "values": randn(rows, length),
    }


episodes = st.builds(
    make_episodes,
    rows=st.integers(0, 4),
    length=st.integers(1, 20),
    seed=st.integers(0, 999),
    mask_dtype=MASK_DTYPES,
)


def gae_in_plain_python(rewards, values, mask, gamma, lam):
    """The sum of (γλ)^l δ over the unmasked tokens of one row, in two loops and no recurrence."""
    valid = [t for t, on in enumerate(mask) if on]
    v = [values[t] for t in valid] + [0.0]
    delta = [rewards[t] + gamma * v[k + 1] - v[k] for k, t in enumerate(valid)]
    return {
        t: sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, len(valid)))
        for k, t in enumerate(valid)
    }


def gae_loop(rewards, values, mask, gamma, lam):
    """The recurrence, one time step after the other; masked tokens keep what is carried."""
    next_value = torch.zeros_like(values[:, 0])
    carried = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(values.shape[1])):
        on = mask[:, t].bool()
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = torch.where(on, delta + gamma * lam * carried, carried)
        next_value = torch.where(on, values[:, t], next_value)
        columns.insert(0, carried)
    return torch.stack(columns, 1)


class TestGAE:
    @given(
        episodes,
        st.sampled_from([0.0, 0.5, 0.99, 1.0]),
        st.sampled_from([0.0, 0.01, 0.95, 1.0]),
        st.sampled_from([None, "k1", "k3"]),
    )
    def test_definition(self, batch, gamma, lam, kind):
        loss_cfg = ClippedPGLossConfig(
            use_kl_in_reward=kind is not None,
            reference_policy_kl_penalty=0.2,
            reference_policy_kl_type=kind or "k3",
        )
        generator = torch.Generator().manual_seed(1)
        shape = batch["mask"].shape
        logp, ref = -torch.rand(2, *shape, generator=generator, dtype=torch.float64)
        cfg = gae_config(gae_gamma=gamma, gae_lambda=lam)
        advantages, returns = GeneralizedAdvantageEstimator(cfg, loss_cfg).compute_advantage(
            **batch, logprobs=logp, reference_logprobs=ref
        )
        for i, mask in enumerate(batch["mask"].tolist()):
            rewards = [0.0] * shape[1]
            if kind is not None:
                r = (ref[i] - logp[i]).tolist()
                rewards = [-0.2 * (-x if kind == "k1" else math.exp(x) - 1 - x) for x in r]
            valid = [t for t, on in enumerate(mask) if on]
            if valid:
                rewards[valid[-1]] += batch["rewards"][i].item()
            values = batch["values"][i].tolist()
            expected = gae_in_plain_python(rewards, values, mask, gamma, lam)
            for t, on in enumerate(mask):
                if on:
                    assert advantages[i, t].item() == pytest.approx(expected[t], abs=1e-10)
                    assert returns[i, t].item() == pytest.approx(expected[t] + values[t], abs=1e-10)
                else:  # the return carries the advantage of the next unmasked token
                    later = [u for u in valid if u > t]
                    carried = expected[later[0]] if later else 0.0
                    assert advantages[i, t] == 0
                    assert returns[i, t].item() == pytest.approx(carried + values[t], abs=1e-10)

    def test_lambda_1_is_the_reward_minus_the_value(self):
        batch = make_episodes()
        cfg = gae_config(gae_gamma=1.0, gae_lambda=1.0)
        advantages, _ = GeneralizedAdvantageEstimator(cfg, PLAIN).compute_advantage(**batch)
        expected = (batch["rewards"][:, None] - batch["values"]) * batch["mask"]
        torch.testing.assert_close(advantages, expected)

    def test_whitening(self):
        batch = make_episodes()
        plain, returns = GeneralizedAdvantageEstimator(gae_config(), PLAIN).compute_advantage(
            **batch
        )
        cfg = gae_config(normalize_advantages=True)
        white, same_returns = GeneralizedAdvantageEstimator(cfg, PLAIN).compute_advantage(**batch)
        valid = plain[batch["mask"].bool()].tolist()
        mean, std = statistics.mean(valid), statistics.stdev(valid)
        expected = [(v - mean) / std for v in valid]
        assert white[batch["mask"].bool()].tolist() == pytest.approx(expected, rel=1e-6)
        assert torch.equal(returns, same_returns)
        assert not white[~batch["mask"].bool()].any()

    @pytest.mark.parametrize(
        ("changes", "of_value", "of_policy"),
        [
            ({}, 0.95, 0.95),
            ({"gae_lambda_value": 1.0}, 1.0, 0.95),
            ({"gae_lambda_policy": 0.5}, 0.95, 0.5),
            ({"gae_lambda_value": 1.0, "gae_lambda_policy": 0.5}, 1.0, 0.5),
            ({"gae_lambda_value": 1.0, "length_adaptive_alpha": 0.5}, 1.0, None),
            ({"gae_lambda_policy": 0.3, "length_adaptive_alpha": 0.5}, 0.95, None),
        ],
    )
    def test_vapo(self, changes, of_value, of_policy):
        """Returns with one λ, advantages with another or with 1 - 1/(α l) for length l."""
        batch = make_episodes(rows=4)
        batch["mask"][0] = 0
        batch["mask"][0, 3] = 1  # α l = 1/2: λ = 0 and not -1
        advantages, returns = GeneralizedAdvantageEstimator(
            gae_config(**changes), PLAIN
        ).compute_advantage(**batch)
        for i, mask in enumerate(batch["mask"].tolist()):
            valid = [t for t, on in enumerate(mask) if on]
            rewards = [0.0] * len(mask)
            rewards[valid[-1]] = batch["rewards"][i].item()
            values = batch["values"][i].tolist()
            adaptive = 1 - 1 / max(0.5 * len(valid), 1)
            lam = adaptive if of_policy is None else of_policy
            expected = gae_in_plain_python(rewards, values, mask, 0.99, lam)
            targets = gae_in_plain_python(rewards, values, mask, 0.99, of_value)
            for t in valid:
                assert advantages[i, t].item() == pytest.approx(expected[t], rel=1e-6, abs=1e-6)
                assert returns[i, t].item() == pytest.approx(targets[t] + values[t], abs=1e-10)

    @pytest.mark.parametrize(
        ("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.9999, 0.9999), (0.5, 0.01), (1.0, 0.0)]
    )
    def test_long_rows_against_the_loop(self, gamma, lam):
        """Length 2048, holes in the mask; the loop's own float32 result is wrong by up to 1e-4."""
        batch = make_episodes(rows=4, length=2048)
        rewards = torch.where(batch["mask"] > 0, 0.01 * batch["values"].roll(1), 0)
        arguments = (rewards, batch["values"], batch["mask"])
        exact = gae_loop(*arguments, gamma, lam)
        torch.testing.assert_close(
            masked_gae(*arguments, gamma, lam), exact, rtol=1e-10, atol=1e-10
        )
        single = masked_gae(*(x.float() for x in arguments), gamma, lam)
        torch.testing.assert_close(single.double(), exact, rtol=1e-6, atol=1e-6)

    @given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
    def test_discounted_suffix_sums(self, length, decay, seed):
        x = torch.randn(2, length, generator=torch.Generator().manual_seed(seed)).double()
        before = x.clone()
        y = discounted_suffix_sums(x, torch.tensor([[decay], [0.5]]).double())
        expected, carried = [], torch.zeros(2).double()
        for t in reversed(range(length)):
            carried = x[:, t] + torch.tensor([decay, 0.5]).double() * carried
            expected.insert(0, carried)
        torch.testing.assert_close(y, torch.stack(expected, 1), rtol=1e-10, atol=1e-10)
        assert torch.equal(x, before)

    @given(episodes)
    def test_masked_entries_do_not_matter(self, batch):
        """Not even NaN: at unmasked tokens everything is as before."""
        on = batch["mask"].bool()
        other = {**batch, "values": batch["values"].masked_fill(~on, math.nan)}
        garbage = torch.zeros_like(batch["values"]).masked_fill(~on, math.nan)
        loss_cfg = ClippedPGLossConfig(use_kl_in_reward=True)
        estimator = GeneralizedAdvantageEstimator(gae_config(), loss_cfg)
        zeros = torch.zeros_like(garbage)
        a = estimator.compute_advantage(**batch, logprobs=zeros, reference_logprobs=zeros)
        b = estimator.compute_advantage(**other, logprobs=garbage, reference_logprobs=zeros)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1][on], b[1][on])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_dtypes(self, dtype):
        batch = make_episodes(dtype=dtype)
        double = {**batch, **{k: batch[k].double() for k in ("rewards", "values")}}
        estimator = GeneralizedAdvantageEstimator(gae_config(), PLAIN)
        advantages, returns = estimator.compute_advantage(**batch)
        assert advantages.dtype == returns.dtype == dtype
        exact = estimator.compute_advantage(**double)[0]
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(advantages.double(), exact, rtol=tolerance, atol=tolerance)

    def test_inputs_are_not_changed(self):
        batch = make_episodes()
        before = {key: value.clone() for key, value in batch.items() if value is not None}
        cfg = gae_config(normalize_advantages=True, length_adaptive_alpha=0.05)
        GeneralizedAdvantageEstimator(cfg, PLAIN).compute_advantage(**batch)
        assert all(torch.equal(batch[key], before[key]) for key in before)

    @pytest.mark.parametrize("key", gae_config())
    def test_missing_key(self, key):
        cfg = gae_config()
        del cfg[key]
        with pytest.raises(
            KeyError, match=f"no {key!r}, which GeneralizedAdvantageEstimator needs"
        ):
            GeneralizedAdvantageEstimator(cfg, PLAIN)

    def test_bad_input(self):
        batch = make_episodes()
        estimator = GeneralizedAdvantageEstimator(gae_config(), PLAIN)
        with pytest.raises(ValueError, match=r"values has shape \(3, 7\), expected that of mask"):
            estimator.compute_advantage(**{**batch, "values": batch["values"][:, 1:]})
        with pytest.raises(ValueError, match=r"rewards has shape \(2,\), expected \(B,\) = \(3,\)"):
            estimator.compute_advantage(**{**batch, "rewards": batch["rewards"][1:]})
        with_kl = GeneralizedAdvantageEstimator(
            gae_config(), ClippedPGLossConfig(use_kl_in_reward=True)
        )
        with pytest.raises(
            ValueError, match="reference_logprobs is None, expected .*use_kl_in_rew"
        ):
            with_kl.compute_advantage(**batch, logprobs=batch["values"])
