# SPDX-License-Identifier: Apache-2.0
"""Every golden case of every mirrored symbol: values, gradients and metrics to 1e-6."""

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nemo_rl_ref.algorithms import loss as losses
from nemo_rl_ref.algorithms.utils import calculate_kl, masked_mean
from nemo_rl_ref.upstream import GoldenCase, load_golden


def find_symbol(path: str) -> Any:
    """The mirror of a symbol, or None if it is not mirrored yet."""
    module, name = path.rsplit(".", 1)
    try:
        return getattr(importlib.import_module(f"nemo_rl_ref.{module}"), name, None)
    except ModuleNotFoundError as error:
        if not error.name.startswith("nemo_rl_ref"):
            raise
        return None


MIRRORED = [case for case in load_golden() if find_symbol(case.symbol)]


def call_loss(loss_fn: Callable, model_output: str, case: GoldenCase) -> dict[str, Any]:
    """Calls a loss as NeMo RL does; everything but the model output and the counts is data."""
    data = dict(case.inputs)
    output = data.pop(model_output).clone().requires_grad_()
    counts = {name: data.pop(name) for name in ("global_valid_seqs", "global_valid_toks")}
    loss, metrics = loss_fn(output, data, **counts)
    loss.backward()
    return {"loss": loss.detach(), "grad": output.grad, "metrics": metrics}


def run_dpo(case: GoldenCase) -> dict[str, Any]:
    loss_fn = losses.DPOLossFn(losses.DPOLossConfig(**case.config))
    return call_loss(loss_fn, "next_token_logprobs", case)


# How a case of each mirrored symbol is run. A mirrored symbol that is not here fails its cases.
RUNNERS: dict[str, Callable[[GoldenCase], dict[str, Any]]] = {
    "algorithms.loss.DPOLossFn": run_dpo,
    "algorithms.loss.NLLLossFn": lambda case: call_loss(
        losses.NLLLossFn(), "next_token_logprobs", case
    ),
    "algorithms.loss.PreferenceLossFn": lambda case: call_loss(
        losses.PreferenceLossFn(), "logits", case
    ),
    "algorithms.utils.calculate_kl": lambda case: {
        "kl": calculate_kl(**case.inputs, **case.config)
    },
    "algorithms.utils.masked_mean": lambda case: {
        "mean": masked_mean(**case.inputs, **case.config)
    },
}


def assert_same(actual: Any, expected: Any, name: str) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key in expected:
            assert_same(actual[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(
            actual, expected, rtol=1e-6, atol=1e-6, msg=lambda m: f"{name}: {m}"
        )
    else:
        assert type(actual) is type(expected), name
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("case", MIRRORED, ids=lambda case: f"{case.symbol}-{case.case}")
def test_golden(case):
    assert case.symbol in RUNNERS, f"no runner for the mirrored symbol {case.symbol}"
    assert_same(RUNNERS[case.symbol](case), case.outputs, case.symbol)


def test_no_case_is_lost():
    """The cases that ran are all there are; a renamed symbol would drop out silently."""
    expected = Counter(case.symbol for case in load_golden())
    ran = Counter(case.symbol for case in MIRRORED)
    assert {symbol: ran[symbol] for symbol in RUNNERS} == {s: expected[s] for s in RUNNERS}
    assert ran["algorithms.loss.DPOLossFn"] == 24
    assert ran["algorithms.loss.NLLLossFn"] == 2
    assert ran["algorithms.loss.PreferenceLossFn"] == 1
    assert ran["algorithms.utils.calculate_kl"] == 12
    assert ran["algorithms.utils.masked_mean"] == 2
