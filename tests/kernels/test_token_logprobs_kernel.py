# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``token_logprobs.cu``, executed on the CPU, against float64 references."""

import pytest
import token_logprobs_cases as cases
import torch
from thread_harness import (
    SKIPPED,
    KernelFault,
    ThreadHarness,
    compiler,
    has_thread_sanitizer,
)
from token_logprobs_harness import BLOCK, harness, instances

from nemo_rl_ref.kernels import token_logprobs as kernel
from nemo_rl_ref.logprobs.token import _token_logprobs_op, token_logprobs

pytestmark = pytest.mark.skipif(compiler() is None, reason=SKIPPED)

CPU = torch.device("cpu")


@pytest.fixture
def threads(on_threads, monkeypatch):
    """Blocks of two warps."""
    for name in ("_SMALL_BLOCK", "_BLOCK"):
        monkeypatch.setattr(kernel, name, BLOCK)
    return on_threads


@pytest.mark.parametrize("vocabulary", cases.VOCABULARIES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_sizes(dtype, vocabulary, threads):
    threads(harness(dtype))
    cases.sizes(CPU, cases.DTYPES[dtype], vocabulary)


@pytest.mark.parametrize("case", cases.SPECIAL, ids=lambda case: case.__name__)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_special(dtype, case, threads):
    threads(harness(dtype))
    case(CPU, cases.DTYPES[dtype])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_pieces_and_cap(dtype, softcap, threads):
    threads(harness(dtype))
    cases.pieces_and_cap(CPU, cases.DTYPES[dtype], softcap)


def test_far_rows(threads):
    threads(harness("bfloat16"))
    cases.far_rows(CPU)


def test_a_target_out_of_range(threads):
    threads(harness("float"))
    for bad in (-1, 5, -101):
        with pytest.raises(KernelFault, match=r"a target is -100 or in \[0, V\)"):
            token_logprobs(torch.zeros(1, 5), torch.tensor([bad]), backend="cuda")


def test_gradcheck(threads):
    threads(harness("double"))
    logits, targets = cases.random_case((3,), 5, torch.float64, CPU)
    logits.requires_grad_()
    for entropy in (False, True):
        torch.autograd.gradcheck(
            lambda x, entropy=entropy: token_logprobs(
                x, targets, temperature=0.9, return_entropy=entropy, backend="cuda"
            ),
            logits,
        )


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_operator(inplace, entropy, threads):
    threads(harness("float"))
    logits, targets = cases.random_case((2, 3), 40, torch.float32, CPU)
    arguments = (logits.requires_grad_(), targets, 0.9, entropy, inplace, True)
    torch.library.opcheck(_token_logprobs_op, arguments)


def test_compiled(threads):
    threads(harness("float"))
    logits, targets = cases.random_case((2, 3), 40, torch.float32, CPU)

    def loss(logits):
        logprobs, entropy = token_logprobs(
            logits * 2, targets, return_entropy=True, inplace_backward=True, backend="cuda"
        )
        return (logprobs.sin() + entropy).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        value = function(x)
        value.backward()
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])


# ---- races and planted faults ----


def battery(dtype=torch.float32):
    """A few launches that touch every branch."""
    cases.sizes(CPU, dtype, 1000)
    cases.strides(CPU, dtype)
    cases.minus_infinity(CPU, dtype)
    cases.pieces_and_cap(CPU, dtype, None)


@pytest.mark.skipif(
    not has_thread_sanitizer(),
    reason="ThreadSanitizer does not run here, so the kernels were not searched for data races",
)
def test_no_data_race(threads):
    threads(ThreadHarness("token_logprobs", instances("bfloat16", caps=["false"]), sanitize=True))
    logits, targets = cases.random_case((3,), 1000, torch.bfloat16, CPU)
    cases.check(logits, targets, inplace_backward=True)
    cases.pieces_and_cap(CPU, torch.bfloat16, None)


FAULTS = {
    "missing barrier": ("  __syncthreads();\n", ""),
    "tail of the forward kernel one short": (
        "i < scalars; i += BLOCK) {\n    const long long column = i < head ? i : i + vectors * W;\n"
        "    const A z",
        "i < scalars - 1; i += BLOCK) {\n    const long long column = i < head ? i : i + vectors "
        "* W;\n    const A z",
    ),
    "tail of the backward kernel one too long": (
        "i < scalars; i += BLOCK) {\n    const long long column = i < head ? i : i + vectors * W;\n"
        "    g[",
        "i <= scalars; i += BLOCK) {\n    const long long column = i < head ? i : i + vectors "
        "* W;\n    g[",
    ),
    "vectors beyond the end counted": (
        "INSIDE || start + u * BLOCK < vectors ? cap(x[j]) : minus_infinity<A>()",
        "cap(x[j])",
    ),
    "mask without the last lane": (
        "0xffffffffu;\nconstexpr int kWarp",
        "0x7fffffffu;\nconstexpr int kWarp",
    ),
    "half of the warp's lanes merged": ("int lane = kWarp / 2;", "int lane = kWarp / 4;"),
    "second warp left out": ("int warp = 1; warp < kWarps", "int warp = 2; warp < kWarps"),
    "unguarded -infinity": (
        "row.maximum == minus_infinity<A>() ? (A)0 : row.maximum",
        "row.maximum",
    ),
    "unguarded 0 times -infinity": (
        "multiply_add(e, larger(d, (A)kLowest), row.weighted)",
        "multiply_add(e, d, row.weighted)",
    ),
    "a larger maximum, sums as they were": ("  row.total *= factor;\n", ""),
    "wrong stride": ("row % inner * inner_stride", "row % inner * outer_stride"),
    "offset in 31 bits": (
        "return row / inner * outer_stride + row % inner * inner_stride",
        "return (row / inner * outer_stride + row % inner * inner_stride) & 0x7fffffff",
    ),
    "alignment taken for granted": (
        "((unsigned long long)(x + head) & 15) == 0",
        "true",
    ),
    "target's column not shifted": (
        "const long long target_column = target - first_column",
        "const long long target_column = target",
    ),
    "pieces not merged": ("    merge(seen, before, scale);\n", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(fault, threads):
    race = fault == "missing barrier"
    if race and not has_thread_sanitizer():
        pytest.skip("ThreadSanitizer does not run here, so no data race was planted")
    far = fault == "offset in 31 bits"
    expressions = instances(
        "bfloat16" if far else "float", entropies=["false" if far else "true"], caps=["false"]
    )
    threads(ThreadHarness("token_logprobs", expressions, edits=[FAULTS[fault]], sanitize=race))
    with pytest.raises((AssertionError, KernelFault)) as caught:
        if race:
            cases.sizes(CPU, torch.float32, 1000)
        elif far:
            cases.far_rows(CPU)
        else:
            battery()
    if race:
        assert "data race" in str(caught.value)
