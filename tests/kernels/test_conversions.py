# SPDX-License-Identifier: Apache-2.0
"""The 16-bit floats of ``common.cuh``, executed on the CPU, against PyTorch's, bit for bit."""

import conversion_cases as cases
import pytest
import torch
from thread_harness import SKIPPED, ThreadHarness, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason=SKIPPED)


@pytest.fixture(autouse=True)
def threads(on_threads):
    on_threads(ThreadHarness(cases.SOURCE, cases.EXPRESSIONS))


@pytest.mark.parametrize("name", cases.TYPES)
def test_conversions(name):
    cases.conversions(torch.device("cpu"), name, portable=True)


@pytest.mark.parametrize("name", [*cases.TYPES, "float", "double"])
def test_repacking(name):
    cases.repacking(torch.device("cpu"), name)


@pytest.mark.parametrize(
    "edit",
    [
        ("u + 0x7fff + ((u >> 16) & 1)", "u + 0x8000"),
        ("u + 0xfff + ((u >> 13) & 1)", "u + 0x1000"),
        ("u < 0x38800000u", "u < 0x38000000u"),
        ("(exponent + 112) << 23", "(exponent + 111) << 23"),
        ("if (u > 0x7f800000u) return 0x7fff;\n", ""),
    ],
)
def test_planted_fault(edit, on_threads):
    expressions = [e for e in cases.EXPRESSIONS if "true" in e]
    on_threads(ThreadHarness(cases.SOURCE, expressions, edits=[edit]))
    with pytest.raises(AssertionError):
        for name in cases.TYPES:
            cases.conversions(torch.device("cpu"), name, portable=True)
