# SPDX-License-Identifier: Apache-2.0
"""The log-probability kernels through their operators on a GPU: the cases of tests/kernels."""

import shutil
import subprocess
import sys
from pathlib import Path

import conversion_cases
import pytest
import token_logprobs_cases as cases
import torch

from nemo_rl_ref.kernels import loader
from nemo_rl_ref.logprobs import linear, linear_token_logprobs, token_logprobs
from nemo_rl_ref.logprobs.token import _token_logprobs_op

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA GPU, so the kernels were not run on one"
    ),
    # The references and the matrix products are not what is tested here.
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """PyTorch fills memory that nobody wrote to with NaN, so an element left out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("vocabulary", cases.VOCABULARIES)
@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
def test_sizes(dtype, vocabulary):
    cases.sizes(DEVICE, dtype, vocabulary)


@pytest.mark.parametrize("case", cases.SPECIAL, ids=lambda case: case.__name__)
@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
def test_special(dtype, case):
    case(DEVICE, dtype)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
def test_pieces_and_cap(dtype, softcap):
    cases.pieces_and_cap(DEVICE, dtype, softcap)


def test_far_rows():
    cases.far_rows(DEVICE)


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("name", conversion_cases.TYPES)
def test_conversions(name, portable):
    """The instructions give the bits of the portable code."""
    conversion_cases.conversions(DEVICE, name, portable)


@pytest.mark.parametrize("name", [*conversion_cases.TYPES, "float", "double"])
def test_repacking(name):
    conversion_cases.repacking(DEVICE, name)


@pytest.mark.parametrize("inplace", [False, True])
def test_operator(inplace):
    logits, targets = cases.random_case((2, 3), 500, torch.float32, DEVICE)
    arguments = (logits.requires_grad_(), targets, 0.9, True, inplace, True)
    torch.library.opcheck(_token_logprobs_op, arguments)


def head(dtype, rows=300, size=64, vocabulary=5000):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, size), (vocabulary, size), (vocabulary,))
    tensors = [
        (torch.randn(shape, generator=generator, dtype=torch.float64) / 4)
        .to(dtype)
        .to(DEVICE)
        .requires_grad_()
        for shape in shapes
    ]
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[5] = -100
    return tensors, targets.to(DEVICE)


def test_linear_operator():
    (hidden, weight, bias), targets = head(torch.float32)
    arguments = (hidden, weight, targets, bias, 0.9, 5.0, 2 << 20, True, True)
    torch.library.opcheck(linear.linear_token_logprobs_op, arguments)


@pytest.mark.parametrize("extra", [512 << 20, 1 << 20])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_linear(dtype, softcap, extra):
    """As plain PyTorch in float64 on the CPU, but for rounding; and within the bound."""
    (hidden, weight, bias), targets = head(dtype)
    options = {"temperature": 0.9, "logit_softcap": softcap, "return_entropy": True}

    def run(tensors, targets, **more):
        hidden, weight, bias = tensors
        outputs = linear_token_logprobs(hidden, weight, targets, bias=bias, **options, **more)
        loss = sum((i + 1) * output.double().sin().sum() for i, output in enumerate(outputs))
        return [*outputs, *torch.autograd.grad(loss, tensors)]

    run((hidden, weight, bias), targets, max_extra_bytes=extra)  # loads kernels and workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run((hidden, weight, bias), targets, max_extra_bytes=extra)
    grown = torch.cuda.max_memory_allocated() - before
    kept = sum(t.nbytes for t in results) + 40 * 512  # small tensors take 512 bytes each
    assert grown <= extra + 1.1 * kept
    exact = [t.detach().cpu().double().requires_grad_() for t in (hidden, weight, bias)]
    expected = run(exact, targets.cpu())
    eps = torch.finfo(dtype).eps
    for result, value in zip(results, expected, strict=True):
        error = (result.cpu().double() - value).norm() / value.norm()
        assert error < max(8 * eps, 1e-12 if dtype == torch.float64 else 2e-6)


def test_gradcheck():
    logits, targets = cases.random_case((3,), 40, torch.float64, DEVICE)
    torch.autograd.gradcheck(
        lambda x: token_logprobs(x, targets, temperature=0.9, return_entropy=True, backend="cuda"),
        logits.requires_grad_(),
    )
    tensors, targets = head(torch.float64, rows=5, size=3, vocabulary=20)
    torch.autograd.gradcheck(
        lambda hidden, weight, bias: linear_token_logprobs(
            hidden, weight, targets, bias=bias, logit_softcap=2.0, return_entropy=True
        ),
        tensors,
    )


def test_the_current_stream():
    """On a stream of its own, behind work that takes long."""
    expected, targets = cases.random_case((64,), 5000, torch.bfloat16, DEVICE)
    logits = torch.zeros_like(expected)
    token_logprobs(logits, targets, backend="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        logits.copy_(expected)
        leaf = logits.clone().requires_grad_()
        output = token_logprobs(leaf, targets, backend="cuda")
        (grad,) = torch.autograd.grad(output.sum(), leaf)
    stream.synchronize()
    plain = expected.clone().requires_grad_()
    value = token_logprobs(plain, targets, backend="torch")
    torch.testing.assert_close(output, value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, torch.autograd.grad(value.sum(), plain)[0])


def test_graph_replay():
    torch.use_deterministic_algorithms(False)  # its fills are no part of a graph
    logits, targets = cases.random_case((32,), 5000, torch.bfloat16, DEVICE)
    static = logits.clone().requires_grad_()

    def step():
        logprobs, entropy = token_logprobs(static, targets, return_entropy=True, backend="cuda")
        return logprobs, entropy, torch.autograd.grad((logprobs + entropy).sum(), static)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        with torch.no_grad():
            static.copy_(cases.random_case((32,), 5000, torch.bfloat16, DEVICE, seed=seed)[0])
        expected = [tensor.clone() for tensor in step()]
        for tensor in captured:
            tensor.detach().fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for tensor, value in zip(captured, expected, strict=True):
            assert torch.equal(tensor, value)


def test_compiled():
    logits, targets = cases.random_case((64,), 1000, torch.bfloat16, DEVICE)

    def loss(logits):
        return token_logprobs(logits * 2, targets, inplace_backward=True, backend="cuda").sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        x = logits.clone().requires_grad_()
        value = function(x)
        value.backward()
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="one GPU or none, so no other than the first was tried"
)
def test_another_device():
    device = torch.device("cuda", 1)
    for dtype in cases.DTYPES.values():
        cases.sizes(device, dtype, 1000)


@pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None,
    reason="compute-sanitizer is not installed, so memory accesses and races were not checked",
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool):
    script = Path(__file__).parent / "sanitize.py"
    done = subprocess.run(
        [sys.executable, str(script), tool], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_what_runs_are_the_kernels():
    logits, targets = cases.random_case((4,), 100, torch.bfloat16, DEVICE)
    assert loader.unavailable(DEVICE) is None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        token_logprobs(logits, targets)
        torch.cuda.synchronize()
    assert any("token_logprobs_forward" in event.key for event in profile.key_averages())
