# SPDX-License-Identifier: Apache-2.0
"""`linear_token_logprobs`: values, gradients, the bound on memory, and bad input."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nemo_rl_ref.logprobs import IGNORE_INDEX, linear_token_logprobs, token_logprobs
from nemo_rl_ref.logprobs import linear as module

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LEAST = 1 << 16


def make(*shape, size=8, vocabulary=50, dtype=torch.float64, bias=False, seed=0):
    """Hidden states, a head, targets (some of them -100) and a bias, or None."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    hidden, weight = normal(*shape, size).to(dtype), normal(vocabulary, size).to(dtype)
    targets = torch.randint(vocabulary, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < 0.3] = IGNORE_INDEX
    tensors = [hidden, weight] + ([normal(vocabulary).to(dtype)] if bias else [])
    return [t.requires_grad_() for t in tensors], targets


def definition(tensors, targets, temperature=1.0, logit_softcap=None):
    """The same from all logits, in float64."""
    hidden, weight, *bias = (tensor.double() for tensor in tensors)
    logits = torch.nn.functional.linear(hidden, weight, *bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return token_logprobs(logits, targets, temperature=temperature, return_entropy=True)


def loss_of(outputs):
    weights = torch.linspace(-1, 2, outputs[0].numel(), dtype=torch.float64)
    weights = weights.view(outputs[0].shape)
    return sum((w * o).sum() for w, o in zip((weights, weights.flip(-1)), outputs, strict=False))


def check(tensors, targets, entropy=True, rtol=None, **options):
    hidden, weight, *bias = tensors
    bias = bias[0] if bias else None
    outputs = linear_token_logprobs(
        hidden, weight, targets, bias=bias, return_entropy=entropy, **options
    )
    outputs = outputs if entropy else (outputs,)
    options.pop("max_extra_bytes", None)
    expected = definition(tensors, targets, **options)[: len(outputs)]
    eps = torch.finfo(hidden.dtype).eps
    # Logits are rounded to the dtype of the hidden states; they are about 3.
    tolerance = {"rtol": 20 * eps, "atol": 40 * eps}
    for output, value in zip(outputs, expected, strict=True):
        work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        assert output.dtype == work and output.shape == targets.shape
        torch.testing.assert_close(output.double(), value, **tolerance)
    needed = [tensor for tensor in tensors if tensor.requires_grad]
    grads = torch.autograd.grad(loss_of(outputs), needed)
    exact = torch.autograd.grad(loss_of(expected), needed)
    for grad, value, tensor in zip(grads, exact, needed, strict=True):
        assert grad.dtype == tensor.dtype
        torch.testing.assert_close(grad.double(), value.double(), **tolerance)


@pytest.mark.parametrize("extra", [512 << 20, LEAST], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, bias, softcap, extra, monkeypatch):
    if extra == LEAST:
        monkeypatch.setattr(module, "_CPU_TILE_BYTES", 1)
        monkeypatch.setattr(module, "_CPU_COLUMNS", 7)
    tensors, targets = make(5, 9, dtype=dtype, bias=bias)
    for entropy in (False, True):
        check(tensors, targets, entropy, temperature=0.8, logit_softcap=softcap)


@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=2).map(tuple),
    vocabulary=st.integers(1, 60),
    more=st.integers(0, 3000),
    tile=st.integers(1, 40),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any),
    seed=st.integers(0, 99),
)
def test_any_shape_and_any_memory(shape, vocabulary, more, tile, needs, seed):
    """From the least memory there can be, with every subset of the gradients."""
    tensors, targets = make(*shape, vocabulary=vocabulary, bias=True, seed=seed)
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(need)
    rows = targets.numel()
    # Float64 with entropy: two tiles.
    extra = rows * module._BYTES_PER_ROW + 16 * max(rows, vocabulary) + more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CPU_TILE_BYTES", 8 * tile)
        patch.setattr(module, "_CPU_COLUMNS", tile)
        check(tensors, targets, max_extra_bytes=extra)


def test_gradients_apart():
    """Tiles of their own for either gradient, where a float32 sum would take too much."""
    tensors, targets = make(300, size=64, vocabulary=700, dtype=torch.bfloat16)
    hidden, weight = tensors
    for extra, together in ((512 << 20, True), (300 * 128 + 700 * 100, False)):
        plan = module.plan(hidden, weight, None, extra, True, False)
        assert plan.together is together
        # 64 terms of about 1 make logits of about 8, rounded to bfloat16.
        outputs = linear_token_logprobs(
            hidden, weight, targets, return_entropy=True, max_extra_bytes=extra
        )
        logits = torch.nn.functional.linear(hidden, weight)
        expected = token_logprobs(logits, targets, return_entropy=True)
        for output, value in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, value, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(loss_of(outputs), tensors)
        exact = torch.autograd.grad(loss_of(definition(tensors, targets)), tensors)
        for grad, value in zip(grads, exact, strict=True):
            error = (grad.double() - value).norm() / value.norm()
            assert error < 0.03


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    tensors, targets = make(4, size=3, vocabulary=6, bias=True)
    torch.autograd.gradcheck(
        lambda hidden, weight, bias: linear_token_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=1.3,
            logit_softcap=softcap,
            return_entropy=True,
        ),
        tensors,
    )


def test_minus_infinity_and_ignored_rows(monkeypatch):
    """A bias of -inf takes tokens out, also all of a tile; an ignored row hides what is in it."""
    monkeypatch.setattr(module, "_CPU_TILE_BYTES", 1)
    monkeypatch.setattr(module, "_CPU_COLUMNS", 5)
    (hidden, weight, bias), targets = make(6, vocabulary=20, bias=True)
    with torch.no_grad():
        bias[:7] = -torch.inf
    targets[:] = torch.tensor([9, 19, 7, IGNORE_INDEX, 12, 3])
    outputs = linear_token_logprobs(hidden, weight, targets, bias=bias, return_entropy=True)
    expected = definition((hidden, weight[7:], bias[7:]), (targets - 7).clamp(min=0))
    kept = torch.tensor([0, 1, 2, 4])
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output[kept], value[kept])
        assert output[3] == 0
    assert outputs[0][5] == -torch.inf
    grads = torch.autograd.grad(sum(o[kept].sum() for o in outputs), (hidden, weight))
    exact = torch.autograd.grad(sum(e[kept].sum() for e in expected), (hidden, weight))
    torch.testing.assert_close(grads, exact)


def test_large_logits_keep_their_digits():
    tensors, targets = make(20, dtype=torch.float32, bias=True)
    with torch.no_grad():
        tensors[2].add_(1e4)
    hidden, weight, bias = tensors
    output = linear_token_logprobs(hidden, weight, targets, bias=bias)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close(output, token_logprobs(logits, targets), rtol=0, atol=5e-6)


def test_compiled_checkpointed_and_under_autocast():
    tensors, targets = make(2, 5, dtype=torch.float32)
    hidden, weight = tensors

    def loss(hidden, weight):
        logprobs, entropy = linear_token_logprobs(hidden, weight, targets, return_entropy=True)
        return (logprobs.sin() + entropy).sum()

    expected = torch.autograd.grad(loss(hidden, weight), tensors)
    for other in (
        torch.compile(loss, fullgraph=True, backend="aot_eager"),
        partial(checkpoint, loss, use_reentrant=False),
        partial(checkpoint, loss, use_reentrant=True),
    ):
        value = other(hidden, weight)
        value.backward()
        torch.testing.assert_close((hidden.grad, weight.grad), expected)
        hidden.grad = weight.grad = None

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = linear_token_logprobs(hidden, weight, targets)
        logits = torch.nn.functional.linear(hidden, weight)
        torch.testing.assert_close(value, token_logprobs(logits, targets))
        (grad,) = torch.autograd.grad(value.sum(), weight)
        assert value.dtype == grad.dtype == torch.float32
        double = linear_token_logprobs(hidden.double(), weight.double(), targets)
    assert double.dtype == torch.float64


@pytest.mark.parametrize("bias", [False, True])
def test_operators(bias):
    tensors, targets = make(6, bias=bias)
    arguments = (*tensors[:2], targets, tensors[2] if bias else None, 0.9, 5.0, LEAST, True, False)
    torch.library.opcheck(module.linear_token_logprobs_op, arguments)


def test_double_backward_says_no():
    (hidden, weight), targets = make(4)
    output = linear_token_logprobs(hidden, weight, targets)
    (grad,) = torch.autograd.grad(output.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_token_logprobs has no second derivative"):
        grad.sum().backward()


def test_keeps_three_numbers_a_row():
    (hidden, weight), targets = make(40, vocabulary=200)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_token_logprobs(hidden, weight, targets, return_entropy=True)
    new = [t for t in saved if t.data_ptr() not in (hidden.data_ptr(), weight.data_ptr())]
    assert sum(t.numel() for t in new if t.data_ptr() != targets.data_ptr()) == 3 * 40


def allocated(function):
    """The largest sum of memory that a call had allocated at once, and what is left of it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        largest = max(largest, total)
    return largest, total, result


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mebibytes", [0.6, 2.0])
def test_extra_memory(mebibytes, dtype, entropy, softcap, monkeypatch):
    """The bound holds, forward and backward, where all logits would be 16 or 32 MiB."""
    for name in ("_CPU_TILE_BYTES", "_CPU_ALL_TILE_BYTES"):
        monkeypatch.setattr(module, name, 1 << 30)  # as much as is allowed
    tensors, targets = make(1024, size=32, vocabulary=4096, dtype=dtype, bias=True)
    hidden, weight, bias = tensors
    extra = int(mebibytes * 2**20)
    largest, kept, outputs = allocated(
        lambda: linear_token_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            logit_softcap=softcap,
            max_extra_bytes=extra,
            return_entropy=entropy,
        )
    )
    a_row = 4 * dtype.itemsize  # two results and two numbers for backward
    assert kept <= 1024 * a_row
    assert extra / 4 < largest - kept <= extra
    outputs = outputs if entropy else (outputs,)
    ones = [torch.ones_like(output) for output in outputs]
    largest, kept, grads = allocated(lambda: torch.autograd.grad(outputs, tensors, ones))
    gradients = sum(grad.nbytes for grad in grads)
    assert gradients - 1024 * a_row <= kept <= gradients  # what was kept for backward is free
    assert extra / 4 < largest - gradients <= extra


class Returned(TorchDispatchMode):
    """The bytes of every tensor that an operation returns in memory of its own."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage().data_ptr() for t in given}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.sizes.append(result.nbytes)
        return result


@pytest.mark.parametrize("together", [True, False])
def test_extra_memory_in_bfloat16(together, monkeypatch):
    """The buffers and sums, without the matrix products' own workspaces, which are large on a CPU.

    Whatever else is returned is a number a row, or one a column.
    """
    for name in ("_CPU_TILE_BYTES", "_CPU_ALL_TILE_BYTES"):
        monkeypatch.setattr(module, name, 1 << 30)
    (hidden, weight), targets = make(512, size=64, vocabulary=4096, dtype=torch.bfloat16)
    arguments = (hidden.detach(), weight.detach(), targets, None, 1.0, 4.0)
    extra = (1300 if together else 160) << 10
    assert module.plan(hidden, weight, 4.0, extra, True, False).together is together
    grads = (torch.ones(512), torch.ones(512))
    with Returned() as forward:
        _, entropy, state = module.forward(*arguments, extra, True, False)
    with Returned() as backward:
        results = module.backward(*arguments, extra, False, (state, entropy), grads, (True,) * 3)
    gradients = sum(grad.nbytes for grad in results)
    for mode, kept in ((forward, 0), (backward, gradients)):
        large = [size for size in mode.sizes if size > 512 * 8]
        assert extra / 4 < sum(large) - kept <= extra


def test_too_little_memory():
    tensors, targets = make(10, vocabulary=100)
    least = 10 * module._BYTES_PER_ROW + 8 * 100
    with pytest.raises(
        ValueError,
        match=rf"max_extra_bytes is {least - 1}, expected at least {least} for 10 rows and a "
        "vocabulary of 100",
    ):
        linear_token_logprobs(*tensors, targets, max_extra_bytes=least - 1)
    linear_token_logprobs(*tensors, targets, max_extra_bytes=least).sum().backward()


def test_tiles_on_a_gpu():
    """Sizes at N=8192, H=4096, V=128256 in bfloat16, where 512 MiB are allowed."""
    hidden = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta")
    plan = module.plan(hidden, weight, None, 512 << 20, True, True)
    assert plan.together
    assert plan.forward == (8192, 32128) and plan.columns == 21376
    # A batch whose float32 sum would take all of it: five products, none with a narrow tile.
    plan = module.plan(hidden.repeat(16, 1), weight, None, 512 << 20, True, True)
    assert not plan.together and plan.rows > 1500 and plan.columns > 1500


HIDDEN, WEIGHT, IDS = torch.zeros(2, 3, 5), torch.zeros(7, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": HIDDEN.long()}, TypeError, r"hidden has dtype torch.int64, expected one of"),
        ({"weight": WEIGHT.double()}, TypeError, r"weight has dtype torch.float64, expected hid"),
        ({"bias": torch.zeros(7).half()}, TypeError, r"bias has dtype torch.float16"),
        ({"targets": IDS.int()}, TypeError, r"targets has dtype torch.int32"),
        ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden has shape \(\), expected \(..., H\)"),
        ({"weight": WEIGHT.t()}, ValueError, r"weight has shape \(5, 7\), expected \(V, 5\)"),
        ({"weight": WEIGHT[:0]}, ValueError, r"weight has shape \(0, 5\), expected \(V, 5\) with"),
        ({"targets": IDS[:, :2]}, ValueError, r"targets has shape \(2, 2\), expected .*\(2, 3\)"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias has shape \(6,\), expected \(7,\)"),
        ({"weight": WEIGHT.to("meta")}, ValueError, r"weight is on meta, expected hidden's cpu"),
        ({"targets": IDS + 7}, ValueError, r"targets holds 7, expected -100 or 0 to 6"),
        ({"temperature": 0.0}, ValueError, r"temperature is 0.0"),
        ({"logit_softcap": 0.0}, ValueError, r"logit_softcap is 0.0, expected a finite number"),
        ({"max_extra_bytes": 10}, ValueError, r"max_extra_bytes is 10, expected at least 796"),
        ({"backend": "triton"}, ValueError, r"backend is 'triton', expected 'cuda', 'torch' or N"),
        ({"backend": "cuda"}, ValueError, r"the argument backend asks for the CUDA kernels, but"),
    ],
)
def test_bad_input(changed, error, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": IDS, **changed}
    with pytest.raises(error, match=message):
        linear_token_logprobs(**arguments)
