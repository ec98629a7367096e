# SPDX-License-Identifier: Apache-2.0
"""Every golden case of every mirrored symbol: values, gradients and metrics to 1e-6."""

import importlib
from collections import Counter
from typing import Any

import pytest
import torch

from nemo_rl_ref.contract.replay import RUNNERS, differences, largest_difference, run_case
from nemo_rl_ref.upstream import load_golden


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
    assert_same(run_case(case), case.outputs, case.symbol)


def test_no_case_is_lost():
    """The cases that ran are all there are; a renamed symbol would drop out silently."""
    assert len(MIRRORED) == len(load_golden()) == 106
    assert Counter(case.symbol for case in MIRRORED).keys() == RUNNERS.keys()


def test_largest_difference_sees_every_entry():
    expected = {"loss": torch.tensor(2.0), "metrics": {"a": 0.5, "b": float("nan")}}
    assert largest_difference(expected, expected) == 0.0
    off = {"loss": torch.tensor(2.0), "metrics": {"a": 0.75, "b": float("nan")}}
    assert largest_difference(off, expected) == 0.25
    assert largest_difference({**expected, "loss": torch.tensor(3.0)}, expected) == 0.5
    with pytest.raises(ValueError, match="actual has .*expected"):
        largest_difference({"loss": expected["loss"]}, expected)


def test_the_table_of_differences_has_every_case():
    table = differences()
    assert sum(count for count, _ in table.values()) == 106
    assert max(worst for _, worst in table.values()) < 1e-5
