# SPDX-License-Identifier: Apache-2.0
"""`token_logprobs`: values, gradients, memory, and bad input."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_rl_ref.logprobs import IGNORE_INDEX, token_logprobs
from nemo_rl_ref.logprobs import token as module

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(*shape, vocabulary=11, dtype=torch.float32, ignored=0.3, seed=0):
    """Random logits (*shape, vocabulary) and targets, some of them -100."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*shape, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < ignored] = IGNORE_INDEX
    return logits.to(dtype), targets


def definition(logits, targets, temperature=1.0):
    """The two results in float64, straight from the definition."""
    logp = (logits.double() / temperature).log_softmax(-1)
    off = targets == IGNORE_INDEX
    chosen = logp.gather(-1, targets.masked_fill(off, 0)[..., None])[..., 0]
    entropy = -torch.special.xlogy(logp.exp(), logp.exp()).sum(-1)
    return chosen.masked_fill(off, 0.0), entropy.masked_fill(off, 0.0)


def weighted_sum(logprobs, entropy):
    """A scalar whose gradient differs between positions and between the two outputs."""
    weights = torch.linspace(-1, 2, logprobs.numel(), dtype=torch.float64).view(logprobs.shape)
    return (weights * logprobs).sum() + (weights.flip(-1) * entropy.sin()).sum()


@pytest.fixture
def small_pieces(monkeypatch):
    """Work in pieces of a few elements, so that small tensors are cut in every way."""
    monkeypatch.setattr(module, "_PIECE_ELEMENTS", 8)


@pytest.fixture
def limit(monkeypatch):
    """The largest number of elements of a piece, made the same on any number of cores."""
    elements = 1 << 19
    monkeypatch.setattr(module, "_PIECE_ELEMENTS", elements // torch.get_num_threads())
    return elements


@pytest.mark.parametrize("pieces", ["one", "many"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, temperature, pieces, request):
    if pieces == "many":
        request.getfixturevalue("small_pieces")
    logits, targets = make(5, 9, dtype=dtype)
    logits.requires_grad_()
    outputs = token_logprobs(logits, targets, temperature=temperature, return_entropy=True)
    expected = definition(logits, targets, temperature)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = (
        {"rtol": 1e-6, "atol": 2e-6} if work == torch.float32 else {"rtol": 0, "atol": 1e-14}
    )
    for output, value in zip(outputs, expected, strict=True):
        assert output.dtype == work
        torch.testing.assert_close(output.double(), value, **tolerance)

    (grad,) = torch.autograd.grad(weighted_sum(*outputs), logits)
    (exact,) = torch.autograd.grad(weighted_sum(*expected), logits)
    assert grad.dtype == dtype
    # The gradient is rounded once, to the dtype of the logits.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), exact.double(), rtol=2 * eps, atol=max(eps / 8, 1e-6))
    assert not grad[targets == IGNORE_INDEX].any()


def test_only_logprobs():
    logits, targets = make(4, 6)
    logits.requires_grad_()
    output = token_logprobs(logits, targets)
    expected = definition(logits, targets)[0]
    torch.testing.assert_close(output.double(), expected)
    (grad,) = torch.autograd.grad(output.square().sum(), logits)
    (exact,) = torch.autograd.grad(expected.square().sum(), logits)
    torch.testing.assert_close(grad, exact)


def test_only_entropy_is_used():
    logits, targets = make(4, 6, dtype=torch.float64)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(
        token_logprobs(logits, targets, return_entropy=True)[1].sum(), logits
    )
    (exact,) = torch.autograd.grad(definition(logits, targets)[1].sum(), logits)
    torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradcheck(small_pieces, temperature):
    logits, targets = make(4, vocabulary=4, dtype=torch.float64)
    logits.requires_grad_()
    for entropy in (False, True):
        torch.autograd.gradcheck(
            lambda x, entropy=entropy: token_logprobs(
                x, targets, temperature=temperature, return_entropy=entropy
            ),
            logits,
        )


shapes = st.lists(st.integers(0, 4), min_size=0, max_size=3).map(tuple)


@given(
    shape=shapes,
    vocabulary=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "shifted", "transposed", "vocabulary first", "expanded"]),
    limit=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_any_shape_and_stride(shape, vocabulary, dtype, layout, limit, seed):
    """Any leading dimensions, also none or empty, any strides, pieces of any size."""
    logits, targets = make(*shape, vocabulary=vocabulary, dtype=dtype, seed=seed)
    if layout == "shifted" and shape:
        logits = torch.cat([logits, logits[..., -1:, :]], -2)[..., :-1, :]
    elif layout == "transposed" and len(shape) > 1:
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "vocabulary first":
        logits = logits.movedim(-1, 0).contiguous().movedim(0, -1)
    elif layout == "expanded" and shape and shape[0]:
        logits = logits[:1].expand_as(logits)
    logits = logits.detach().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_ELEMENTS", limit)
        outputs = token_logprobs(logits, targets, return_entropy=True)
        (grad,) = torch.autograd.grad(weighted_sum(*outputs), logits)
    expected = definition(logits, targets)
    for output, value in zip(outputs, expected, strict=True):
        assert output.shape == shape
        torch.testing.assert_close(output.double(), value, rtol=1e-6, atol=3e-6)
    (exact,) = torch.autograd.grad(weighted_sum(*expected), logits)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), exact.double(), rtol=2 * eps, atol=max(eps, 2e-6))


@given(shape=shapes.map(lambda shape: (*shape, 7)), limit=st.integers(1, 200))
def test_pieces_cover_every_row_once(shape, limit):
    seen = torch.zeros(shape, dtype=torch.int64)
    for piece in module._cut(shape, limit):
        part = seen[piece]
        assert part.numel() <= max(limit, 7)
        part += 1
    assert (seen == 1).all()


def test_pieces_change_no_bit(monkeypatch):
    logits, targets = make(7, 50, vocabulary=64, dtype=torch.bfloat16)
    logits.requires_grad_()

    def run():
        outputs = token_logprobs(logits, targets, temperature=0.9, return_entropy=True)
        return *outputs, *torch.autograd.grad(weighted_sum(*outputs), logits)

    first, again = run(), run()
    monkeypatch.setattr(module, "_PIECE_ELEMENTS", 200)
    assert len(module._pieces(logits)) > 7
    for a, b, c in zip(first, again, run(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_large_logits_keep_their_digits():
    """Taking the target's logit minus the log-sum-exp would lose 1e-3 here."""
    logits, targets = make(50, ignored=0)
    logits = logits + 1e4
    torch.testing.assert_close(
        token_logprobs(logits, targets).double(), definition(logits, targets)[0], rtol=0, atol=5e-6
    )


def test_all_logits_with_a_shifted_target_or_a_view():
    """Both ways of the docstring give the same."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(9, (3, 8), generator=generator)
    logits = torch.randn(3, 8, 9, generator=generator, requires_grad=True)
    view = token_logprobs(logits[:, :-1], ids[:, 1:])
    shifted = torch.cat([ids[:, 1:], torch.full((3, 1), IGNORE_INDEX)], 1)
    whole = token_logprobs(logits, shifted)
    assert torch.equal(view, whole[:, :-1]) and not whole[:, -1].any()
    (a,) = torch.autograd.grad(view.exp().sum(), logits)
    (b,) = torch.autograd.grad(whole[:, :-1].exp().sum(), logits)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("entropy", [False, True])
def test_minus_infinity(entropy):
    inf = float("inf")
    logits = torch.tensor([[0.0, -inf, 1.0], [-inf, 2.0, -inf]], requires_grad=True)
    result = token_logprobs(logits, torch.tensor([1, 1]), return_entropy=entropy)
    values = result[0] if entropy else result
    assert values.tolist() == [-inf, 0.0]
    p = torch.tensor([0.0, 1.0]).softmax(-1)
    expected = torch.tensor([[-p[0], 1.0, -p[1]], [0.0, 0.0, 0.0]])
    if entropy:
        h = -(p * p.log()).sum()
        torch.testing.assert_close(result[1], torch.stack([h, h * 0]))
        extra = -p * (p.log() + h)
        expected[0] += torch.tensor([extra[0], 0.0, extra[1]])
    (grad,) = torch.autograd.grad(sum(result).sum() if entropy else values.sum(), logits)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("entropy", [False, True])
def test_ignored_rows_hide_nan_and_infinity(entropy):
    """Whatever the logits of an ignored row, and whatever gradient arrives there."""
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [-torch.inf, -torch.inf]])
    logits.requires_grad_()
    targets = torch.tensor([0, IGNORE_INDEX, IGNORE_INDEX])
    outputs = token_logprobs(logits, targets, return_entropy=entropy)
    for output in outputs if entropy else (outputs,):
        assert output[0] != 0 and output[1:].tolist() == [0.0, 0.0]
    arriving = torch.tensor([1.0, torch.inf, torch.nan])
    torch.autograd.backward(outputs, (arriving, arriving) if entropy else arriving)
    assert logits.grad[0].isfinite().all() and logits.grad[0].all()
    assert logits.grad[1:].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_no_grad_autocast_and_checkpoint():
    logits, targets = make(4, 6)
    logits.requires_grad_()
    expected = token_logprobs(logits, targets)
    (exact,) = torch.autograd.grad(expected.sum(), logits)
    with torch.no_grad():
        value = token_logprobs(logits, targets)
    assert not value.requires_grad and torch.equal(value, expected)
    assert not token_logprobs(logits.detach(), targets).requires_grad

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = token_logprobs(logits, targets)
        assert value.dtype == torch.float32 and torch.equal(value, expected)
        (grad,) = torch.autograd.grad(value.sum(), logits)
    assert torch.equal(grad, exact)

    for reentrant in (False, True):
        value = torch.utils.checkpoint.checkpoint(
            token_logprobs, logits, targets, use_reentrant=reentrant
        )
        value.sum().backward()
        assert torch.equal(logits.grad, exact)
        logits.grad = None


@pytest.mark.parametrize("function", [torch.sum, lambda x: x.square().sum()])
def test_double_backward_says_no(function):
    """Also where the incoming gradient is a constant, which would else be silently wrong."""
    logits, targets = make(4)
    logits.requires_grad_()
    output = token_logprobs(logits, targets)
    (grad,) = torch.autograd.grad(function(output), logits, create_graph=True)
    assert torch.equal(
        grad, torch.autograd.grad(function(token_logprobs(logits, targets)), logits)[0]
    )
    with pytest.raises(RuntimeError, match="token_logprobs has no second derivative"):
        (grad.sum() + logits.sum()).backward()


class Allocations(TorchDispatchMode):
    """Records (elements, dtype) of each tensor that an operation returns in memory of its own."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tensors_in([*args, *kwargs.values()])}
        for tensor in tensors_in([result]):
            if tensor.untyped_storage().data_ptr() not in given:
                self.seen.append((tensor.numel(), tensor.dtype))
        return result


def tensors_in(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_of_the_logits(dtype, entropy, view, limit):
    """No tensor beyond a piece but the gradient, once, in the dtype of the logits."""
    rows, vocabulary = 6, 1 << 12
    length = 4 * limit // (rows * vocabulary)
    logits = torch.randn(rows, length + 1, vocabulary, dtype=dtype)
    logits = logits[:, :-1] if view else logits[:, 1:].contiguous()
    logits.requires_grad_()
    targets = torch.randint(vocabulary, (rows, length))
    with Allocations() as forward:
        outputs = token_logprobs(logits, targets, temperature=0.9, return_entropy=entropy)
    with Allocations() as backward:
        torch.autograd.grad(sum(outputs).sum() if entropy else outputs.sum(), logits)
    assert forward.seen and backward.seen
    assert max(forward.seen, key=lambda seen: seen[0])[0] <= limit
    large = [seen for seen in backward.seen if seen[0] > limit]
    assert large == [(logits.numel(), dtype)]


def peak_growth_mib(function):
    """How much the resident memory of this process grew at most during a call."""
    status = Path("/proc/self/status")

    def read(name):
        return int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to VmRSS
    before = read("VmRSS")
    function()
    return read("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("entropy", [False, True])
def test_peak_memory(entropy, limit):
    """What the allocations above cannot see: memory inside an operation."""
    logits = torch.ones(4, 129, 1 << 16, dtype=torch.bfloat16)  # 64 MiB, 128 in float32
    targets = torch.randint(1 << 16, (4, 128))

    def forward():
        token_logprobs(logits[:, :-1], targets, return_entropy=entropy)

    forward()
    assert peak_growth_mib(forward) < 32


@pytest.mark.parametrize("entropy", [False, True])
def test_saves_the_logits_and_nothing_of_their_size(entropy):
    logits, targets = make(4, 6)
    logits.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        token_logprobs(logits, targets, return_entropy=entropy)
    large = [tensor for tensor in saved if tensor.numel() >= logits.numel()]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]


GOOD, IDS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "targets", "temperature", "error", "message"),
    [
        (
            GOOD.long(),
            IDS,
            1.0,
            TypeError,
            r"logits has dtype torch.int64, expected one of float32",
        ),
        (GOOD.cfloat(), IDS, 1.0, TypeError, r"logits has dtype torch.complex64"),
        (GOOD, IDS.int(), 1.0, TypeError, r"targets has dtype torch.int32, expected torch.int64"),
        (GOOD, IDS[:, :2], 1.0, ValueError, r"targets has shape \(2, 2\), expected .*\(2, 3\)"),
        (GOOD, IDS[..., None], 1.0, ValueError, r"targets has shape \(2, 3, 1\)"),
        (torch.tensor(1.0), IDS, 1.0, ValueError, r"logits has shape \(\), expected \(..., V\)"),
        (GOOD[..., :0], IDS, 1.0, ValueError, r"logits has shape \(2, 3, 0\).* with V > 0"),
        (GOOD, IDS + 5, 1.0, ValueError, r"targets holds 5, expected -100 or 0 to 4"),
        (GOOD, IDS - 1, 1.0, ValueError, r"targets holds -1, expected -100 or 0 to 4"),
        (GOOD, IDS - 101, 1.0, ValueError, r"targets holds -101, expected -100 or 0 to 4"),
        (GOOD, IDS, 0.0, ValueError, r"temperature is 0.0, expected a finite number above 0"),
        (GOOD, IDS, -1.0, ValueError, r"temperature is -1.0"),
        (GOOD, IDS, float("nan"), ValueError, r"temperature is nan"),
        (GOOD, IDS, float("inf"), ValueError, r"temperature is inf"),
        (GOOD, IDS.to("meta"), 1.0, ValueError, r"targets is on meta, expected the logits' cpu"),
    ],
)
def test_bad_input(logits, targets, temperature, error, message):
    with pytest.raises(error, match=message):
        token_logprobs(logits, targets, temperature=temperature)


def test_a_bad_target_among_ignored_ones():
    targets = torch.tensor([0, IGNORE_INDEX, -5, 2])
    with pytest.raises(ValueError, match=r"targets holds -5, expected -100 or 0 to 4"):
        token_logprobs(torch.zeros(4, 5), targets)
