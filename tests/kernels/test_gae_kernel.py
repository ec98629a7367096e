# SPDX-License-Identifier: Apache-2.0
"""The kernel of ``gae.cu``: executed on threads of the CPU, compiled for GPUs, and run on one."""

import gae_cases as cases
import pytest
import torch
from kernel_compiler import needs_compiler
from thread_harness import SKIPPED, KernelFault, ThreadHarness, compiler, has_thread_sanitizer

from nemo_rl_ref.algorithms._recurrence import gae
from nemo_rl_ref.kernels import loader

executed = pytest.mark.skipif(compiler() is None, reason=SKIPPED)
sanitized = pytest.mark.skipif(
    not has_thread_sanitizer(), reason="no compiler with ThreadSanitizer: no search for data races"
)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

INSTANCES = [
    f"gae<{scalar}, {mask}>"
    for scalar in ("float", "double")
    for mask in ("unsigned char", "float", "double", "long long")
]


@pytest.fixture(autouse=True)
def poisoned():
    """New memory holds NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads(on_threads):
    on_threads(ThreadHarness("gae", INSTANCES))


def operator(device, lam):
    """Schema, fake, autograd and AOT dispatch of the operator."""
    rewards, values, mask = cases.episodes(device, 3, 20, dtype=torch.float64)
    row = isinstance(lam, torch.Tensor)
    numbers = (lam if row else None, 0.9, 0.0 if row else lam)
    inputs = [x.requires_grad_() for x in (rewards, values)]
    gae_op = torch.ops.nemo_rl_ref.gae.default
    torch.library.opcheck(gae_op, (*inputs, mask, *numbers))
    assert torch.autograd.gradcheck(lambda r, v: gae_op(r, v, mask, *numbers), inputs)


# ---- on threads of the CPU ----------------------------------------------------------------------


@executed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("length", cases.LENGTHS)
def test_sizes(length):
    cases.sizes("cpu", length)


@executed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.__name__)
def test_cases(case):
    case("cpu")


@executed
@sanitized
@pytest.mark.parametrize("length", [33, 5000])
def test_no_data_races(on_threads, length):
    on_threads(ThreadHarness("gae", ["gae<float, unsigned char>"], sanitize=True))
    cases.check(*cases.episodes("cpu", 2, length))


#: Text in gae.cu, what is planted in its place, and a case that fails of it.
FAULTS = {
    "a warp mask without the last lane": (
        "__shfl_down_sync(kFullMask, run.a, by)",
        "__shfl_down_sync(0x7fffffffu, run.a, by)",
        lambda: cases.sizes("cpu", 33),
    ),
    "one token after the end": (
        "x[i] = t + i < steps ? row[t + i] : T(0)",
        "x[i] = t + i <= steps ? row[t + i] : T(0)",
        lambda: cases.sizes("cpu", 33),
    ),
    "a vector that reaches over the end": (
        "if (vector && t + kTokens <= steps) {\n    Tokens<T> tokens;",
        "if (vector && t < steps) {\n    Tokens<T> tokens;",
        lambda: cases.check(*(x[:, :34] for x in cases.episodes("cpu", 5, 48))),
    ),
    "no state goes from tile to tile": (
        "carried = discount.enter(whole_tile, carried);",
        "",
        lambda: cases.check(*cases.episodes("cpu", 1, 4100)),
    ),
    "a lane includes itself": (
        "right[part] = right_of(run, lane);",
        "right[part] = run;",
        lambda: cases.sizes("cpu", 33),
    ),
    "a join that forgets a factor": (
        "left.d * c * right.d",
        "left.d * right.d",
        lambda: cases.sizes("cpu", 1000),
    ),
    "the mask is not looked at": (
        "if (unmasked >> (kTokens * part + i) & 1)",
        "if (true)",
        lambda: cases.nothing_leaks_from_masked_tokens("cpu"),
    ),
    "the stride of another tensor": (
        "mask += row * mask_stride",
        "mask += row * steps",
        lambda: cases.any_strides("cpu"),
    ),
    "addresses that are not aligned": (
        "aligned(advantages) && aligned(returns);",
        "true || aligned(advantages) && aligned(returns);",
        lambda: cases.any_strides("cpu"),
    ),
}


@executed
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(on_threads, fault):
    right, wrong, case = FAULTS[fault]
    scalars = ["gae<float, unsigned char>"]
    on_threads(ThreadHarness("gae", scalars, edits=[(right, wrong)]))
    with pytest.raises((AssertionError, KernelFault)):
        case()


BARRIERS = {
    "between the warps' runs and their join": (
        "__syncthreads();\n\n    if (warp == 0) {",
        "\n    if (warp == 0) {",
    ),
    "between the states and their readers": (
        "    __syncthreads();\n\n#pragma unroll\n    for (int part = 0; part < kParts; ++part) {\n"
        "      const int t = start + kTokens * (part * threads + thread);\n      State<T>",
        "\n#pragma unroll\n    for (int part = 0; part < kParts; ++part) {\n"
        "      const int t = start + kTokens * (part * threads + thread);\n      State<T>",
    ),
}


@executed
@sanitized
@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_missing_barrier_is_a_data_race(on_threads, barrier):
    scalars = ["gae<float, unsigned char>"]
    on_threads(ThreadHarness("gae", scalars, edits=[BARRIERS[barrier]], sanitize=True))
    with pytest.raises(KernelFault, match="data race"):
        cases.check(*cases.episodes("cpu", 1, 2000))


# ---- without a GPU ------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("expression", ["gae<float, unsigned char>", "gae<float, float>"])
def test_compiled_without_spills_and_stack(expression, architecture):
    compiled = loader.compile_kernel("gae", expression, architecture, verbose=True)
    took = compiled.resources
    assert took.stack_bytes == 0 and took.spill_bytes == 0, took
    # Four blocks of 128 threads share the 65536 registers of a multiprocessor.
    assert took.registers <= 128, took


@executed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("lam", [0.7, torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)])
def test_operator(lam):
    operator("cpu", lam)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cuda", marks=executed)])
def test_compiles_whole(threads, backend):
    inputs = cases.episodes("cpu", 3, 20)
    compiled = torch.compile(
        lambda *x: gae(*x, gamma=0.9, lam=0.8, backend=backend), fullgraph=True, backend="aot_eager"
    )
    expected = gae(*inputs, gamma=0.9, lam=0.8)
    for a, b in zip(compiled(*inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"rewards": torch.ones(2, 3).long()},
            TypeError,
            "rewards has dtype torch.int64, expected",
        ),
        ({"values": torch.ones(3)}, ValueError, r"values has shape \(3,\), expected \(B, S\)"),
        ({"mask": torch.ones(2, 4)}, ValueError, r"mask has shape \(2, 4\), .* \(2, 3\)"),
        ({"lam": torch.ones(3)}, ValueError, r"lam has shape \(3,\), expected \(B,\) = \(2,\)"),
        ({"backend": "cpu"}, ValueError, "backend is 'cpu', expected 'cuda', 'torch' or None"),
    ],
)
def test_bad_input(changes, error, message):
    ones = torch.ones(2, 3)
    inputs = {"rewards": ones, "values": ones, "mask": ones, "gamma": 1.0, "lam": 1.0} | changes
    with pytest.raises(error, match=message):
        gae(**inputs)


# ---- on a GPU -----------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("length", cases.LENGTHS)
def test_sizes_on_gpu(length):
    cases.sizes("cuda", length)


@on_gpu
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.__name__)
def test_cases_on_gpu(case):
    case("cuda")


@on_gpu
def test_operator_on_gpu():
    operator("cuda", 0.7)


@on_gpu
def test_other_streams_and_graphs():
    inputs = cases.episodes("cuda", 5, 3000)
    expected = gae(*inputs, gamma=0.99, lam=0.95, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = gae(*inputs, gamma=0.99, lam=0.95, backend="cuda")
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))

    static = [x.clone() for x in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gae(*static, gamma=0.99, lam=0.95, backend="cuda")
    for seed in (1, 2):
        fresh = cases.episodes("cuda", 5, 3000, seed=seed)
        for kept, new in zip(static, fresh, strict=True):
            kept.copy_(new)
        graph.replay()
        expected = gae(*fresh, gamma=0.99, lam=0.95, backend="cuda")
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
