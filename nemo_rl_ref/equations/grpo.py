# SPDX-License-Identifier: Apache-2.0
"""GRPO and its relatives: group baselines, the clipped loss, and what others changed in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sympy import Gt, Ne, Piecewise, Product, evaluate, exp, log, sqrt
from torch import Tensor

from nemo_rl_ref.algorithms.advantage_estimator import (
    AdvEstimatorConfig,
    GDPOAdvantageEstimator,
    GRPOAdvantageEstimator,
    ReinforcePlusPlusAdvantageEstimator,
)
from nemo_rl_ref.algorithms.loss import ClippedPGLossFn
from nemo_rl_ref.algorithms.utils import (
    calculate_baseline_and_std_per_prompt,
    calculate_kl,
)
from nemo_rl_ref.custom.policy_gradient import DrGRPOLossFn
from nemo_rl_ref.equations._equation import Equation, Inputs, each
from nemo_rl_ref.equations._functions import (
    average,
    bracket,
    clip,
    maximum,
    minimum,
    sg,
    sum_over,
)
from nemo_rl_ref.equations._group_calls import (
    HEAVY,
    choose_answer,
    in_one_batch,
    loss_of,
    of_answer,
    scores,
    settings,
)
from nemo_rl_ref.equations._symbols import (
    MASK,
    MODERATE,
    PROBABILITY,
    RATIO,
    REAL,
    Domain,
    index,
    indexed,
    size,
    symbol,
)
from nemo_rl_ref.equations.notation import A, G, T, beta, eps, i, j, rewards, rho, t
from nemo_rl_ref.equations.ppo import eps_high, eps_low

__all__ = ["EQUATIONS"]

# ---- symbols --------------------------------------------------------------------------------


def _constant(value: float) -> Domain:
    return Domain(lambda rng, shape: np.full(shape, value))


LENGTHS = Domain(lambda rng, shape: rng.integers(1, 5, size=shape).astype(float), (1.0, 4.0))
LONGEST = Domain(lambda rng, shape: rng.integers(7, 5000, size=shape).astype(float), (7.0, 1e6))
TOKEN = Domain(lambda rng, shape: np.exp(-rng.exponential(size=shape)), (1e-12, 1e-3, 1.0))
WEIGHTS = Domain(lambda rng, shape: 10.0 ** rng.uniform(-1, 1, size=shape))

group_b = symbol("group_b", r"\bar r", r"mean reward of the group", REAL)
others_b = symbol("others_b", "b_{-i}", "mean reward of the other answers of the group", REAL)
others_s = symbol(
    "others_s", "s_{-i}", "standard deviation of the rewards of the other answers", REAL
)
eta = symbol(
    "eta",
    "10^{-6}",
    r"what NeMo RL adds to a standard deviation before dividing",
    _constant(1e-6),
)
ratios = indexed(
    "ratios",
    r"\rho_{#1,#2}",
    "importance ratio of token $t$ of answer $i$",
    RATIO,
    ("G", "T"),
)
token_ratio = indexed(
    "answer_token_ratio", r"\rho_{#1}", "importance ratio of token $t$", RATIO, ("T",)
)
token_pi = indexed(
    "token_pi",
    r"\pi_\theta(y_{#1} \mid x, y_{<#1})",
    r"probability of token $t$ of the answer under the policy, given what is before it",
    TOKEN,
    ("T",),
)
token_old = indexed(
    "token_old",
    r"\pi_{\mathrm{old}}(y_{#1} \mid x, y_{<#1})",
    "probability of token $t$ under the policy that the update began from",
    TOKEN,
    ("T",),
)
mask = indexed("mask", "M_{#1,#2}", "1 for a token of answer $i$, 0 for padding", MASK, ("G", "T"))
advantages = indexed("advantages", "A_{#1}", "advantage of answer $i$", REAL, ("G",))
log_ratio = indexed(
    "log_ratio",
    "h_{#1,#2}",
    "log-ratio of a token to the reference, nats",
    MODERATE,
    ("G", "T"),
)
kl_k = indexed(
    "kl_k",
    "k_{#1,#2}",
    "k3 estimate of the KL divergence at a token, nats",
    MODERATE,
    ("G", "T"),
)
longest = symbol("longest", r"L_{\max}", "most tokens that an answer may have, a constant", LONGEST)
p_token = symbol(
    "p_token",
    r"\pi_\theta(y_t \mid x, y_{<t})",
    r"probability of token $t$ of the answer under the policy, given what is before it",
    PROBABILITY,
)
score = symbol(
    "score",
    r"\nabla_\theta \log \pi_\theta(y_t \mid x, y_{<t})",
    "gradient of the token's log-probability",
    REAL,
)
score_sum = indexed(
    "score_sum",
    r"\nabla_\theta \log \pi_\theta(y_{#1} \mid x, y_{<#1})",
    r"score of token $t$: gradient of its log-probability",
    MODERATE,
    ("T",),
)
gspo_s = symbol("gspo_s", "s", "GSPO's ratio of the answer", RATIO)
lengths = indexed("lengths", "T_{#1}", "number of tokens of answer $i$", LENGTHS, ("G",))
baselines = indexed(
    "baselines",
    "b_{#1}",
    "mean reward of the answers to the prompt of answer $i$",
    REAL,
    ("G",),
)
token_mean = symbol("token_mean", r"\mathrm{mean}", r"mean over the tokens of the batch", REAL)
token_var = symbol("token_var", r"\mathrm{var}", r"variance over the tokens of the batch", REAL)
least_var = symbol(
    "least_var",
    r"v_{\min}",
    "least variance that NeMo RL divides by, 1e-8",
    _constant(1e-8),
)
Q = size("Q", "Q", "number of reward components", (2, 3))
q = index("q", "q", "a reward component")
part = indexed(
    "part",
    "A_{#2}^{(#1)}",
    "GRPO's advantage for reward component $q$ alone",
    REAL,
    ("Q", "G"),
)
part_weight = indexed("part_weight", "w_{#1}", "weight of a reward component", WEIGHTS, ("Q",))
raw_parts = indexed(
    "raw_parts",
    "r_{#2}^{(#1)}",
    "reward component $q$ of answer $i$",
    MODERATE,
    ("Q", "G"),
)
total = symbol("total", r"\tilde{A}_i", "weighted sum of the components' advantages", REAL)
batch_mean = symbol("batch_mean", r"\bar{A}", "mean of the sums over the batch", REAL)
batch_std = symbol(
    "batch_std", r"s_{\tilde{A}}", "standard deviation of the sums over the batch", REAL
)

# ---- checks: advantages ---------------------------------------------------------------------


def _advantage(inputs: Inputs, *, leave_one_out: bool, normalize: bool) -> Tensor:
    """GRPO's advantage of answer i of every group, all groups in one batch."""
    config = AdvEstimatorConfig(
        use_leave_one_out_baseline=leave_one_out, normalize_rewards=normalize
    )
    estimator = GRPOAdvantageEstimator(config, settings())
    prompts, flat = in_one_batch(inputs.rewards)
    found = estimator.compute_advantage(prompts, flat, torch.ones(len(flat), 1))
    return of_answer(found[:, 0], len(inputs.rewards), inputs.i)


def _statistics(rewards: Tensor, answer: int, *, leave_one_out: bool) -> tuple[Tensor, Tensor]:
    """Baseline and standard deviation of one answer of every group."""
    prompts, flat = in_one_batch(rewards)
    found = calculate_baseline_and_std_per_prompt(
        prompts, flat, torch.ones_like(flat), leave_one_out_baseline=leave_one_out
    )
    baseline, std = (of_answer(part, len(rewards), answer) for part in found)
    return baseline, std


def _group_advantage(inputs: Inputs) -> Tensor:
    return _advantage(inputs, leave_one_out=False, normalize=False)


def _loo_advantage(inputs: Inputs) -> Tensor:
    return _advantage(inputs, leave_one_out=True, normalize=False)


def _normalised(inputs: Inputs) -> Tensor:
    return _advantage(inputs, leave_one_out=True, normalize=True)


def _others_mean(inputs: Inputs) -> Tensor:
    return _statistics(inputs.rewards, inputs.i, leave_one_out=True)[0]


def _group_std(inputs: Inputs) -> Tensor:
    return _statistics(inputs.rewards, inputs.i, leave_one_out=False)[1]


def _others_std(inputs: Inputs) -> Tensor:
    return _statistics(inputs.rewards, inputs.i, leave_one_out=True)[1]


def _with_statistics(drawn: dict[str, Any]) -> dict[str, Any]:
    """Put in the others' mean and deviation as NeMo RL computes them."""
    drawn = scores(drawn)
    rewards = torch.from_numpy(drawn["rewards"])
    baseline, std = _statistics(rewards, drawn["i"], leave_one_out=True)
    return drawn | {"others_b": baseline.numpy(), "others_s": std.numpy()}


def _two_prompts(answers: int) -> Tensor:
    """Prompts of a batch of answers, which take turns."""
    return torch.arange(answers)[:, None] % 2


def _with_baselines(drawn: dict[str, Any]) -> dict[str, Any]:
    drawn = scores(drawn)
    drawn["rewards"][1::4] /= 2**13  # variances around the least that is divided by
    rows = [
        calculate_baseline_and_std_per_prompt(
            _two_prompts(drawn["G"]),
            row,
            torch.ones_like(row),
            leave_one_out_baseline=False,
        )[0]
        for row in torch.from_numpy(drawn["rewards"])
    ]
    return drawn | {"baselines": torch.stack(rows).numpy()}


@each
def _reinforce_pp(inputs: Inputs) -> Tensor:
    estimator = ReinforcePlusPlusAdvantageEstimator(AdvEstimatorConfig(), settings())
    counted = (torch.arange(4) < inputs.lengths[:, None]).double()
    prompts = _two_prompts(inputs.G)
    return estimator.compute_advantage(prompts, inputs.rewards, counted)[inputs.i - 1, 0]


def _with_parts(drawn: dict[str, Any]) -> dict[str, Any]:
    """Put in GRPO's advantages of the single components; they do not add up to zero."""
    raw = np.round(4 * drawn["raw_parts"]) / 4
    estimator = GRPOAdvantageEstimator(AdvEstimatorConfig(), settings())
    rows = torch.from_numpy(raw).reshape(-1, drawn["G"])
    prompts, flat = in_one_batch(rows)
    prompts = 2 * prompts + _two_prompts(drawn["G"]).repeat_interleave(len(rows), dim=0)
    found = estimator.compute_advantage(prompts, flat, torch.ones(len(flat), 1))[:, 0]
    parts = found.reshape(drawn["G"], -1).T.reshape(raw.shape)
    return choose_answer(drawn | {"raw_parts": raw, "part": parts.numpy()})


@each
def _gdpo(inputs: Inputs) -> Tensor:
    config = AdvEstimatorConfig(reward_weights=inputs.part_weight.tolist())
    estimator = GDPOAdvantageEstimator(config, settings())
    batch = {f"reward/{number}": row for number, row in enumerate(inputs.raw_parts)}
    prompts = _two_prompts(inputs.G)
    found = estimator.compute_advantage(prompts, None, torch.ones(inputs.G, 1).double(), batch)
    return found[inputs.i - 1, 0]


# ---- checks: losses -------------------------------------------------------------------------


def _with_kl(drawn: dict[str, Any]) -> dict[str, Any]:
    """Put in the KL estimates that belong to the log-ratios."""
    h = torch.from_numpy(drawn["log_ratio"])
    k = calculate_kl(torch.zeros_like(h), -h, "k3", None, None)
    return drawn | {"kl_k": k.numpy()}


def _group_loss(inputs: Inputs, kind: type[ClippedPGLossFn], flags: Any, **call: Any) -> Tensor:
    """The loss of a group whose ratios, advantages and mask are given."""
    loss_fn = kind(settings(ratio_clip_min=inputs.eps, ratio_clip_max=inputs.eps, **flags))
    logprobs = inputs.ratios.log()
    given = {"mask": inputs.mask} | call
    return loss_of(loss_fn, logprobs, torch.zeros_like(logprobs), inputs.advantages, **given)


@each
def _grpo_objective(inputs: Inputs) -> Tensor:
    reference = inputs.ratios.log() - inputs.log_ratio
    flags = {"reference_policy_kl_penalty": inputs.beta}
    return _group_loss(inputs, ClippedPGLossFn, flags, reference=reference)


@each
def _grpo_published(inputs: Inputs) -> Tensor:
    flags = {"token_level_loss": False}
    return _group_loss(inputs, ClippedPGLossFn, flags, mask=inputs.mask * HEAVY)


@each
def _dr_grpo(inputs: Inputs) -> Tensor:
    flags = {"max_response_length": inputs.longest}
    return _group_loss(inputs, DrGRPOLossFn, flags, times=inputs.longest.item())


def _one_token(inputs: Inputs, logprob: Tensor, **flags: Any) -> Tensor:
    """The loss of one token whose ratio is given, with DAPO's two clipping ranges."""
    loss_fn = ClippedPGLossFn(
        settings(
            ratio_clip_min=inputs.eps_low,
            ratio_clip_max=inputs.eps_high,
            **flags,
        )
    )
    logprobs = logprob.reshape(1, 1)
    return loss_of(loss_fn, logprobs, (logprobs - inputs.rho.log()).detach(), inputs.A.reshape(1))


@each
def _cispo_loss(inputs: Inputs) -> Tensor:
    return _one_token(inputs, inputs.p_token.log(), use_cispo=True)


@each
def _cispo_gradient(inputs: Inputs) -> Tensor:
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = _one_token(inputs, inputs.p_token.log() + inputs.score * theta, use_cispo=True)
    return torch.autograd.grad(loss, theta)[0]


def _gspo_loss(logprobs: Tensor, previous: Tensor, advantage: Tensor) -> Tensor:
    """GSPO's loss of one answer with nothing clipped below: for A < 0, -A times the ratio."""
    loss_fn = ClippedPGLossFn(
        settings(
            sequence_level_importance_ratios=True,
            token_level_loss=False,
            ratio_clip_min=1.0,
        )
    )
    heavy = torch.full_like(previous, HEAVY)
    return loss_of(loss_fn, logprobs, previous, advantage.reshape(1), mask=heavy)


@each
def _gspo_ratio(inputs: Inputs) -> Tensor:
    """Advantage -1: the loss is the ratio itself."""
    minus = torch.tensor(-1.0, dtype=torch.float64)
    policy, old = inputs.token_pi.log()[None], inputs.token_old.log()[None]
    return _gspo_loss(policy, old, minus)


@each
def _gspo_gradient(inputs: Inputs) -> Tensor:
    """One parameter θ, in which all log-probabilities are linear; nothing is clipped."""
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    previous = -inputs.gspo_s.log().expand(1, inputs.T)
    logprobs = (inputs.score_sum * theta)[None]
    loss = _gspo_loss(logprobs, previous, -inputs.A.abs())
    # With advantage -|A| the loss is |A| s.
    return inputs.A.sign() * torch.autograd.grad(loss, theta)[0]


ADVANTAGE = "nemo_rl_ref.algorithms.advantage_estimator."
STATISTICS = "nemo_rl_ref.algorithms.utils.calculate_baseline_and_std_per_prompt"
CLIPPED = "nemo_rl_ref.algorithms.loss.ClippedPGLossFn"

with evaluate(False):
    _surrogate = minimum(
        ratios[i, t] * advantages[i],
        clip(ratios[i, t], 1 - eps, 1 + eps) * advantages[i],
    )
    _tokens = sum_over(sum_over(mask[i, t], t, T), i, G)
    _sum_of_parts = sum_over(part_weight[q] * part[q, j], q, Q)
    EQUATIONS = [
        Equation(
            label="group-advantage",
            title="Advantage against the group's mean",
            left="A_i",
            right=rewards[i] - average(rewards[j], j, G),
            implementation=ADVANTAGE + "GRPOAdvantageEstimator",
            check=_group_advantage,
            prepare=scores,
            source="shao2024",
            note="Without `normalize_rewards` and `use_leave_one_out_baseline`.",
        ),
        Equation(
            label="leave-one-out",
            title="Leave-one-out baseline",
            left="b_{-i}",
            right=1 / (G - 1) * sum_over(rewards[j], j, G, Ne(j, i)),
            implementation=STATISTICS,
            check=_others_mean,
            prepare=scores,
            source="kool2019",
        ),
        Equation(
            label="loo-scaled",
            title="Leaving one out scales the advantage",
            left="r_i - b_{-i}",
            right=(
                rewards[i] - (sum_over(rewards[j], j, G) - rewards[i]) / (G - 1),
                (G * rewards[i] - sum_over(rewards[j], j, G)) / (G - 1),
                G / (G - 1) * (rewards[i] - average(rewards[j], j, G)),
            ),
            implementation=ADVANTAGE + "GRPOAdvantageEstimator",
            check=_loo_advantage,
            prepare=scores,
            note="With `use_leave_one_out_baseline`, without `normalize_rewards`.",
        ),
        Equation(
            label="group-std",
            title="Standard deviation of a group",
            left=r"\operatorname{std}(r_1, \dots, r_G)",
            right=sqrt(1 / (G - 1) * sum_over((rewards[j] - group_b) ** 2, j, G)),
            lets={group_b: average(rewards[j], j, G)},
            implementation=STATISTICS,
            check=_group_std,
            prepare=scores,
            source="shao2024",
            note="Without `use_leave_one_out_baseline`; bias-corrected, as in NeMo RL.",
        ),
        Equation(
            label="others-std",
            title="Standard deviation of the others",
            left="s_{-i}",
            right=Piecewise(
                (
                    sqrt(sum_over((rewards[j] - others_b) ** 2, j, G, Ne(j, i)) / (G - 2)),
                    Gt(G, 2),
                ),
                (0, True),
            ),
            implementation=STATISTICS,
            check=_others_std,
            prepare=_with_statistics,
            note="NeMo RL's; in the paper a deviation is that of the whole group. $b_{-i}$ is NeMo "
            "RL's, checked in its own equation.",
        ),
        Equation(
            label="grpo-advantage",
            title="Normalized advantage in NeMo RL",
            left="A_i",
            right=Piecewise(
                ((rewards[i] - others_b) / (others_s + eta), Gt(others_s, 0)),
                (rewards[i] - others_b, True),
            ),
            implementation=ADVANTAGE + "GRPOAdvantageEstimator",
            check=_normalised,
            prepare=_with_statistics,
            source="shao2024",
            note="The paper's mean and deviation include the answer itself. $b_{-i}$ and $s_{-i}$ "
            "are NeMo RL's, checked in their own equations.",
        ),
        Equation(
            label="grpo-objective",
            title="GRPO's loss, averaged over tokens",
            left=r"L(\theta)",
            right=sum_over(
                sum_over(mask[i, t] * bracket(beta * kl_k[i, t] - _surrogate), t, T),
                i,
                G,
            )
            / _tokens,
            also=(log_ratio,),
            implementation=CLIPPED,
            check=_grpo_objective,
            prepare=_with_kl,
            source="shao2024",
            note="The paper averages over each answer first. $k_{i,t}$ is NeMo RL's, checked in "
            "its own equation.",
        ),
        Equation(
            label="grpo-published",
            title="GRPO's loss, averaged over answers",
            left=r"L_{\mathrm{GRPO}}(\theta)",
            right=-average(
                sum_over(mask[i, t] * _surrogate, t, T) / sum_over(mask[i, t], t, T),
                i,
                G,
            ),
            implementation=CLIPPED,
            check=_grpo_published,
            source="shao2024",
            note="With `token_level_loss=False` and without the KL term.",
        ),
        Equation(
            label="dr-grpo",
            title="Dr. GRPO's loss",
            left=r"L_{\mathrm{Dr.\,GRPO}}(\theta)",
            right=-(1 / (G * longest)) * sum_over(sum_over(mask[i, t] * _surrogate, t, T), i, G),
            implementation="nemo_rl_ref.custom.policy_gradient.DrGRPOLossFn",
            check=_dr_grpo,
            source="liu2025drgrpo",
            note="The class is this site's, not NeMo RL's.",
        ),
        Equation(
            label="gspo-ratio",
            title="GSPO's ratio of an answer",
            left="s",
            right=(
                exp(average(log(token_pi[t] / token_old[t]), t, T)),
                Product(token_pi[t] / token_old[t], (t, 1, T)) ** (1 / T),
            ),
            implementation=CLIPPED,
            check=_gspo_ratio,
            source="zheng2025",
            at="Eq. 7",
            note="The loss of an answer of advantage -1, with nothing clipped.",
        ),
        Equation(
            label="gspo-gradient",
            title="Gradient of GSPO's surrogate inside the clipping range",
            left=r"\nabla_\theta (s A)",
            right=gspo_s * A * average(score_sum[t], t, T),
            implementation=CLIPPED,
            check=_gspo_gradient,
            source="zheng2025",
            note="The gradient is autograd's, for one answer.",
        ),
        Equation(
            label="cispo-loss",
            title="CISPO's loss of a token",
            left=r"\ell_{\mathrm{CISPO}}",
            right=-sg(clip(rho, 1 - eps_low, 1 + eps_high)) * A * log(p_token),
            implementation=CLIPPED,
            check=_cispo_loss,
            source="minimax2025",
            at="Eq. 4",
        ),
        Equation(
            label="cispo-gradient",
            title="Gradient of CISPO's loss of a token",
            left=r"\nabla_\theta \ell_{\mathrm{CISPO}}",
            right=-clip(rho, 1 - eps_low, 1 + eps_high) * A * score,
            also=(p_token,),
            implementation=CLIPPED,
            check=_cispo_gradient,
            source="minimax2025",
            note="The gradient is autograd's.",
        ),
        Equation(
            label="reinforce-pp",
            title="Advantage of Reinforce++",
            left="A_i",
            right=(rewards[i] - baselines[i] - token_mean) / sqrt(token_var),
            lets={
                token_mean: sum_over(lengths[j] * (rewards[j] - baselines[j]), j, G)
                / sum_over(lengths[j], j, G),
                token_var: maximum(
                    sum_over(lengths[j] * (rewards[j] - baselines[j] - token_mean) ** 2, j, G)
                    / sum_over(lengths[j], j, G),
                    least_var,
                ),
            },
            implementation=ADVANTAGE + "ReinforcePlusPlusAdvantageEstimator",
            check=_reinforce_pp,
            prepare=_with_baselines,
            source="hu2025",
            note="A batch of $G$ answers to two prompts, without a KL in the reward. $b_i$ is NeMo "
            "RL's group mean.",
        ),
        Equation(
            label="gdpo",
            title="GDPO's advantage",
            left="A_i",
            right=Piecewise(
                ((total - batch_mean) / batch_std, Gt(batch_std, 0)),
                (total - batch_mean, True),
            ),
            lets={
                total: sum_over(part_weight[q] * part[q, i], q, Q),
                batch_mean: average(_sum_of_parts, j, G),
                batch_std: sqrt(1 / (G - 1) * sum_over((_sum_of_parts - batch_mean) ** 2, j, G)),
            },
            also=(raw_parts,),
            implementation=ADVANTAGE + "GDPOAdvantageEstimator",
            check=_gdpo,
            prepare=_with_parts,
            source="liu2026gdpo",
            note="A batch of $G$ answers to two prompts. $A_j^{(q)}$ is NeMo RL's, checked as the "
            "normalized advantage.",
        ),
    ]
