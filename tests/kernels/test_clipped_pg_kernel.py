# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``clipped_pg.cu``: executed on threads of the CPU, compiled, and run on a GPU."""

import threading

import clipped_pg_cases as cases
import pytest
import torch
from kernel_compiler import needs_compiler
from thread_harness import (
    SKIPPED,
    KernelFault,
    ThreadHarness,
    compiler,
    has_thread_sanitizer,
)

from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl_ref.algorithms.loss._clipped_pg_op import flags_and_numbers
from nemo_rl_ref.algorithms.loss._clipped_pg_terms import TERMS, Settings, clipped_pg_terms
from nemo_rl_ref.kernels import clipped_pg, loader

executed = pytest.mark.skipif(compiler() is None, reason=SKIPPED)
sanitized = pytest.mark.skipif(
    not has_thread_sanitizer(), reason="no compiler with ThreadSanitizer: no search for data races"
)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

KERNELS = ("clipped_pg_forward", "clipped_pg_backward")
MASKS = ("unsigned char", "float", "double", "long long")
INSTANCES = [f"{k}<{s}, {m}, -1>" for k in KERNELS for s in ("float", "double") for m in MASKS]
SINGLE = ["clipped_pg_forward<float, float, -1>", "clipped_pg_backward<float, float, -1>"]
DOUBLE = ["clipped_pg_forward<double, double, -1>", "clipped_pg_backward<double, double, -1>"]
#: GRPO and DAPO as configured in NeMo RL, and GSPO with a correction of importance.
COMMON_FLAGS = [
    flags_and_numbers(cases.settings(**flags))[0]
    for flags in ({}, cases.EVERYTHING | cases.GSPO | cases.TRUNCATIONS["tis"])
]


@pytest.fixture(autouse=True)
def poisoned():
    """New memory holds NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch):
    """Every thread is one of the operating system's; and one kernel for all flags."""
    monkeypatch.setattr(clipped_pg, "_MOST_THREADS", 64)
    monkeypatch.setattr(clipped_pg, "_SPECIALIZE", False)


@pytest.fixture
def threads(on_threads, small_blocks):
    on_threads(ThreadHarness("clipped_pg", INSTANCES))


# ---- on threads of the CPU ----------------------------------------------------------------------


@executed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("steps", cases.LENGTHS)
def test_sizes(steps):
    cases.sizes("cpu", steps)


@executed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", [*cases.CASES, cases.flags], ids=lambda case: case.__name__)
def test_cases(case):
    case("cpu")


@executed
def test_kernels_for_a_set_of_flags_in_large_blocks(on_threads):
    """As on a GPU: 256 threads, and a compiler that knows the flags."""
    flags, _ = flags_and_numbers(cases.settings(**cases.EVERYTHING))
    on_threads(ThreadHarness("clipped_pg", [f"{k}<float, float, {flags}>" for k in KERNELS]))
    given = cases.batch(1, 700, dtype=torch.float32, mask_dtype=torch.float32)
    cases.check(given, cases.EVERYTHING, "cpu", dtype=torch.float64)


@executed
@sanitized
@pytest.mark.usefixtures("small_blocks")
def test_no_data_races(on_threads):
    on_threads(ThreadHarness("clipped_pg", DOUBLE, sanitize=True))
    cases.check(cases.batch(2, 600), cases.EVERYTHING, "cpu")
    cases.check(cases.batch(3, 40), cases.EVERYTHING | cases.GSPO, "cpu")


def masked_minimum(device="cpu"):
    given = cases.batch(3, 40)
    given["prev_logprobs"] = given["prev_logprobs"] + 5 * (1 - given["mask"])
    cases.check(given, cases.EVERYTHING, device)


def out_of_the_row(device="cpu"):
    given = cases.batch(1, 1030)
    wide = {
        n: torch.cat([x, torch.ones(1, 1000, dtype=x.dtype)], 1)[:, :1030]
        for n, x in given.items()
        if isinstance(x, torch.Tensor) and x.ndim == 2
    }
    cases.check(given | wide, cases.EVERYTHING, device)


#: Text in clipped_pg.cu, what is planted in its place, and a case that fails of it.
FAULTS = {
    "a warp mask without the last lane": (
        "const T other = __shfl_down_sync(kFullMask,",
        "const T other = __shfl_down_sync(0x7fffffffu,",
        lambda: cases.check(cases.batch(1, 20), {}, "cpu"),
    ),
    "a block that adds up all but its last warp": (
        "other < warps; ++other)",
        "other < warps - 1; ++other)",
        lambda: cases.check(cases.batch(1, 200), {}, "cpu"),
    ),
    "a segment that reaches over the end of its row, forward": (
        "(segment + 1) * length : steps);\n  const auto",
        "(segment + 1) * length : steps + 1);\n  const auto",
        out_of_the_row,
    ),
    "the last segment of a row is not added": (
        "for (int other = 1; other < segments; ++other)",
        "for (int other = 1; other < segments - 1; ++other)",
        lambda: cases.check(cases.batch(1, 700), {}, "cpu"),
    ),
    "the smallest ratio of all tokens, masked ones too": (
        "if (m != 0) lowest =",
        "lowest =",
        masked_minimum,
    ),
    "a weight that is not finite": (
        "weight = truncated(s, finite_or_zero(raw_weight), outside);",
        "weight = truncated(s, raw_weight, outside);",
        lambda: cases.policies_that_filter_the_same_token("cpu"),
    ),
    "the counter is left as it is": (
        "    *arrived = 0;\n",
        "",
        lambda: cases.same_bits("cpu"),
    ),
    "a tie gives all to both sides": (
        "plain == bounded ? T(0.5) : T(1)",
        "T(1)",
        lambda: cases.check(cases.batch(1, 20), {}, "cpu"),
    ),
    "the gradient goes through the input clamp": (
        "free = within(r, -s.kl_input, s.kl_input);",
        "",
        lambda: cases.check(cases.batch(1, 20), {"kl_input_clamp_value": 0.1}, "cpu"),
    ),
    "rows that do not count have a loss": (
        "? valid / own_tokens / all_responses : valid / all_tokens;",
        "? valid / own_tokens / all_responses : 1 / all_tokens;",
        lambda: cases.check(cases.batch(3, 20), {}, "cpu"),
    ),
}


@executed
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(on_threads, monkeypatch, fault):
    right, wrong, case = FAULTS[fault]
    monkeypatch.setattr(clipped_pg, "_counters", {})
    on_threads(ThreadHarness("clipped_pg", DOUBLE + SINGLE, edits=[(right, wrong)]))
    with pytest.raises((AssertionError, KernelFault)):
        case()


BARRIERS = {
    "between the warps' sums and their reader": (
        "  __syncthreads();\n  if (thread < kValues) {",
        "  if (thread < kValues) {",
    ),
    "between the rows and their sum": (
        "  __syncthreads();\n  for (int term = warp;",
        "  for (int term = warp;",
    ),
    "between the totals and their reader": (
        "  __syncthreads();\n  if (thread == 0) {\n    write_terms",
        "  if (thread == 0) {\n    write_terms",
    ),
}


@executed
@sanitized
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_missing_barrier_is_a_data_race(on_threads, monkeypatch, barrier):
    monkeypatch.setattr(clipped_pg, "_counters", {})
    on_threads(ThreadHarness("clipped_pg", DOUBLE, edits=[BARRIERS[barrier]], sanitize=True))
    with pytest.raises(KernelFault, match="data race"):
        cases.check(cases.batch(3, 70), cases.EVERYTHING, "cpu")


@executed
@pytest.mark.usefixtures("small_blocks")
def test_when_the_kernels_run(on_threads, monkeypatch):
    """Once each way; not where they would compute something else."""
    harness, launched = ThreadHarness("clipped_pg", INSTANCES), []
    on_threads(harness)

    def launch(source, expression, *rest):
        launched.append(expression.split("<")[0])
        harness.launch(source, expression, *rest)

    monkeypatch.setattr(loader, "launch", launch)

    class Doubled(ClippedPGLossFn):
        def _surrogate(self, *tensors):
            return 2 * super()._surrogate(*tensors)

    settings = cases.settings(reference_policy_kl_penalty=0.0)
    doubled = Doubled(ClippedPGLossConfig(reference_policy_kl_penalty=0.0))

    def terms(**changes):
        launched.clear()
        given = cases.batch(2, 10) | {"logprobs": cases.batch(2, 10)["logprobs"].requires_grad_()}
        vector = clipped_pg_terms(**given | changes, settings=settings)
        vector[0].backward()
        return vector[0].item(), list(launched)

    loss, used = terms()
    assert used == list(KERNELS)
    assert terms(plain=doubled._terms) == (pytest.approx(2 * loss), [])
    advantages = cases.batch(2, 10)["advantages"].requires_grad_()
    assert terms(advantages=advantages) == (pytest.approx(loss), [])
    assert advantages.grad.any()
    assert terms(backend="torch") == (pytest.approx(loss), [])


# ---- without a GPU ------------------------------------------------------------------------------


def test_a_counter_is_another_threads_memory(monkeypatch):
    """This one's may be that of a graph which torch.compile warms up for, and must not be kept."""
    made, new = [], clipped_pg._new_counter
    monkeypatch.setattr(clipped_pg, "_counters", {})
    monkeypatch.setattr(
        clipped_pg,
        "_new_counter",
        lambda device: made.append(threading.current_thread()) or new(device),
    )
    first, second = (clipped_pg._counter(torch.device("cpu")) for _ in range(2))
    assert first is second and first.tolist() == [0]
    assert len(made) == 1 and made[0] is not threading.current_thread()


@pytest.mark.usefixtures("threads")
@executed
def test_counts_that_are_numbers_are_made_on_the_device(monkeypatch):
    """A copy from the host would wait for the device."""
    monkeypatch.setattr(torch, "as_tensor", None)
    given = cases.batch(3, 20) | {"global_valid_toks": 7.0, "global_valid_seqs": 3}
    cases.run(given, {"reference_policy_kl_penalty": 0.0}, "cuda")


@needs_compiler
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    "expression", [*SINGLE, *(f"{k}<float, float, {f}>" for k in KERNELS for f in COMMON_FLAGS)]
)
def test_compiled_without_spills_and_stack(expression, architecture):
    compiled = loader.compile_kernel("clipped_pg", expression, architecture, verbose=True)
    took = compiled.resources
    assert took.stack_bytes == 0 and took.spill_bytes == 0, took
    # Three blocks of 256 threads share the 65536 registers of a multiprocessor.
    assert took.registers <= 80, took


def arguments_of(flags, device):
    given = {n: x.to(device) for n, x in cases.batch(2, 6, seed=1).items()}
    settings = cases.settings(**flags)
    prev = given["logprobs"] if settings.force_on_policy_ratio else given["prev_logprobs"]
    with_kl = settings.reference_policy_kl_penalty != 0
    return [
        given["logprobs"].clone().requires_grad_(),
        prev,
        given["generation_logprobs"],
        given["reference_logprobs"] if with_kl else None,
        given["advantages"],
        given["unfiltered_logprobs"].requires_grad_() if with_kl else None,
        given["mask"],
        given["sample_mask"],
        given["rewards"] if settings.positive_example_nll_weight > 0 else None,
        given["global_valid_seqs"],
        given["global_valid_toks"],
        *flags_and_numbers(settings),
    ]


OPERATOR_FLAGS = {
    "everything": cases.EVERYTHING,
    "gspo": cases.GSPO | {"reference_policy_kl_penalty": 0.0},
    "on policy": {"force_on_policy_ratio": True},
}


def operator(device, flags):
    """Schema, fake, autograd and AOT dispatch of both operators."""
    arguments = arguments_of(flags, device)
    operators = torch.ops.nemo_rl_ref
    torch.library.opcheck(operators.clipped_pg_terms.default, arguments)
    _, kept = operators.clipped_pg_terms(*arguments)
    grads = torch.linspace(-1, 1, len(TERMS), dtype=torch.float64, device=device)
    fixed = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(operators.clipped_pg_grad.default, [grads, kept, *fixed])


@executed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("flags", OPERATOR_FLAGS)
def test_operator(flags):
    operator("cpu", OPERATOR_FLAGS[flags])


def test_the_kernels_return_the_terms_that_have_names():
    assert len(TERMS) == clipped_pg.NUMBER_OF_TERMS


def test_an_attribute_of_a_loss_that_is_changed_counts():
    loss_fn = ClippedPGLossFn(ClippedPGLossConfig())
    loss_fn.ratio_clip_max = 0.5
    assert Settings.of(loss_fn).ratio_clip_max == 0.5


@pytest.mark.parametrize("backend", ["torch", pytest.param("cuda", marks=executed)])
def test_compiles_whole(threads, backend):
    given = cases.batch(2, 6)
    settings = cases.settings(**cases.EVERYTHING)

    def loss_and_gradient(function):
        logprobs = given["logprobs"].clone().requires_grad_()
        terms = function(logprobs)
        return terms.detach(), *torch.autograd.grad(terms[0], logprobs)

    def function(logprobs):
        return clipped_pg_terms(
            **given | {"logprobs": logprobs}, settings=settings, backend=backend
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(loss_and_gradient(compiled), loss_and_gradient(function), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logprobs": torch.ones(3)}, ValueError, r"logprobs has shape \(3,\), expected \(B, T\)"),
        ({"prev_logprobs": None}, ValueError, "prev_logprobs is None, .* force_on_policy_ratio"),
        ({"reference_logprobs": None}, ValueError, "reference_logprobs is None, .*kl_penalty=0"),
        (
            {"generation_logprobs": torch.ones(2, 6).long()},
            TypeError,
            "generation_logprobs has dtype torch.int64, expected a floating dtype",
        ),
        *[
            ({name: torch.ones(2, 7)}, ValueError, rf"{name} has shape \(2, 7\), .* \(2, 6\)")
            for name in ("advantages", "mask", "unfiltered_logprobs", "prev_logprobs")
        ],
        *[
            ({name: torch.ones(3)}, ValueError, rf"{name} has shape \(3,\), .* \(2,\)")
            for name in ("sample_mask", "rewards")
        ],
        ({"backend": "gpu"}, ValueError, "backend is 'gpu', expected 'cuda', 'torch' or None"),
        ({"backend": "cuda"}, ValueError, "asks for the CUDA kernels, but the tensors are on cpu"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        clipped_pg_terms(**cases.batch(2, 6) | changes, settings=cases.settings())


# ---- on a GPU -----------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("steps", cases.LENGTHS)
def test_sizes_on_gpu(steps):
    cases.sizes("cuda", steps)


@on_gpu
@pytest.mark.parametrize("case", [*cases.CASES, cases.flags], ids=lambda case: case.__name__)
def test_cases_on_gpu(case):
    case("cuda")


@on_gpu
@pytest.mark.parametrize("flags", OPERATOR_FLAGS)
def test_operator_on_gpu(flags):
    operator("cuda", OPERATOR_FLAGS[flags])


@on_gpu
def test_compiled_into_graphs():
    """As `torch.compile` warms up for its graphs, captures and replays them."""
    torch.use_deterministic_algorithms(False)  # its fills are no part of this
    given = {n: x.cuda() for n, x in cases.batch(4, 300, seed=1, dtype=torch.float32).items()}
    settings = cases.settings(**cases.EVERYTHING)

    def loss(logprobs):
        return clipped_pg_terms(**given | {"logprobs": logprobs}, settings=settings)[0]

    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    for call in range(4):
        results = []
        for function in (loss, compiled):
            torch.compiler.cudagraph_mark_step_begin()
            logprobs = (given["logprobs"] - 0.01 * call).requires_grad_()
            value = function(logprobs)
            value.backward()
            results.append((value.detach().clone(), logprobs.grad.clone()))
        torch.testing.assert_close(results[1], results[0])


@on_gpu
def test_other_streams_and_graphs():
    def fresh(seed):
        given = cases.batch(4, 3000, seed=seed, dtype=torch.float32)
        return {n: x.cuda() if x is not None else None for n, x in given.items()}

    def both(given):
        logprobs = given["logprobs"].detach().requires_grad_()
        terms = clipped_pg_terms(
            **given | {"logprobs": logprobs},
            settings=cases.settings(**cases.EVERYTHING),
            backend="cuda",
        )
        return terms.detach(), *torch.autograd.grad(terms[0], logprobs)

    given = fresh(1)
    expected = both(given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = both(given)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(given)
    for seed in (3, 5):
        new = fresh(seed)
        for name, tensor in given.items():
            tensor.copy_(new[name])
        graph.replay()
        for a, b in zip(captured, both(new), strict=True):
            assert torch.equal(a, b)
