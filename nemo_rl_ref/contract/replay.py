# SPDX-License-Identifier: Apache-2.0
"""Run NeMo RL's recorded cases through the mirror, and say how far the results are apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from nemo_rl_ref.algorithms import advantage_estimator as estimators
from nemo_rl_ref.algorithms import loss as losses
from nemo_rl_ref.algorithms.utils import (
    calculate_baseline_and_std_per_prompt,
    calculate_kl,
    masked_mean,
)
from nemo_rl_ref.upstream import GoldenCase, load_golden

COUNTS = ("global_valid_seqs", "global_valid_toks")


def _call_loss(
    loss_fn: Callable, model_output: str, case: GoldenCase, more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Calls a loss as NeMo RL does; but for the model output, `more` and the counts all is data."""
    data = dict(case.inputs)
    output = data.pop(model_output).clone().requires_grad_()
    arguments = {name: data.pop(name) for name in (*more, *COUNTS)}
    loss, metrics = loss_fn(**{model_output: output}, data=data, **arguments)
    loss.backward()
    return {"loss": loss.detach(), "grad": output.grad, "metrics": metrics}


def _run_dpo(case: GoldenCase) -> dict[str, Any]:
    loss_fn = losses.DPOLossFn(losses.DPOLossConfig(**case.config))
    return _call_loss(loss_fn, "next_token_logprobs", case)


def _run_clipped_pg(case: GoldenCase) -> dict[str, Any]:
    loss_fn = losses.ClippedPGLossFn(losses.ClippedPGLossConfig(**case.config))
    return _call_loss(loss_fn, "next_token_logprobs", case)


def _run_mse_value(case: GoldenCase) -> dict[str, Any]:
    loss_fn = losses.MseValueLossFn(losses.MseValueLossConfig(**case.config))
    return _call_loss(loss_fn, "logits", case)


def _run_distillation(case: GoldenCase) -> dict[str, Any]:
    """The cases do not hold ``input_ids``, of which the loss reads the number of rows only."""
    loss_fn = losses.DistillationLossFn(losses.DistillationLossConfig(**case.config))
    ids = torch.zeros_like(case.inputs["token_mask"], dtype=torch.int64)
    case = replace(case, inputs={**case.inputs, "input_ids": ids})
    return _call_loss(loss_fn, "student_topk_logprobs", case, ("teacher_topk_logprobs", "H_all"))


def _run_baseline(case: GoldenCase) -> dict[str, Any]:
    baseline, std = calculate_baseline_and_std_per_prompt(**case.inputs, **case.config)
    return {"baseline": baseline, "std": std}


def _run_estimator(case: GoldenCase) -> dict[str, Any]:
    """An estimator whose configuration is a class; loss flags stand in the same dict."""
    flags = dict(case.config)
    loss_flags = {
        k: flags.pop(k) for k in case.config if k in losses.ClippedPGLossConfig.model_fields
    }
    cls = getattr(estimators, case.symbol.rsplit(".", 1)[1])
    estimator = cls(
        estimators.AdvEstimatorConfig(**flags), losses.ClippedPGLossConfig(**loss_flags)
    )
    inputs = {"prompt_ids": None, "rewards": None, **case.inputs}
    return {"advantages": estimator.compute_advantage(**inputs)}


def _run_gae(case: GoldenCase) -> dict[str, Any]:
    estimator = estimators.GeneralizedAdvantageEstimator(case.config, losses.ClippedPGLossConfig())
    advantages, returns = estimator.compute_advantage(**case.inputs)
    return {"advantages": advantages, "returns": returns}


# How a case of each mirrored symbol is run. A mirrored symbol that is not here fails its cases.
RUNNERS: dict[str, Callable[[GoldenCase], dict[str, Any]]] = {
    "algorithms.advantage_estimator.GDPOAdvantageEstimator": _run_estimator,
    "algorithms.advantage_estimator.GRPOAdvantageEstimator": _run_estimator,
    "algorithms.advantage_estimator.GeneralizedAdvantageEstimator": _run_gae,
    "algorithms.advantage_estimator.OPDAdvantageEstimator": _run_estimator,
    "algorithms.advantage_estimator.ReinforcePlusPlusAdvantageEstimator": _run_estimator,
    "algorithms.loss.ClippedPGLossFn": _run_clipped_pg,
    "algorithms.loss.DPOLossFn": _run_dpo,
    "algorithms.loss.DistillationLossFn": _run_distillation,
    "algorithms.loss.MseValueLossFn": _run_mse_value,
    "algorithms.loss.NLLLossFn": lambda case: _call_loss(
        losses.NLLLossFn(), "next_token_logprobs", case
    ),
    "algorithms.loss.PreferenceLossFn": lambda case: _call_loss(
        losses.PreferenceLossFn(), "logits", case
    ),
    "algorithms.utils.calculate_baseline_and_std_per_prompt": _run_baseline,
    "algorithms.utils.calculate_kl": lambda case: {
        "kl": calculate_kl(**case.inputs, **case.config)
    },
    "algorithms.utils.masked_mean": lambda case: {
        "mean": masked_mean(**case.inputs, **case.config)
    },
}


def run_case(case: GoldenCase) -> dict[str, Any]:
    """Returns what the mirror makes of a case: values, gradients and metrics, named as recorded.

    Raises:
        KeyError: if the case's symbol has no runner here.
    """
    return RUNNERS[case.symbol](case)


def largest_difference(actual: Any, expected: Any) -> float:
    """Return the largest ``|a - b| / max(1, |b|)`` in two results of the same structure."""
    if isinstance(expected, dict):
        if actual.keys() != expected.keys():
            raise ValueError(f"actual has {sorted(actual)}, expected {sorted(expected)}")
        return max((largest_difference(actual[k], expected[k]) for k in expected), default=0.0)
    a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs() / b.abs().clamp(min=1)).max().item()


def differences() -> dict[str, tuple[int, float]]:
    """For every mirrored symbol: the number of its cases and the largest difference over them."""
    found: dict[str, tuple[int, float]] = {}
    for case in load_golden():
        count, worst = found.get(case.symbol, (0, 0.0))
        found[case.symbol] = (
            count + 1,
            max(worst, largest_difference(run_case(case), case.outputs)),
        )
    return found
