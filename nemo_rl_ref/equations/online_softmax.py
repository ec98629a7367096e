# SPDX-License-Identifier: Apache-2.0
"""The softmax of a row that is read once: running maximum, sums, and the gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sympy import Eq, evaluate, exp, log
from torch import Tensor

from nemo_rl_ref.equations._equation import Equation, Inputs
from nemo_rl_ref.equations._functions import bracket, indicator, maximum, sum_over
from nemo_rl_ref.equations._symbols import MODERATE, POSITIVE, REAL, Domain, indexed, symbol
from nemo_rl_ref.equations.likelihood import logit_y, token_y
from nemo_rl_ref.equations.notation import V, v
from nemo_rl_ref.logprobs import token_logprobs

__all__ = ["EQUATIONS"]

LOGPROBS = "nemo_rl_ref.logprobs.token_logprobs"

row = indexed("os_row", "z_{#1}", "the model's logit of token $v$", MODERATE, ("V",))
reference = symbol(
    "os_reference", r"\hat z", "largest logit seen so far, or any other number near it", MODERATE
)
total = symbol("os_total", "S", r"sum of $e^{z_v - \hat z}$ over the logits seen so far", POSITIVE)
tops = [
    symbol(f"os_top_{k}", rf"\hat z_{k}", f"largest logit of part {k} of a row", REAL)
    for k in (1, 2)
]
totals = [
    symbol(
        f"os_total_{k}",
        f"S_{k}",
        rf"sum of $e^{{z_v - \\hat z_{k}}}$ over the logits of part {k}",
        POSITIVE,
    )
    for k in (1, 2)
]
weighted = [
    symbol(
        f"os_weighted_{k}",
        f"U_{k}",
        rf"sum of $(z_v - \\hat z_{k})\, e^{{z_v - \\hat z_{k}}}$ over the logits of part {k}",
        REAL,
    )
    for k in (1, 2)
]
entropy = symbol("os_entropy", r"\mathcal{H}", "entropy of the next token, in nats", REAL)
temperature = symbol(
    "os_temperature",
    r"\tau",
    "temperature, which divides the logits",
    Domain(lambda rng, shape: 10.0 ** rng.uniform(-0.5, 0.7, size=shape), (0.5, 1.0, 2.0)),
)
to_logprob = symbol(
    "os_to_logprob", r"g_\ell", "gradient that arrives at the log-probability", REAL
)
to_entropy = symbol("os_to_entropy", r"g_H", "gradient that arrives at the entropy", REAL)
prob = indexed("os_prob", r"\pi_{#1}", "probability of token $v$", POSITIVE, ("V",))


# ---- inputs that belong together --------------------------------------------------------------


def _target(drawn: dict[str, Any]) -> dict[str, Any]:
    """Let every token be the target, one input after the other, and v another or the same."""
    count, size = drawn["os_row"].shape
    places = np.arange(count) % size
    chosen = np.take_along_axis(drawn["os_row"], places[:, None], axis=1)[:, 0]
    return drawn | {"token_y": places + 1, "logit_y": chosen, "v": size // 2 + 1}


def _parts(drawn: dict[str, Any]) -> dict[str, Any]:
    """Cut a row in the middle, and compute what is known of each part."""
    z = drawn["os_row"]
    cut = z.shape[1] // 2
    for k, part in ((1, z[:, :cut]), (2, z[:, cut:])):
        top = part.max(axis=1)
        e = np.exp(part - top[:, None])
        drawn[f"os_top_{k}"], drawn[f"os_total_{k}"] = top, e.sum(axis=1)
        drawn[f"os_weighted_{k}"] = ((part - top[:, None]) * e).sum(axis=1)
    return drawn


# ---- what the code computes -------------------------------------------------------------------


def _log_sum(logits: Tensor) -> Tensor:
    """Log of the sum of the exponentials, from a log-probability."""
    first = torch.zeros(len(logits), dtype=torch.long)
    return logits[:, 0] - token_logprobs(logits, first)


def _entropy(logits: Tensor) -> Tensor:
    first = torch.zeros(len(logits), dtype=torch.long)
    return token_logprobs(logits, first, return_entropy=True)[1]


def _logprob(inputs: Inputs) -> Tensor:
    return token_logprobs(inputs.os_row, inputs.token_y - 1)


def _merged_total(inputs: Inputs) -> Tensor:
    """Two logits that stand for two parts: each part's logarithm of its sum."""
    parts = torch.stack(
        [getattr(inputs, f"os_top_{k}") + getattr(inputs, f"os_total_{k}").log() for k in (1, 2)],
        dim=-1,
    )
    return (_log_sum(parts) - torch.maximum(inputs.os_top_1, inputs.os_top_2)).exp()


def _merged_weighted(inputs: Inputs) -> Tensor:
    """Of a whole row, from its entropy: U = S (log S - H)."""
    log_total = _log_sum(inputs.os_row) - inputs.os_row.max(-1).values
    return log_total.exp() * (log_total - _entropy(inputs.os_row))


def _gradient(inputs: Inputs) -> Tensor:
    logits = inputs.os_row.clone().requires_grad_()
    found = []
    for z, y, tau, g, h in zip(
        logits,
        inputs.token_y - 1,
        inputs.os_temperature,
        inputs.os_to_logprob,
        inputs.os_to_entropy,
        strict=True,
    ):
        outputs = token_logprobs(z, y, temperature=float(tau), return_entropy=True)
        found.append(torch.autograd.grad(outputs, z, (g, h))[0][inputs.v - 1])
    return torch.stack(found)


def _tempered(drawn: dict[str, Any]) -> dict[str, Any]:
    """Give the probabilities and the entropy that the logits have at this temperature."""
    drawn = _target(drawn)
    z = drawn["os_row"] / drawn["os_temperature"][:, None]
    z = z - z.max(axis=1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    drawn["os_prob"] = np.exp(logp)
    drawn["os_entropy"] = -(np.exp(logp) * logp).sum(axis=1)
    return drawn


with evaluate(False):
    one, two = tops
    e = exp(row[v] - reference)
    EQUATIONS = [
        Equation(
            label="os-logprob",
            title="Log-probability from a sum that cannot overflow",
            left=r"\log \pi_{y_t}",
            right=logit_y - reference - log(sum_over(e, v, V)),
            also=(token_y,),
            implementation=LOGPROBS,
            check=_logprob,
            prepare=_target,
            note="Any reference gives the same number; the largest logit keeps every term below 1.",
        ),
        Equation(
            label="os-merge",
            title="The sum of two parts",
            left="S",
            right=totals[0] * exp(one - reference) + totals[1] * exp(two - reference),
            lets={reference: maximum(one, two)},
            implementation=LOGPROBS,
            check=_merged_total,
            source="milakov2018",
            at="Section 3.1",
            note="A row of two logits, each the logarithm of the sum of a part.",
        ),
        Equation(
            label="os-merge-weighted",
            title="The weighted sum of two parts",
            left="U",
            right=bracket(weighted[0] + totals[0] * bracket(one - reference)) * exp(one - reference)
            + bracket(weighted[1] + totals[1] * bracket(two - reference)) * exp(two - reference),
            lets={reference: maximum(one, two)},
            also=(row,),
            implementation=LOGPROBS,
            check=_merged_weighted,
            prepare=_parts,
            note="A row that is cut in the middle; the function returns its entropy.",
        ),
        Equation(
            label="os-entropy",
            title="Entropy from running sums",
            left=r"\mathcal{H}",
            right=log(sum_over(e, v, V))
            - sum_over(bracket(row[v] - reference) * e, v, V) / sum_over(e, v, V),
            implementation=LOGPROBS,
            check=lambda inputs: _entropy(inputs.os_row),
        ),
        Equation(
            label="os-gradient",
            title="Gradient of a logit",
            left=r"\frac{\partial}{\partial z_v} "
            r"\big[ g_\ell \log \pi_{y_t} + g_H \mathcal{H} \big]",
            right=(
                to_logprob * bracket(indicator(Eq(v, token_y)) - prob[v])
                - to_entropy * prob[v] * bracket(log(prob[v]) + entropy)
            )
            / temperature,
            also=(row,),
            implementation=LOGPROBS,
            check=_gradient,
            prepare=_tempered,
            note="The gradient is autograd's, through the function. Probabilities and entropy are "
            "those at the temperature.",
        ),
    ]
