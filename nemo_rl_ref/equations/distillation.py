# SPDX-License-Identifier: Apache-2.0
"""Distillation: divergences between a teacher and a student, and several teachers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sympy import Product, Sum, evaluate, log
from torch import Tensor

from nemo_rl_ref.algorithms.advantage_estimator import OPDAdvantageEstimator
from nemo_rl_ref.algorithms.loss import (
    ClippedPGLossConfig,
    ClippedPGLossFn,
    DistillationLossConfig,
    DistillationLossFn,
)
from nemo_rl_ref.equations._calls import count
from nemo_rl_ref.equations._equation import Equation, Inputs, each
from nemo_rl_ref.equations._functions import expectation, sum_over
from nemo_rl_ref.equations._symbols import (
    PROBABILITIES,
    PROBABILITY,
    UNIT,
    index,
    indexed,
    size,
    symbol,
)
from nemo_rl_ref.equations.kl_estimators import (
    centered,
    moved,
    sampled_batch,
    score,
    slope,
)
from nemo_rl_ref.equations.notation import V, Y, pi, v, y

__all__ = ["EQUATIONS"]

p = indexed(
    "kd_p",
    "p_{#1}",
    "teacher's probability of token $v$ at one position",
    PROBABILITIES,
    ("V",),
)
q = indexed(
    "kd_q",
    "q_{#1}",
    "student's probability of token $v$ there",
    PROBABILITIES,
    ("V",),
)
w = symbol("kd_w", r"\kappa", r"weight of the forward KL in the mixed one, from 0 to 1", UNIT)
k = size("kd_k", "k", "number of tokens kept, the teacher's most probable ones", (1, 2))
u = index("kd_u", "v'", r"another token")
M = size("lteachers", "M", "number of teachers", (1, 3))
l = index("kd_l", "l", "a teacher")
teachers = indexed(
    "kd_teachers",
    "p^{(#1)}_{#2}",
    "probability of token $v$ under teacher $l$",
    PROBABILITIES,
    ("lteachers", "V"),
)
weights = indexed(
    "kd_weights",
    "w_{#1}",
    "weight of teacher $l$; the weights add up to 1",
    PROBABILITIES,
    ("lteachers",),
)
teacher_y = indexed(
    "kd_teacher_y",
    r"\pi_{\mathrm{T}}(#1 \mid x)",
    "probability of answer $y$ under the teacher",
    PROBABILITIES,
    ("Y",),
)
token_teacher = symbol(
    "kd_token_teacher",
    r"\pi_{\mathrm{T}}(y_t \mid x, y_{<t})",
    "probability of the sampled token under the teacher",
    PROBABILITY,
)
token_old = symbol(
    "kd_token_old",
    r"\pi_{\mathrm{old}}(y_t \mid x, y_{<t})",
    r"probability of token $t$ under the policy that the update began from",
    PROBABILITY,
)

LOSS = "nemo_rl_ref.algorithms.loss.DistillationLossFn"
OPD = "nemo_rl_ref.algorithms.advantage_estimator.OPDAdvantageEstimator"
FORWARD = r"\mathrm{KL}(\, p \,\|\, q \,)"
REVERSE = r"\mathrm{KL}(\, q \,\|\, p \,)"


def distil(
    kind: str,
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    negative_entropy: Tensor | None = None,
    weight: float = 0.5,
) -> Tensor:
    """Return NeMo RL's loss, from log-probabilities at positions `(T, k)`.

    Args:
        kind: "forward", "reverse" or "mixed".
        student: the student's log-probabilities.
        teacher: the teacher's.
        mask: weights of the positions, `(T,)`, which add up to 1; None for a single position.
        negative_entropy: sum of q log q over the whole vocabulary, `(T,)`, for the tokens left
            out; None for no such term.
        weight: weight of the forward KL in the mixed one.
    """
    cfg = DistillationLossConfig(
        kl_type=kind,
        mixed_kl_weight=weight,
        zero_outside_topk=negative_entropy is not None,
    )
    one = torch.ones(1, dtype=torch.float64)
    data = {
        "input_ids": torch.zeros(1, len(student) + 1, dtype=torch.long),
        "token_mask": torch.cat([one, one if mask is None else mask])[None],
        "sample_mask": one,
    }
    outside = None if negative_entropy is None else negative_entropy[None]
    return DistillationLossFn(cfg)(student[None], teacher[None], outside, data, count(1), count(1))[
        0
    ]


def _single(kind: str) -> Any:
    @each
    def check(inputs: Inputs) -> Tensor:
        weight = float(inputs.get("kd_w", 0.5))
        student, teacher = inputs.kd_q.log(), inputs.kd_p.log()
        return distil(kind, student[None], teacher[None], weight=weight)

    return check


def _teacher_first(drawn: dict[str, Any]) -> dict[str, Any]:
    """Sort the vocabulary by the teacher's probabilities, so that the top k are the first k."""
    order = np.argsort(-drawn["kd_p"], axis=-1)
    return drawn | {name: np.take_along_axis(drawn[name], order, -1) for name in ("kd_p", "kd_q")}


@each
def _topk(inputs: Inputs) -> Tensor:
    """NeMo RL's log-probabilities: a softmax over the k logits that were kept, of both."""
    student = torch.log_softmax(inputs.kd_q.log()[: inputs.kd_k], dim=-1)
    teacher = torch.log_softmax(inputs.kd_p.log()[: inputs.kd_k], dim=-1)
    return distil("forward", student[None], teacher[None])


@each
def _topk_outside(inputs: Inputs) -> Tensor:
    """With `zero_outside_topk` the student's are those of the whole vocabulary."""
    student = inputs.kd_q.log()
    teacher = torch.log_softmax(inputs.kd_p.log()[: inputs.kd_k], dim=-1)
    negative_entropy = (student.exp() * student).sum()[None]
    return distil(
        "reverse",
        student[None, : inputs.kd_k],
        teacher[None],
        negative_entropy=negative_entropy,
    )


def _several(kind: str) -> Any:
    """One position for each teacher, weighted by the mask."""

    @each
    def check(inputs: Inputs) -> Tensor:
        teacher = inputs.kd_teachers.log()
        student = inputs.kd_q.log().expand(teacher.shape)
        return distil(kind, student, teacher, mask=inputs.kd_weights)

    return check


def _geometric_minimum(inputs: Inputs) -> Tensor:
    logits = (inputs.kd_weights[..., None] * inputs.kd_teachers.log()).sum(-2)
    return _several("reverse")(Inputs({**inputs, "kd_q": logits.softmax(-1)}))


def opd_advantages(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the advantages of on-policy distillation, of log-probabilities `(B, S)`."""
    return OPDAdvantageEstimator({}, None).compute_advantage(
        None,
        None,
        torch.ones_like(student),
        teacher_logprobs=teacher,
        prev_logprobs=student,
    )


def _opd_advantage(inputs: Inputs) -> Tensor:
    teacher, student = inputs.kd_token_teacher.log(), inputs.kd_token_old.log()
    return opd_advantages(teacher[:, None], student[:, None])[:, 0]


def _opd_gradient(inputs: Inputs) -> Tensor:
    theta, log_pi = moved(inputs)
    loss_fn = ClippedPGLossFn(
        ClippedPGLossConfig(disable_ppo_ratio=True, reference_policy_kl_penalty=0.0)
    )
    advantages = opd_advantages(inputs.kd_teacher_y.log(), log_pi.detach())
    batch = sampled_batch(log_pi, inputs.pi, advantages=advantages)
    loss = loss_fn(log_pi, batch, global_valid_seqs=count(1), global_valid_toks=count(1))[0]
    return slope(loss, theta)


with evaluate(False):
    forward_kl = sum_over(p[v] * log(p[v] / q[v]), v, V)
    reverse_kl = sum_over(q[v] * log(q[v] / p[v]), v, V)
    kept_p = Sum(p[u], (u, 1, k))
    kept_q = Sum(q[u], (u, 1, k))
    geometric = Product(teachers[l, v] ** weights[l], (l, 1, M))

    EQUATIONS = [
        Equation(
            label="forward-kl",
            title="Forward KL of a position",
            left=FORWARD,
            right=forward_kl,
            implementation=LOSS,
            check=_single("forward"),
            source="hinton2015",
        ),
        Equation(
            label="reverse-kl",
            title="Reverse KL of a position",
            left=REVERSE,
            right=reverse_kl,
            implementation=LOSS,
            check=_single("reverse"),
            source="gu2024minillm",
        ),
        Equation(
            label="mixed-kl",
            title="Mixed KL of a position",
            left=r"L_{\mathrm{mixed}}",
            right=w * forward_kl + (1 - w) * reverse_kl,
            implementation=LOSS,
            check=_single("mixed"),
        ),
        Equation(
            label="topk-kl",
            title="Forward KL over the teacher's top k, both renormalized",
            left=r"\mathrm{KL}(\, \tilde p \,\|\, \tilde q \,)",
            right=Sum(p[v] / kept_p * (log(p[v] / kept_p) - log(q[v] / kept_q)), (v, 1, k)),
            implementation=LOSS,
            check=_topk,
            prepare=_teacher_first,
            note="Tokens are numbered by the teacher's probability. The check renormalizes with a "
            "softmax of the kept logits, as the trainer does before it calls the loss.",
        ),
        Equation(
            label="topk-outside",
            title="Reverse KL with the tokens outside the top k",
            left=r"L_{\mathrm{reverse}}",
            right=Sum(q[v] * (log(q[v]) - log(p[v] / kept_p)), (v, 1, k))
            + Sum(q[v] * (log(q[v]) + 100), (v, k + 1, V)),
            implementation=LOSS,
            check=_topk_outside,
            prepare=_teacher_first,
            note="With `zero_outside_topk`; the teacher's log-probability outside counts as -100.",
        ),
        Equation(
            label="opd-advantage",
            title="Advantage of on-policy distillation",
            left="A_t",
            right=log(token_teacher / token_old),
            implementation=OPD,
            check=_opd_advantage,
            source="xiao2026",
        ),
        Equation(
            label="opd-gradient",
            title="Gradient of on-policy distillation",
            left=r"\nabla_\theta L_{\mathrm{OPD}}",
            right=expectation(
                score[y] * log(pi[y] / teacher_y[y]), y, Y, pi[y], r"y \sim \pi_\theta"
            ),
            implementation=(OPD, "nemo_rl_ref.algorithms.loss.ClippedPGLossFn"),
            check=_opd_gradient,
            prepare=centered,
            note="The gradient of the loss with `disable_ppo_ratio`, at "
            r"$\pi_{\mathrm{old}} = \pi_\theta$.",
        ),
        Equation(
            label="geometric-teacher",
            title="Reverse KL to several teachers",
            left=r"\sum_{l} w_l\, \mathrm{KL}(\, q \,\|\, p^{(l)} \,)",
            right=sum_over(q[v] * log(q[v] / geometric), v, V),
            implementation=LOSS,
            check=_several("reverse"),
            note="NeMo RL's loss has one teacher; here each teacher is one position, and its "
            "weight is that position's mask.",
        ),
        Equation(
            label="geometric-minimum",
            title="Smallest reverse KL to several teachers",
            left=r"\min_q \sum_{l} w_l\, \mathrm{KL}(\, q \,\|\, p^{(l)} \,)",
            right=-log(sum_over(geometric, v, V)),
            implementation=LOSS,
            check=_geometric_minimum,
            note="The loss of the student whose logits are the mean of the teachers' logits.",
        ),
        Equation(
            label="arithmetic-teacher",
            title="Forward KL to several teachers",
            left=r"\sum_{l} w_l\, \mathrm{KL}(\, p^{(l)} \,\|\, q \,)",
            right=-sum_over(sum_over(weights[l] * teachers[l, v], l, M) * log(q[v]), v, V)
            + sum_over(weights[l] * sum_over(teachers[l, v] * log(teachers[l, v]), v, V), l, M),
            implementation=LOSS,
            check=_several("forward"),
            note="NeMo RL's loss has one teacher; here each teacher is one position, and its "
            "weight is that position's mask.",
        ),
    ]
