# SPDX-License-Identifier: Apache-2.0
"""Clipped policy gradient: its definition in plain Python, the gradient of each mode, bad input."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl_ref.algorithms.loss import _policy_gradient as pg
from nemo_rl_ref.algorithms.loss.interfaces import LossInputType, LossType, MetricNormalizer
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict

MASK_DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bool, torch.int64])
POLICIES = ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs")


def make_batch(rows=3, length=6, seed=0, dtype=torch.float64, mask_dtype=torch.float32, spread=0.5):
    """Log-probabilities (B, S-1) of four policies not far from each other, and the rest of data."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logprobs = -0.01 - 4 * rand(rows, length - 1)
    data = {
        "token_mask": (rand(rows, length) < 0.7).to(mask_dtype),
        "sample_mask": (rand(rows) < 0.8).to(mask_dtype),
        "advantages": randn(rows, length).to(dtype),
        "rewards": randn(rows).to(dtype),
    }
    for key in POLICIES:
        others = (logprobs + spread * randn(rows, length - 1)).clamp(max=-1e-3)
        data[key] = torch.cat([randn(rows, 1), others], 1).to(dtype)
    return logprobs.to(dtype), data


def counts(data):
    """The global counts if this batch is the global batch."""
    sample_mask = data["sample_mask"].double()
    tokens = data["token_mask"][:, 1:].double() * sample_mask[:, None]
    return {"global_valid_seqs": sample_mask.sum(), "global_valid_toks": tokens.sum()}


def run(cfg, logprobs, data, **overrides):
    """Loss as a float, gradient and metrics."""
    loss_fn = ClippedPGLossFn(cfg)
    logprobs = logprobs.detach().clone().requires_grad_()
    loss, metrics = loss_fn(logprobs, data, **{**counts(data), **overrides})
    loss.backward()
    return loss.item(), logprobs.grad, metrics


def config(**flags):
    """No KL unless asked for."""
    return ClippedPGLossConfig(**{"reference_policy_kl_penalty": 0.0, **flags})


def one_token(logprob, *, advantage=1.0, prev=None, generation=None, reference=None):
    """A batch with a single token."""

    def stored(value):
        value = logprob if value is None else value
        return torch.tensor([[9.0, value]], dtype=torch.float64)

    data = {
        "token_mask": torch.ones(1, 2),
        "sample_mask": torch.ones(1),
        "advantages": stored(advantage),
        "prev_logprobs": stored(prev),
        "generation_logprobs": stored(generation),
        "reference_policy_logprobs": stored(reference),
    }
    return torch.tensor([[logprob]], dtype=torch.float64), data


# The definition, in plain Python, token by token


def clip(value, low, high):
    return min(max(value, low), high)


def kl_in_plain_python(kind, logp, ref, clamp=None):
    r = ref - logp
    if clamp is not None:
        r = clip(r, -clamp, clamp)
    return {"k1": -r, "k2": r * r / 2, "k3": math.exp(r) - 1 - r}[kind]


def definition(cfg, logprobs, data):
    """Loss and metrics. Every token of every row is visited; masked ones are skipped."""
    rows, steps = logprobs.shape
    logp = logprobs.tolist()
    stored = {key: data[key][:, 1:].tolist() for key in (*POLICIES, "advantages", "token_mask")}
    prev = logp if cfg.force_on_policy_ratio else stored["prev_logprobs"]
    gen, ref, adv = (
        stored[key] for key in ("generation_logprobs", "reference_policy_logprobs", "advantages")
    )
    kept_rows = [i for i in range(rows) if data["sample_mask"][i]]
    kept = {i: [t for t in range(steps) if stored["token_mask"][i][t]] for i in range(rows)}
    tokens = [(i, t) for i in kept_rows for t in kept[i]]

    def over_tokens(f):
        return sum(f(i, t) for i, t in tokens) / max(len(tokens), 1)

    def over_rows(f):
        return sum(f(i) for i in kept_rows) / max(len(kept_rows), 1)

    def reduce(f):
        if cfg.token_level_loss:
            return over_tokens(f)
        return over_rows(lambda i: sum(f(i, t) for t in kept[i]) / max(len(kept[i]), 1))

    def ratio(i, t):
        if cfg.force_on_policy_ratio:
            return 1.0
        if cfg.disable_ppo_ratio:
            return logp[i][t]
        if cfg.sequence_level_importance_ratios:
            product = math.prod(math.exp(logp[i][u] - prev[i][u]) for u in kept[i])
            return product ** (1 / max(len(kept[i]), 1))
        return math.exp(logp[i][t] - prev[i][t])

    def clipped(i, t):
        if cfg.force_on_policy_ratio or cfg.disable_ppo_ratio:
            return ratio(i, t)
        return clip(ratio(i, t), 1 - cfg.ratio_clip_min, 1 + cfg.ratio_clip_max)

    def surrogate(i, t):
        a = adv[i][t]
        if cfg.use_cispo:
            return -clipped(i, t) * a * logp[i][t]
        objective = min(ratio(i, t) * a, clipped(i, t) * a)
        if cfg.ratio_clip_c is not None and a < 0:
            objective = max(objective, cfg.ratio_clip_c * a)
        return -objective

    kind = cfg.truncated_importance_sampling_type
    low = cfg.truncated_importance_sampling_ratio_min or 0.0
    high = cfg.truncated_importance_sampling_ratio

    def raw_weight(i, t):
        if cfg.sequence_level_importance_ratios:
            if i not in kept_rows:
                return 1.0
            return math.prod(math.exp(prev[i][u] - gen[i][u]) for u in kept[i])
        return math.exp(prev[i][t] - gen[i][t])

    def geometric_mean(i):
        logs = [prev[i][u] - gen[i][u] for u in kept[i]]
        return math.exp(sum(logs) / max(len(logs), 1))

    def weight(i, t):
        w = raw_weight(i, t)
        if kind == "tis":
            return clip(w, low, high)
        if kind == "icepop":
            return w if low <= w <= high else 0.0
        if kind == "seq-mask-tis":
            return w if low <= geometric_mean(i) <= high else 0.0
        return w

    def weighted(i, t):
        used = weight(i, t) if cfg.use_importance_sampling_correction else 1.0
        return used * surrogate(i, t)

    def kl(i, t):
        w = 1.0
        if cfg.use_on_policy_kl_approximation:
            w = math.exp(logp[i][t] - gen[i][t])
        value = w * kl_in_plain_python(
            cfg.reference_policy_kl_type, logp[i][t], ref[i][t], cfg.kl_input_clamp_value
        )
        bound = cfg.kl_output_clamp_value
        return value if bound is None else clip(value, -bound, bound)

    beta = 0.0 if cfg.use_kl_in_reward else cfg.reference_policy_kl_penalty
    kl_mean = reduce(kl) if beta else 0.0
    right = [(i, t) for i, t in tokens if data["rewards"][i] > 0]
    nll = 0.0
    if cfg.positive_example_nll_weight and right:
        nll = sum(-logp[i][t] for i, t in right) / len(right)
    loss = reduce(weighted) + beta * kl_mean + cfg.positive_example_nll_weight * nll

    def mixture(i, t):
        return (math.exp(prev[i][t]) + math.exp(gen[i][t])) / 2

    def k3(p, q):
        return p / q - 1 - math.log(p / q)

    def js(i, t):
        m = mixture(i, t)
        return (k3(math.exp(prev[i][t]), m) + k3(math.exp(gen[i][t]), m)) / 2

    kl_type = cfg.reference_policy_kl_type
    ratios, clips = ([f(i, t) for i, t in tokens] for f in (ratio, clipped))
    metrics = {
        "loss": loss,
        "kl_penalty": kl_mean,
        "probs_ratio": over_tokens(ratio),
        "probs_ratio_min": min(ratios, default=math.inf),
        "probs_ratio_max": max(ratios, default=-math.inf),
        "probs_ratio_clamped": over_tokens(clipped),
        "probs_ratio_clamped_min": min(clips, default=math.inf),
        "probs_ratio_clamped_max": max(clips, default=-math.inf),
        "token_mult_prob_error": over_tokens(lambda i, t: math.exp(abs(prev[i][t] - gen[i][t]))),
        "gen_kl_error": over_tokens(
            lambda i, t: kl_in_plain_python(kl_type, gen[i][t], prev[i][t])
        ),
        "policy_kl_error": over_tokens(
            lambda i, t: kl_in_plain_python(kl_type, prev[i][t], gen[i][t])
        ),
        "js_divergence_error": over_tokens(js),
        "sampling_importance_ratio": over_tokens(weight),
        "approx_entropy": over_tokens(lambda i, t: -math.exp(logp[i][t] - gen[i][t]) * logp[i][t]),
        "positive_nll_loss": nll,
        "num_valid_samples": len(kept_rows),
    }
    if cfg.sequence_level_importance_ratios:  # NeMo RL's product of (B, 1) and (B,)
        everything = sum(weight(i, 0) for i in range(rows))
        metrics["sampling_importance_ratio"] = everything if kept_rows else 0.0
    if kind == "seq-mask-tis":
        metrics["is_oob_ratio"] = over_rows(lambda i: not low <= geometric_mean(i) <= high)
    elif kind:
        metrics["is_oob_ratio"] = over_tokens(lambda i, t: not low <= raw_weight(i, t) <= high)
    return metrics


@st.composite
def configs(draw):
    """Any legal combination of flags."""

    def pick(*values):
        return draw(st.sampled_from(values))

    flags = {
        "reference_policy_kl_penalty": pick(0.0, 0.3),
        "reference_policy_kl_type": pick("k1", "k2", "k3"),
        "kl_input_clamp_value": pick(None, 0.3),
        "kl_output_clamp_value": pick(None, 0.05),
        "use_on_policy_kl_approximation": pick(False, True),
        "use_kl_in_reward": pick(False, False, True),
        "ratio_clip_max": pick(0.2, 0.28),
        "use_importance_sampling_correction": pick(False, True),
        "positive_example_nll_weight": pick(0.0, 0.1),
    }
    mode = pick("token", "sequence", "gspo", "reinforce", "cispo", "dual", "on policy")
    flags |= {
        "token": {},
        "sequence": {"token_level_loss": False},
        "gspo": {"token_level_loss": False, "sequence_level_importance_ratios": True},
        "reinforce": {"disable_ppo_ratio": True, "token_level_loss": pick(False, True)},
        "cispo": {"use_cispo": True},
        "dual": {"ratio_clip_c": 1.3, "token_level_loss": pick(False, True)},
        "on policy": {"force_on_policy_ratio": True},
    }[mode]
    if flags["use_importance_sampling_correction"]:
        kind = pick(None, "tis", "icepop", *(() if mode == "gspo" else ("seq-mask-tis",)))
        flags["truncated_importance_sampling_type"] = kind
        if kind:
            flags["truncated_importance_sampling_ratio"] = 1.3
            low = pick(0.7, 0.7, None) if kind == "tis" else 0.7
            flags["truncated_importance_sampling_ratio_min"] = low
    return ClippedPGLossConfig(**flags)


batches = st.builds(
    make_batch,
    rows=st.integers(0, 4),
    length=st.integers(1, 7),
    seed=st.integers(0, 999),
    mask_dtype=MASK_DTYPES,
)


class TestDefinition:
    @settings(max_examples=300)  # there are many combinations
    @given(configs(), batches)
    def test_loss_and_metrics(self, cfg, batch):
        loss, _, metrics = run(cfg, *batch)
        assert metrics == pytest.approx(definition(cfg, *batch), rel=1e-5, abs=1e-6)
        assert loss == metrics["loss"]

    @given(configs(), batches)
    def test_metrics_and_normalizations_name_the_same(self, cfg, batch):
        metrics = run(cfg, *batch)[2]
        assert metrics.keys() == ClippedPGLossFn(cfg).metric_normalizations.keys()
        assert all(type(value) in (float, int) for value in metrics.values())

    @given(configs(), st.integers(0, 99))
    def test_gradient_by_finite_differences(self, cfg, seed):
        """Of the definition, where the loss holds nothing fixed: no CISPO, no weight π/sg(π)."""
        cfg = cfg.model_copy(
            update={
                "use_cispo": False,
                "force_on_policy_ratio": False,
                "use_on_policy_kl_approximation": True,
            }
        )
        logprobs, data = make_batch(rows=2, length=4, seed=seed)
        # An input clamp stops the gradient of the weight too, which the value does not show.
        cfg = cfg.model_copy(update={"kl_input_clamp_value": None})
        _, grad, _ = run(cfg, logprobs, data)
        h = 1e-6
        for i in range(2):
            for t in range(3):
                up, down = logprobs.clone(), logprobs.clone()
                up[i, t] += h
                down[i, t] -= h
                slope = definition(cfg, up, data)["loss"] - definition(cfg, down, data)["loss"]
                assert grad[i, t].item() == pytest.approx(slope / (2 * h), rel=1e-5, abs=1e-6)


class TestRatioAndSurrogate:
    @pytest.mark.parametrize(
        ("ratio", "advantage", "gradient"),
        [
            (1.1, 2.0, -1.1 * 2),  # inside: -A times the ratio
            (0.9, -2.0, 0.9 * 2),
            (1.3, 2.0, 0.0),  # too high, and the advantage wants it higher
            (0.7, -2.0, 0.0),  # too low, and the advantage wants it lower
            (1.3, -2.0, 1.3 * 2),  # outside, but on the way back
            (0.7, 2.0, -0.7 * 2),
        ],
    )
    def test_ppo_gradient(self, ratio, advantage, gradient):
        batch = one_token(-1.0, prev=-1.0 - math.log(ratio), advantage=advantage)
        _, grad, metrics = run(config(), *batch)
        assert grad.item() == pytest.approx(gradient, rel=1e-7)
        assert (grad.item() == 0) == (gradient == 0)
        assert metrics["probs_ratio"] == pytest.approx(ratio)

    def test_clipping_does_not_bound_the_ratio(self):
        """A step can leave the interval: here the ratio is 10 and the loss is merely flat."""
        loss, grad, metrics = run(config(), *one_token(-1.0, prev=-1 - math.log(10)))
        assert metrics["probs_ratio_max"] == pytest.approx(10)
        assert loss == pytest.approx(-1.2) and grad.item() == 0

    def test_dapo_clips_the_two_sides_apart(self):
        cfg = config(ratio_clip_max=0.28)
        for ratio, inside in ((1.25, True), (1.3, False)):
            _, grad, _ = run(cfg, *one_token(-1.0, prev=-1 - math.log(ratio)))
            assert bool(grad.item()) is inside
        _, grad, _ = run(cfg, *one_token(-1.0, prev=-1 - math.log(0.75), advantage=-1.0))
        assert grad.item() == 0

    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "gradient"),
        [
            (2.9, -1.0, 2.9, 2.9),
            (3.1, -1.0, 3.0, 0.0),
            (3.1, 1.0, -1.2, 0.0),
            (0.5, 1.0, -0.5, -0.5),
        ],
    )
    def test_dual_clip(self, ratio, advantage, loss, gradient):
        batch = one_token(-1.0, prev=-1 - math.log(ratio), advantage=advantage)
        value, grad, _ = run(config(ratio_clip_c=3.0), *batch)
        assert value == pytest.approx(loss) and grad.item() == pytest.approx(gradient)

    def test_gspo_ratio_is_the_geometric_mean(self):
        """Each token of a response has the same ratio and the same gradient, A s / n."""
        logprobs, data = make_batch(rows=2, length=5, spread=0.05)
        data["token_mask"] = torch.tensor([[1.0, 1, 1, 0, 1], [1, 0, 1, 0, 0]])
        data["sample_mask"] = torch.ones(2)
        data["advantages"][:] = torch.tensor([[2.0], [-3.0]])
        cfg = config(token_level_loss=False, sequence_level_importance_ratios=True)
        _, grad, metrics = run(cfg, logprobs, data)
        ratios = (logprobs - data["prev_logprobs"][:, 1:]).exp()
        s = [
            (ratios[0, 0] * ratios[0, 1] * ratios[0, 3]).item() ** (1 / 3),
            ratios[1, 1].item(),
        ]
        first, second = -2 * s[0] / 3 / 2, 3 * s[1] / 2  # 2 responses
        expected = torch.tensor([[first, first, 0, first], [0, second, 0, 0]]).double()
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)
        assert metrics["probs_ratio_max"] == pytest.approx(max(s))
        assert metrics["probs_ratio_min"] == pytest.approx(min(s))

    @pytest.mark.parametrize("ratio", [0.3, 0.9, 1.1, 7.0])
    def test_cispo_gradient_is_never_cut(self, ratio):
        cfg = config(use_cispo=True, ratio_clip_min=1.0, ratio_clip_max=4.0)
        loss, grad, _ = run(cfg, *one_token(-0.7, prev=-0.7 - math.log(ratio), advantage=2.0))
        assert grad.item() == pytest.approx(-2 * min(ratio, 5.0))
        assert loss == pytest.approx(-2 * min(ratio, 5.0) * -0.7)

    def test_reinforce_and_on_policy_have_the_same_gradient(self):
        """-A log π and -A times a ratio of 1; the ratio to π_old plays no part."""
        logprobs, data = make_batch()
        reinforce = run(config(disable_ppo_ratio=True), logprobs, data)
        forced = run(config(force_on_policy_ratio=True), logprobs, data)
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        advantages = data["advantages"][:, 1:] * mask
        torch.testing.assert_close(reinforce[1], -advantages / mask.sum())
        torch.testing.assert_close(forced[1], reinforce[1])
        assert reinforce[0] == pytest.approx(
            -(advantages * logprobs).sum().item() / mask.sum().item()
        )
        assert forced[0] == pytest.approx(-advantages.sum().item() / mask.sum().item())
        assert forced[2]["probs_ratio_min"] == forced[2]["probs_ratio_max"] == 1

    def test_forced_ratio_needs_no_prev_logprobs(self):
        logprobs, data = make_batch()
        del data["prev_logprobs"]
        run(config(force_on_policy_ratio=True), logprobs, data)
        with pytest.raises(KeyError, match="prev_logprobs"):
            run(config(), logprobs, data)

    def test_token_mean_and_response_mean(self):
        """Lengths 1 and 3: a token counts 1/4, or 1/2 and 1/6."""
        logprobs, data = make_batch(rows=2, length=4)
        data["token_mask"] = torch.tensor([[0.0, 1, 0, 0], [0, 1, 1, 1]])
        data["sample_mask"] = torch.ones(2)
        data["advantages"][:] = 1
        by_token = run(config(disable_ppo_ratio=True), logprobs, data)[1]
        by_row = run(config(disable_ppo_ratio=True, token_level_loss=False), logprobs, data)[1]
        torch.testing.assert_close(by_token, -data["token_mask"][:, 1:].double() / 4)
        share = torch.tensor([[1 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6]]).double()
        torch.testing.assert_close(by_row, -share, rtol=1e-6, atol=1e-8)


class TestImportanceCorrection:
    @pytest.mark.parametrize(
        ("kind", "low", "expected", "outside"),
        [
            (None, None, [0.4, 1.0, 3.0], None),
            ("tis", None, [0.4, 1.0, 2.0], 1 / 3),
            ("tis", 0.5, [0.5, 1.0, 2.0], 2 / 3),
            ("icepop", 0.5, [0.0, 1.0, 0.0], 2 / 3),
            ("icepop", 0.3, [0.4, 1.0, 0.0], 1 / 3),
            ("seq-mask-tis", 1.0, [0.4, 1.0, 3.0], 0.0),  # geometric mean 1.0627
            ("seq-mask-tis", 1.1, [0.0, 0.0, 0.0], 1.0),
        ],
    )
    def test_weights(self, kind, low, expected, outside):
        """π_old/π_gen is 0.4, 1 and 3; with REINFORCE the gradient shows the weight."""
        weights = torch.tensor([[0.4, 1.0, 3.0]], dtype=torch.float64)
        logprobs = torch.full((1, 3), -2.0, dtype=torch.float64)
        column = torch.zeros(1, 1, dtype=torch.float64)
        data = {
            "token_mask": torch.ones(1, 4),
            "sample_mask": torch.ones(1),
            "advantages": torch.ones(1, 4),
            "prev_logprobs": torch.cat([column, logprobs], 1),
            "generation_logprobs": torch.cat([column, logprobs - weights.log()], 1),
        }
        cfg = config(
            disable_ppo_ratio=True,
            use_importance_sampling_correction=True,
            truncated_importance_sampling_type=kind,
            truncated_importance_sampling_ratio=None if kind is None else 2.0,
            truncated_importance_sampling_ratio_min=low,
        )
        _, grad, metrics = run(cfg, logprobs, data)
        torch.testing.assert_close(grad, -torch.tensor([expected]).double() / 3)
        assert metrics.get("is_oob_ratio") == (None if outside is None else pytest.approx(outside))
        assert metrics["sampling_importance_ratio"] == pytest.approx(sum(expected) / 3)

    def test_without_the_flag_weights_are_measured_and_not_used(self):
        logprobs, data = make_batch()
        plain = run(config(), logprobs, data)
        data["prev_logprobs"], data["generation_logprobs"] = (
            data["prev_logprobs"],
            data["generation_logprobs"] - 1.0,
        )
        moved = run(config(), logprobs, data)
        assert plain[0] == moved[0] and torch.equal(plain[1], moved[1])
        ratio = moved[2]["sampling_importance_ratio"] / plain[2]["sampling_importance_ratio"]
        assert ratio == pytest.approx(math.e)

    def test_gspo_weight_is_the_product(self):
        logprobs, data = make_batch(rows=1, length=4)
        data["token_mask"] = torch.tensor([[0.0, 1, 0, 1]])
        data["sample_mask"], data["advantages"][:] = torch.ones(1), 1.0
        flags = {"token_level_loss": False, "sequence_level_importance_ratios": True}
        plain = run(config(**flags), logprobs, data)
        corrected = run(config(use_importance_sampling_correction=True, **flags), logprobs, data)
        w = (data["prev_logprobs"] - data["generation_logprobs"])[0, [1, 3]].sum().exp().item()
        assert corrected[0] == pytest.approx(w * plain[0])
        torch.testing.assert_close(corrected[1], w * plain[1])

    def test_infinite_weights_count_as_zero(self):
        """A token that π_gen cannot draw, or that both policies filter out."""
        inf = math.inf
        prev = torch.tensor([[0.0, -inf, -inf, -1.0]])
        gen = torch.tensor([[-inf, -inf, 0.0, -1.0]])
        assert pg.importance_weights(prev, gen).tolist() == [[0, 0, 0, 1]]
        ones = torch.ones(1, 4)
        assert pg.sequence_importance_weights(prev, gen, ones).tolist() == [[0]]
        weights, outside = pg.zero_outside_sequences(ones, prev, gen, ones, 0.9, 1.1)
        assert weights.tolist() == [[1, 1, 1, 1]] and outside.tolist() == [False]


class TestKL:
    @pytest.mark.parametrize(
        ("kind", "value", "gradient"),
        [
            # r = log(π_ref/π) = 0.5. The weight has value 1 and adds the estimate to the gradient.
            ("k1", -0.5, -0.5 + 1),
            ("k2", 0.125, 0.125 - 0.5),
            ("k3", math.exp(0.5) - 1.5, -0.5),
        ],
    )
    @pytest.mark.parametrize("weight", [1.0, 1.5])
    def test_value_and_gradient(self, kind, value, gradient, weight):
        batch = one_token(-1.0, advantage=0.0, reference=-0.5, generation=-1.0 - math.log(weight))
        cfg = ClippedPGLossConfig(
            reference_policy_kl_penalty=0.1,
            reference_policy_kl_type=kind,
            use_on_policy_kl_approximation=weight != 1,
        )
        loss, grad, metrics = run(cfg, *batch)
        assert metrics["kl_penalty"] == pytest.approx(weight * value)
        assert loss == pytest.approx(0.1 * weight * value)
        assert grad.item() == pytest.approx(0.1 * weight * gradient)

    def test_weight_is_1_without_the_flag(self):
        batch = one_token(-1.0, advantage=0.0, reference=-0.5, generation=-3.0)
        assert run(ClippedPGLossConfig(), *batch)[2]["kl_penalty"] == pytest.approx(
            math.exp(0.5) - 1.5
        )

    @pytest.mark.parametrize(
        ("clamps", "value"),
        [
            ({"kl_input_clamp_value": 0.3, "kl_output_clamp_value": None}, math.exp(0.3) - 1.3),
            ({"kl_input_clamp_value": None, "kl_output_clamp_value": 0.1}, 0.1),
        ],
    )
    def test_clamps_stop_value_and_gradient(self, clamps, value):
        cfg = ClippedPGLossConfig(reference_policy_kl_penalty=1.0, **clamps)
        _, grad, metrics = run(cfg, *one_token(-1.0, advantage=0.0, reference=-0.5))
        assert metrics["kl_penalty"] == pytest.approx(value)
        assert grad.item() == 0

    def test_unfiltered_logprobs_replace_those_of_the_loss(self):
        logprobs, data = one_token(-1.0, advantage=0.0, reference=-0.5)
        unfiltered = torch.tensor([[-1.5]], dtype=torch.float64, requires_grad=True)
        data["curr_logprobs_unfiltered"] = unfiltered
        _, grad, metrics = run(ClippedPGLossConfig(), logprobs, data)
        assert metrics["kl_penalty"] == pytest.approx(math.e - 2)
        assert grad.item() == 0 and unfiltered.grad.item() == pytest.approx(-0.01)

    def test_in_the_reward_it_is_not_in_the_loss(self):
        logprobs, data = make_batch()
        in_reward = ClippedPGLossConfig(use_kl_in_reward=True, reference_policy_kl_penalty=0.5)
        assert ClippedPGLossFn(in_reward).reference_policy_kl_penalty == 0
        del data["reference_policy_logprobs"]
        a, b = run(in_reward, logprobs, data), run(config(), logprobs, data)
        assert a[0] == b[0] and a[2] == b[2] and a[2]["kl_penalty"] == 0
        with pytest.raises(KeyError, match="reference_policy_logprobs"):
            run(ClippedPGLossConfig(), logprobs, data)

    def test_filtered_tokens_add_nothing(self):
        logprobs = torch.tensor([[-math.inf, -1.0]], requires_grad=True)
        kl = pg.kl_term(logprobs, torch.tensor([[-2.0, -1.0]]), "k2", 20.0, 10.0)
        assert kl.tolist() == [[0.0, 0.0]]


class TestPositiveExamples:
    def test_value_and_gradient(self):
        logprobs, data = make_batch(rows=3, length=3)
        data |= {"token_mask": torch.ones(3, 3), "sample_mask": torch.tensor([1.0, 1.0, 0.0])}
        data["advantages"][:] = 0
        data["rewards"] = torch.tensor([0.5, 0.0, 1.0])  # one right, one not, one masked
        loss, grad, metrics = run(config(positive_example_nll_weight=0.1), logprobs, data)
        assert metrics["positive_nll_loss"] == pytest.approx(-logprobs[0].mean().item())
        assert loss == pytest.approx(0.1 * metrics["positive_nll_loss"])
        expected = torch.tensor([[-0.05, -0.05], [0, 0], [0, 0]]).double()
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)

    def test_without_rewards_or_right_answers_it_is_0(self):
        logprobs, data = make_batch()
        cfg = config(positive_example_nll_weight=0.1)
        data["rewards"] = -torch.ones(3)
        a = run(cfg, logprobs, data)
        del data["rewards"]
        b = run(cfg, logprobs, data)
        assert a[0] == b[0] == run(config(), logprobs, data)[0]
        assert a[2]["positive_nll_loss"] == b[2]["positive_nll_loss"] == 0

    def test_it_is_a_mean_over_the_micro_batch(self):
        """NeMo RL's formula: twice the same micro-batch, twice the term."""
        logprobs, data = make_batch(seed=1)
        data["rewards"] = torch.ones(3)
        cfg = config(positive_example_nll_weight=0.1)
        twice = {key: torch.cat([value, value]) for key, value in data.items()}
        half = run(cfg, logprobs, data)[2]["positive_nll_loss"]
        assert run(cfg, torch.cat([logprobs] * 2), twice)[2]["positive_nll_loss"] == (
            pytest.approx(half)
        )


@given(configs(), batches.filter(lambda batch: len(batch[0])), st.data())
def test_micro_batches_sum_to_the_batch(cfg, batch, draw):
    """Loss, gradient and metrics, whatever the cut, but for what the docstring names."""
    cfg = cfg.model_copy(update={"positive_example_nll_weight": 0.0})
    logprobs, data = batch
    cut = draw.draw(st.integers(0, len(logprobs)))
    loss, grad, metrics = run(cfg, logprobs, data)
    parts = [
        run(cfg, logprobs[rows], {k: v[rows] for k, v in data.items()}, **counts(data))
        for rows in (slice(0, cut), slice(cut, None))
    ]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-10)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad)
    skip = {"sampling_importance_ratio"} if cfg.sequence_level_importance_ratios else set()
    for name in metrics.keys() - skip:
        combine = min if name.endswith("_min") else max if name.endswith("_max") else sum
        values = combine(part[2][name] for part in parts)
        assert values == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name


@given(configs(), st.integers(0, 999))
def test_masked_entries_do_not_matter(cfg, seed):
    """Not the masked tokens, masked rows or first columns."""
    logprobs, data = make_batch(seed=seed)
    other = {key: value.clone() for key, value in data.items()}
    tokens = data["token_mask"][:, 1:] == 0
    rows = data["sample_mask"] == 0
    off = tokens | rows[:, None]
    for key in (*POLICIES, "advantages"):
        other[key][:, 1:][off] -= 3.0
        other[key][:, 0] = 123.0
    other["token_mask"][:, 0] = 1 - other["token_mask"][:, 0]
    other["rewards"][rows] = 5.0
    moved = torch.where(off, logprobs - 2.0, logprobs)
    a, b = run(cfg, logprobs, data), run(cfg, moved, other)
    assert a[0] == pytest.approx(b[0], abs=1e-10)
    torch.testing.assert_close(a[1], b[1])
    assert not a[1][off].any()
    assert a[2] == pytest.approx(b[2], rel=1e-6, abs=1e-6)


def test_all_masked():
    logprobs, data = make_batch()
    data["token_mask"].zero_()
    loss, grad, metrics = run(ClippedPGLossConfig(), logprobs, data)
    assert loss == 0 and not grad.any()
    assert metrics["probs_ratio_min"] == math.inf and metrics["probs_ratio_max"] == -math.inf
    assert type(metrics["kl_penalty"]) is int and metrics["kl_penalty"] == 0


def test_nan_under_a_mask_is_not_hidden():
    logprobs, data = make_batch()
    data["token_mask"][0, 1], data["sample_mask"][:] = 0, 1
    logprobs[0, 0] = float("nan")
    assert math.isnan(run(config(), logprobs, data)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@given(cfg=configs())
def test_dtypes(dtype, cfg):
    """Near the double-precision loss of the same inputs; bounds on weights make jumps, so none."""
    cfg = cfg.model_copy(
        update={
            "truncated_importance_sampling_type": None,
            "truncated_importance_sampling_ratio": None,
        }
    )
    logprobs, data = make_batch(dtype=dtype)
    double = {key: value.double() for key, value in data.items()}
    loss, grad, _ = run(cfg, logprobs, data)
    assert grad.dtype == dtype
    exact = run(cfg, logprobs.double(), double)[0]
    tolerance = max(20 * torch.finfo(dtype).eps, 1e-7)  # 1e-8 is added to every count
    assert loss == pytest.approx(exact, rel=tolerance, abs=tolerance)


def test_plain_dict_and_batched_data_dict_give_the_same():
    logprobs, data = make_batch()
    a = run(ClippedPGLossConfig(), logprobs, data)
    b = run(ClippedPGLossConfig(), logprobs, BatchedDataDict(data))
    assert a[0] == b[0] and a[2] == b[2] and torch.equal(a[1], b[1])


@given(configs())
def test_inputs_are_not_changed(cfg):
    logprobs, data = make_batch()
    before = {key: value.clone() for key, value in data.items()}
    run(cfg, logprobs, data)
    assert data.keys() == before.keys()
    assert all(torch.equal(data[key], before[key]) for key in data)


def test_attributes_and_configs():
    loss_fn = ClippedPGLossFn(ClippedPGLossConfig(), use_fused_linear_logprobs=True)
    assert loss_fn.use_fused_linear_logprobs and loss_fn.input_type is LossInputType.LOGPROB
    assert not ClippedPGLossFn(ClippedPGLossConfig()).use_fused_linear_logprobs
    assert loss_fn.loss_type is LossType.TOKEN_LEVEL
    gspo = {"token_level_loss": False, "sequence_level_importance_ratios": True}
    by_response = ClippedPGLossFn(ClippedPGLossConfig(**gspo))
    assert by_response.loss_type is LossType.SEQUENCE_LEVEL
    assert ClippedPGLossConfig(max_steps=3).max_steps == 3
    cfg = SimpleNamespace(**ClippedPGLossConfig().model_dump())  # the protocol is attributes
    assert ClippedPGLossFn(cfg).ratio_clip_max == 0.2
    with pytest.raises(TypeError, match=r"cfg is a dict, expected a ClippedPGLossConfig"):
        ClippedPGLossFn({})


@pytest.mark.parametrize(
    ("flags", "sequences"),
    [
        ({}, set()),
        ({"token_level_loss": False}, {"loss", "kl_penalty"}),
        (
            {"token_level_loss": False, "sequence_level_importance_ratios": True},
            {"loss", "kl_penalty", "sampling_importance_ratio"},
        ),
        ({"truncated_importance_sampling_type": "tis"}, set()),
        ({"truncated_importance_sampling_type": "icepop"}, set()),
        ({"truncated_importance_sampling_type": "seq-mask-tis"}, {"is_oob_ratio"}),
    ],
)
def test_metric_normalizations(flags, sequences):
    if "truncated_importance_sampling_type" in flags:
        flags = flags | {
            "use_importance_sampling_correction": True,
            "truncated_importance_sampling_ratio": 2.0,
            "truncated_importance_sampling_ratio_min": 0.5,
        }
    table = ClippedPGLossFn(ClippedPGLossConfig(**flags)).metric_normalizations
    undivided = {"num_valid_samples", "positive_nll_loss"}
    undivided |= {f"probs_ratio{c}_{m}" for c in ("", "_clamped") for m in ("min", "max")}
    for name, normalizer in table.items():
        expected = "none" if name in undivided else "sequences" if name in sequences else "tokens"
        assert normalizer is MetricNormalizer(expected), name
    assert ("is_oob_ratio" in table) == ("truncated_importance_sampling_type" in flags)


TIS = {"use_importance_sampling_correction": True, "truncated_importance_sampling_ratio": 2.0}
CLASHES = [
    (
        {"sequence_level_importance_ratios": True},
        ("sequence_level_importance_ratios=True", "token_level_loss=True"),
    ),
    ({"use_cispo": True, "disable_ppo_ratio": True}, ("use_cispo", "disable_ppo_ratio")),
    ({"use_cispo": True, "force_on_policy_ratio": True}, ("use_cispo", "force_on_policy_ratio")),
    (
        {
            "use_cispo": True,
            "sequence_level_importance_ratios": True,
            "token_level_loss": False,
        },
        ("use_cispo", "sequence_level_importance_ratios"),
    ),
    ({"use_cispo": True, "ratio_clip_c": 3.0}, ("use_cispo", "ratio_clip_c=3.0")),
    ({"use_cispo": True, "token_level_loss": False}, ("use_cispo", "token_level_loss=False")),
    (
        {"truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio": 2.0},
        (
            "truncated_importance_sampling_type='tis'",
            "use_importance_sampling_correction=False",
        ),
    ),
    (TIS, ("truncated_importance_sampling_ratio=2.0", "truncated_importance_sampling_type=None")),
    (
        {"use_importance_sampling_correction": True, "truncated_importance_sampling_type": "tis"},
        ("truncated_importance_sampling_type='tis'", "truncated_importance_sampling_ratio=None"),
    ),
    *[
        (
            {**TIS, "truncated_importance_sampling_type": kind},
            (
                f"truncated_importance_sampling_type={kind!r}",
                "truncated_importance_sampling_ratio_min=None",
            ),
        )
        for kind in ("icepop", "seq-mask-tis")
    ],
    (
        {
            **TIS,
            "truncated_importance_sampling_type": "tis",
            "truncated_importance_sampling_ratio_min": 3.0,
        },
        (
            "truncated_importance_sampling_ratio_min=3.0",
            "truncated_importance_sampling_ratio=2.0",
        ),
    ),
    (
        {
            **TIS,
            "truncated_importance_sampling_type": "seq-mask-tis",
            "truncated_importance_sampling_ratio_min": 0.5,
            "sequence_level_importance_ratios": True,
            "token_level_loss": False,
        },
        (
            "truncated_importance_sampling_type='seq-mask-tis'",
            "sequence_level_importance_ratios=True",
        ),
    ),
]


@pytest.mark.parametrize(("flags", "names"), CLASHES)
def test_clashes_name_both_flags_and_the_reason(flags, names):
    with pytest.raises(ValueError, match=r" exclude each other: \w+ \w+") as error:
        ClippedPGLossFn(ClippedPGLossConfig(**flags))
    first, second = str(error.value).split(" exclude each other")[0].split(" and ")
    assert names[0] in first and names[1] in second


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"reference_policy_kl_type": "kl"}, r"reference_policy_kl_type is 'kl', expected 'k1'"),
        ({"ratio_clip_c": 1.0}, r"ratio_clip_c is 1.0, expected more than 1"),
        (
            {**TIS, "truncated_importance_sampling_type": "cut"},
            r"truncated_importance_sampling_type is 'cut', expected 'tis', 'icepop', 'seq-mask",
        ),
        (
            {
                "use_importance_sampling_correction": True,
                "truncated_importance_sampling_type": "tis",
                "truncated_importance_sampling_ratio": 0.0,
            },
            r"truncated_importance_sampling_ratio is 0.0, expected more than 0",
        ),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        ClippedPGLossFn(ClippedPGLossConfig(**flags))


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        *[
            (key, None, KeyError, f"data has no '{key}', which ClippedPGLossFn needs")
            for key in ("token_mask", "sample_mask", "advantages", *POLICIES)
        ],
        *[
            (key, torch.ones(3, 5), ValueError, rf"data\['{key}'\] has shape \(3, 5\), .* \(3, 6\)")
            for key in ("token_mask", "advantages", *POLICIES)
        ],
        *[
            (key, torch.ones(3, 6, dtype=torch.int64), TypeError, rf"data\['{key}'\] has dtype")
            for key in POLICIES
        ],
        ("sample_mask", torch.ones(2), ValueError, r"data\['sample_mask'\] has shape \(2,\)"),
        (
            "rewards",
            torch.ones(3, 1),
            ValueError,
            r"\['rewards'\] .*\(3, 1\), expected \(B,\) = \(3",
        ),
        (
            *("curr_logprobs_unfiltered", torch.ones(3, 6), ValueError),
            r"\['curr_logprobs_unfiltered'\] has shape \(3, 6\), expected \(B, S-1\) = \(3, 5\)",
        ),
    ],
)
def test_bad_data(key, value, error, message):
    logprobs, data = make_batch()
    data.pop(key, None)
    if value is not None:
        data[key] = value
    with pytest.raises(error, match=message):
        ClippedPGLossFn(ClippedPGLossConfig(positive_example_nll_weight=0.1))(
            logprobs, data, torch.tensor(3.0), torch.tensor(9.0)
        )


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (
            torch.ones(3, 5, dtype=torch.int64),
            TypeError,
            r"next_token_logprobs has dtype torch.int",
        ),
        ([[0.0]], TypeError, r"next_token_logprobs is a list, expected a floating tensor"),
        (torch.ones(3, 5, 9), ValueError, r"has shape \(3, 5, 9\), expected \(B, S-1\)"),
    ],
)
def test_bad_logprobs(output, error, message):
    _, data = make_batch()
    with pytest.raises(error, match=message):
        ClippedPGLossFn(ClippedPGLossConfig())(output, data, **counts(data))


def test_missing_counts():
    logprobs, data = make_batch()
    tokens = torch.tensor(9.0)
    with pytest.raises(ValueError, match="global_valid_toks is None, expected the number"):
        ClippedPGLossFn(config())(logprobs, data, torch.tensor(3.0), None)
    ClippedPGLossFn(config())(logprobs, data, None, tokens)  # no response is counted
    kind = {
        **TIS,
        "truncated_importance_sampling_type": "seq-mask-tis",
        "truncated_importance_sampling_ratio_min": 0.5,
    }
    for flags in ({"token_level_loss": False}, kind):
        with pytest.raises(ValueError, match="global_valid_seqs is None, expected the number"):
            ClippedPGLossFn(config(**flags))(logprobs, data, None, tokens)
