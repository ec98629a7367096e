# SPDX-License-Identifier: Apache-2.0
"""Cases for the kernels of ``token_logprobs.cu``: run on threads of the CPU, and on a GPU.

Each is a function of a device that raises AssertionError where the kernels are wrong. They call the
public function with ``backend="cuda"``.
"""

import math

import torch

from nemo_rl_ref.kernels import token_logprobs as kernel
from nemo_rl_ref.logprobs import IGNORE_INDEX, token_logprobs

DTYPES = {
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "double": torch.float64,
}
VOCABULARIES = [1, 31, 32, 33, 1000, 128257]
INF = math.inf


def definition(logits, targets, temperature=1.0, softcap=None):
    """Log-probabilities and entropies in float64, straight from the definition."""
    logits = logits.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = (logits / temperature).log_softmax(-1)
    off = targets == IGNORE_INDEX
    chosen = logp.gather(-1, targets.masked_fill(off, 0)[..., None])[..., 0]
    # A token of probability 0 adds 0; its gradient, too, is 0.
    entropy = -(logp.exp() * logp.clamp(min=-1e300)).sum(-1)
    return chosen.masked_fill(off, 0.0), entropy.masked_fill(off, 0.0)


def framed(values, margin=24):
    """The same values with NaN before and after them in memory, off by one element."""
    buffer = torch.full((values.numel() + 2 * margin + 1,), math.nan, dtype=values.dtype)
    buffer = buffer.to(values.device)
    inside = buffer[margin + 1 : -margin].view(values.shape)
    return inside.copy_(values), buffer


def check(logits, targets, temperature=1.0, entropy=True, **options):
    """Results and the gradient of a mixture of both, against the definition."""
    logits = logits.detach().requires_grad_()
    outputs = token_logprobs(
        logits, targets, temperature=temperature, return_entropy=entropy, backend="cuda", **options
    )
    outputs = outputs if entropy else (outputs,)
    original = logits.detach().clone()  # because of inplace_backward
    a, b = (
        torch.linspace(lo, 2, targets.numel(), dtype=torch.float64, device=logits.device)
        for lo in (-1.5, 0.5)
    )
    weights = (a.view(targets.shape), b.view(targets.shape).flip(-1) if targets.ndim else b[0])
    (grad,) = torch.autograd.grad(
        sum((w * o).sum() for w, o in zip(weights, outputs, strict=False)), logits
    )
    exact = original.double().requires_grad_()
    expected = definition(exact, targets, temperature)[: len(outputs)]
    expected_loss = sum((w * o).sum() for w, o in zip(weights, expected, strict=False))
    (exact_grad,) = torch.autograd.grad(expected_loss, exact)
    compare(outputs, expected, grad, exact_grad, logits.dtype)
    assert not grad[targets == IGNORE_INDEX].any()


def compare(outputs, expected, grad, exact_grad, dtype):
    double = dtype == torch.float64
    for output, value in zip(outputs, expected, strict=True):
        assert output.dtype == (torch.float64 if double else torch.float32)
        tolerance = {"rtol": 0, "atol": 1e-13} if double else {"rtol": 1e-6, "atol": 4e-6}
        torch.testing.assert_close(output.double(), value.double(), **tolerance)
    assert grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    # Rounded once, from float32: half a unit in the last place and what the softmax errs.
    tolerance = {"rtol": 0, "atol": 1e-13} if double else {"rtol": max(0.51 * eps, 2e-5)}
    smallest = torch.finfo(dtype).smallest_normal * eps
    tolerance.setdefault("atol", max(1e-6, smallest))
    torch.testing.assert_close(grad.double(), exact_grad.double(), **tolerance)


def random_case(rows, vocabulary, dtype, device, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(*rows, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, rows, generator=generator)
    if math.prod(rows) > 2:
        targets.view(-1)[1] = IGNORE_INDEX
    return logits.to(dtype).to(device), targets.to(device)


def sizes(device, dtype, vocabulary):
    """Any vocabulary, with memory that is NaN around the logits."""
    rows = 2 if vocabulary > 10_000 else 5
    logits, targets = random_case((rows,), vocabulary, dtype, device, seed=vocabulary)
    targets[-1] = vocabulary - 1
    logits, buffer = framed(logits)
    check(logits, targets, temperature=0.7)
    assert buffer.isnan().sum() == buffer.numel() - logits.numel()


def no_entropy(device, dtype):
    check(*random_case((5,), 100, dtype, device), entropy=False)


def empty(device, dtype):
    for shape in ((0,), (0, 3), (3, 0)):
        check(*random_case(shape, 33, dtype, device))


def minus_infinity(device, dtype):
    """At the front, at the end, as the target, everywhere but once, and a whole vector of them."""
    logits, targets = random_case((5,), 600, dtype, device)
    logits[0, :7], logits[1, -70:], logits[2, 1:] = -INF, -INF, -INF
    logits[3, 100:400] = -INF
    targets[2], targets[3], targets[4] = 0, 200, 3
    out = token_logprobs(logits, targets, return_entropy=True, backend="cuda")
    expected = definition(logits, targets)
    for o, e in zip(out, expected, strict=True):
        torch.testing.assert_close(o.double(), e, rtol=1e-5, atol=1e-5)
    assert out[0][3] == -INF
    targets[3] = 0
    check(logits, targets)


def nothing_possible(device, dtype):
    """Rows of -infinity alone, and rows with NaN or +infinity, give NaN."""
    logits, targets = random_case((4,), 70, dtype, device, spread=1.0)
    targets[:] = torch.tensor([0, 1, 2, 3])
    logits[0], logits[1, 50], logits[2, 5] = -INF, math.nan, INF
    logprobs, entropy = token_logprobs(logits, targets, return_entropy=True, backend="cuda")
    assert logprobs[:3].isnan().all() and entropy[:3].isnan().all()
    assert logprobs[3].isfinite() and entropy[3].isfinite()


def equal(device, dtype):
    """All logits of a row equal, also the smallest and largest number there is."""
    finfo = torch.finfo(dtype)
    values = torch.tensor([0.0, 1e4, -1e4, finfo.min, finfo.max], dtype=torch.float64)
    logits = values[:, None].expand(5, 77).to(dtype).contiguous().to(device)
    targets = torch.arange(5, device=device)
    logprobs, entropy = token_logprobs(logits, targets, return_entropy=True, backend="cuda")
    expected = torch.full((5,), math.log(77), dtype=torch.float64, device=device)
    torch.testing.assert_close(-logprobs.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-6, atol=0)
    check(logits[:3], targets[:3])


def large(device, dtype):
    """Values of 1e4 keep their digits: taking the log-sum-exp itself would lose them."""
    logits, targets = random_case((6,), 50, dtype, device)
    logits[:3] += 1e4
    logits[3:] -= 1e4
    check(logits, targets)


def ignored(device, dtype):
    """Whatever the logits of an ignored row, and whatever gradient arrives there."""
    logits, targets = random_case((3,), 40, dtype, device)
    targets[:] = torch.tensor([3, IGNORE_INDEX, IGNORE_INDEX])
    logits[1], logits[2, 3] = math.nan, -INF
    logits.requires_grad_()
    outputs = token_logprobs(logits, targets, return_entropy=True, backend="cuda")
    arriving = torch.tensor([1.0, INF, math.nan], dtype=outputs[0].dtype, device=device)
    torch.autograd.backward(outputs, (arriving, arriving))
    assert all(o[1:].tolist() == [0.0, 0.0] for o in outputs)
    assert logits.grad[0].isfinite().all() and logits.grad[0].all()
    assert not logits.grad[1:].any()


def strides(device, dtype):
    """Views that are not copied: of all sorts."""
    whole, targets = random_case((3, 5), 61, dtype, device)
    check(whole[:, :-1], targets[:, 1:])
    check(whole.transpose(0, 1), targets.transpose(0, 1))
    check(whole[..., 3:50], targets.clamp(max=46))
    check(whole.movedim(-1, 0).contiguous().movedim(0, -1), targets)
    check(whole[..., ::2], targets.clamp(max=30))
    check(whole[:1].expand(3, 5, 61), targets)
    check(whole[0, 0], targets[0, 0])
    deep, targets = random_case((3, 4, 5), 37, dtype, device)
    check(deep[:, ::2, ::2], targets[:, ::2, ::2])


def in_place(device, dtype):
    """The gradient overwrites the logits; where they overlap, it does not."""
    for shape in ((4,), (2, 3)):
        logits, targets = random_case(shape, 300, dtype, device)
        check(logits, targets, inplace_backward=True)
        leaf = logits.clone().requires_grad_()
        logits = leaf * 1
        token_logprobs(logits, targets, inplace_backward=True, backend="cuda").sum().backward()
        plain = leaf.detach().clone().requires_grad_()
        token_logprobs(plain, targets, backend="cuda").sum().backward()
        assert torch.equal(logits, plain.grad) and torch.equal(leaf.grad, plain.grad)
    whole, targets = random_case((2, 4), 90, dtype, device)
    last = whole[:, -1].clone()
    check(whole[:, :-1], targets[:, :-1], inplace_backward=True)
    assert torch.equal(whole[:, -1], last)
    check(whole[:1].expand(2, 4, 90), targets, inplace_backward=True)


def pieces_and_cap(device, dtype, softcap):
    """Columns that come in three launches, with and without a cap on the logits."""
    logits, targets = random_case((6,), 200, dtype, device, spread=4.0)
    logits[0, :90] = -INF
    targets[0], targets[2], targets[3] = 150, 0, 199
    dtype_out = torch.float64 if dtype == torch.float64 else torch.float32
    outputs = [torch.full((6,), math.nan, dtype=dtype_out, device=device) for _ in range(4)]
    ranges = ((0, 77), (77, 130), (130, 200))
    options = {"temperature": 1.3, "softcap": softcap}
    for start, stop in ranges:
        part = logits[:, start:stop].contiguous()
        kernel.forward(part, targets, outputs, first_column=start, vocabulary=200, **options)
    exact = logits.double().requires_grad_()
    expected = definition(exact, targets, **options)
    logprobs, entropy, maximum, total = outputs
    grads = [torch.linspace(-1, 1, 6, dtype=dtype_out, device=device) + i for i in range(2)]
    grad = torch.full_like(logits, math.nan)
    for start, stop in ranges:
        kernel.backward(
            logits[:, start:stop],
            targets,
            (maximum, total, entropy),
            grads,
            grad[:, start:stop],
            first_column=start,
            **options,
        )
    loss = sum((g.double() * e).sum() for g, e in zip(grads, expected, strict=True))
    (exact_grad,) = torch.autograd.grad(loss, exact)
    if softcap is not None:  # tanh(-inf / cap) is -1, so these are tokens like others
        assert exact_grad[0, :90].eq(0).all() and entropy[0] > 0
    compare((logprobs, entropy), expected, grad, exact_grad, dtype)


def far_rows(device):
    """Rows more than 2^31 elements apart. Most of the memory is never touched."""
    step = (1 << 31) + 24
    memory = torch.empty(step + 64, dtype=torch.bfloat16, device=device)
    logits = memory.as_strided((2, 40), (step, 1))
    values, targets = random_case((2,), 40, torch.bfloat16, device)
    logits.copy_(values)
    outputs = [torch.empty(2, device=device) for _ in range(4)]
    kernel.forward(logits, targets, outputs, temperature=1.0)
    torch.testing.assert_close(outputs[0].double(), definition(values, targets)[0])
    grads = (torch.ones(2, device=device), None)
    kernel.backward(logits, targets, (outputs[2], outputs[3], None), grads, logits, temperature=1.0)
    exact = values.double().requires_grad_()
    definition(exact, targets)[0].sum().backward()
    torch.testing.assert_close(logits.double(), exact.grad, rtol=0.01, atol=1e-6)


SPECIAL = [
    no_entropy,
    empty,
    minus_infinity,
    nothing_possible,
    equal,
    large,
    ignored,
    strides,
    in_place,
]
