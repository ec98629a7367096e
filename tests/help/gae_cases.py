# SPDX-License-Identifier: Apache-2.0
"""Cases for the kernel of ``gae.cu``: run on threads of the CPU, and on a GPU.

Each is a function of a device that raises AssertionError where the kernel is wrong. They call the
public function with ``backend="cuda"`` and compare it with a loop in float64.
"""

import math

import torch

from nemo_rl_ref.algorithms._recurrence import gae

LENGTHS = [1, 31, 32, 33, 1000, 8193]
MASKS = [torch.bool, torch.uint8, torch.float32, torch.float64, torch.int64, torch.int32]


def loop(rewards, values, mask, gamma, lam):
    """The definition, one time step after the other, in float64."""
    rewards, values = rewards.double(), values.double()
    lam = lam.double() if isinstance(lam, torch.Tensor) else lam
    next_value = torch.zeros_like(values[:, 0])
    carried, columns = torch.zeros_like(next_value), []
    for t in reversed(range(values.shape[1])):
        on = mask[:, t] != 0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = torch.where(on, delta + gamma * lam * carried, carried)
        next_value = torch.where(on, values[:, t], next_value)
        columns.append(carried)
    advantages = torch.stack(columns[::-1], 1)
    return advantages, advantages + values


def episodes(device, rows, length, *, dtype=torch.float32, mask_dtype=torch.bool, seed=0):
    """Rewards, values and a mask with holes; the first row of several is masked altogether."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (
        torch.randn(rows, length, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[:, length // 3 : length // 2] = False
    if rows > 1:
        mask[0] = False
        mask[1] = True
    return [x.to(device) for x in (rewards.to(dtype), values.to(dtype), mask.to(mask_dtype))]


def framed(tensor, fill, margin=3):
    """The same values as part of a wider tensor that holds something else around them."""
    rows, length = tensor.shape
    wide = torch.full((rows + 2, length + 2 * margin), fill, dtype=tensor.dtype)
    wide = wide.to(tensor.device)
    inside = wide[1:-1, margin:-margin]
    inside.copy_(tensor)
    return inside


def check(rewards, values, mask, gamma=0.99, lam=0.95, tolerance=2e-6):
    results = gae(rewards, values, mask, gamma=gamma, lam=lam, backend="cuda")
    exact = loop(rewards, values, mask, gamma, lam)
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    tolerance = max(tolerance, 2 * torch.finfo(dtype).eps) if dtype != torch.float64 else 1e-12
    for result, expected in zip(results, exact, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def sizes(device, length):
    """Any length and number of rows. Memory around the rows holds NaN, and a mask of ones."""
    for rows in (1, 5) if length < 5000 else (2,):
        rewards, values, mask = episodes(device, rows, length, seed=length + rows)
        check(rewards, values, mask)
        check(framed(rewards, math.nan), framed(values, math.nan), framed(mask, True))


def empty(device):
    for shape in ((0, 7), (3, 0), (0, 0)):
        nothing = torch.zeros(shape, device=device)
        for result in gae(nothing, nothing, nothing, gamma=1.0, lam=1.0, backend="cuda"):
            assert result.shape == shape


def mask_dtypes(device):
    for dtype in MASKS:
        check(*episodes(device, 3, 70, mask_dtype=dtype))


def dtypes(device):
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        check(*episodes(device, 3, 300, dtype=dtype))
    rewards, values, mask = episodes(device, 3, 70)
    check(rewards, values.double(), mask)
    check(rewards.bfloat16(), values, mask)


def any_strides(device):
    rewards, values, mask = episodes(device, 4, 130)
    check(rewards.t().contiguous().t(), values, mask)
    check(rewards, values[:1].expand(4, -1), mask[:1].expand(4, -1))
    check(rewards[:, 1:], values[:, :-1], mask[:, 1:])
    check(rewards[:, ::2], values[:, 1::2], mask[:, ::2])


def one_lambda_a_row(device):
    rewards, values, mask = episodes(device, 5, 260)
    lam = torch.tensor([0.0, 0.3, 0.95, 1.0, 0.999], device=device)
    check(rewards, values, mask, gamma=1.0, lam=lam)
    check(rewards, values, mask, gamma=1.0, lam=lam.double())


def near_one(device):
    """Long sums, where powers of γλ in float32 would be wrong by 1e-4, and no sum at all."""
    for length, gamma, lam in (
        (8192, 1.0, 1.0),
        (8192, 0.9999, 0.9999),
        (500, 1.0, 0.0),
        (500, 0.0, 0.5),
        (500, 0.5, 0.01),
    ):
        rewards, values, mask = episodes(device, 2, length, seed=1)
        check(0.01 * rewards, values, mask, gamma, lam, tolerance=1e-6)


def sparse_masks(device):
    """A single unmasked token at every place of a warp's and a tile's edge, and none."""
    length = 600
    for place in (0, 3, 4, 127, 128, 129, 511, 512, 599):
        rewards, values, mask = episodes(device, 1, length, seed=place)
        mask[:] = False
        check(rewards, values, mask)
        mask[:, place] = True
        check(rewards, values, mask)
        mask[:, 300] = True
        check(rewards, values, mask)


def nothing_leaks_from_masked_tokens(device):
    """NaN and infinities there reach no other token; the token's own return has them."""
    rewards, values, mask = episodes(device, 4, 200)
    clean = gae(rewards, values, mask, gamma=0.9, lam=0.8, backend="cuda")
    for bad in (math.nan, math.inf, -math.inf):
        dirty = (x.masked_fill(~mask, bad) for x in (rewards, values))
        advantages, returns = gae(*dirty, mask, gamma=0.9, lam=0.8, backend="cuda")
        assert torch.equal(advantages, clean[0])
        assert torch.equal(returns[mask], clean[1][mask])


def nan_goes_to_the_left_only(device):
    rewards, values, mask = episodes(device, 3, 300)
    clean = gae(rewards, values, mask, gamma=0.9, lam=0.8, backend="cuda")
    rewards[1, 200] = math.nan
    result = gae(rewards, values, mask, gamma=0.9, lam=0.8, backend="cuda")
    for a, b in zip(result, clean, strict=True):
        assert a[1, :201].isnan().all() and torch.equal(a[1, 201:], b[1, 201:])
        assert torch.equal(a[::2], b[::2])


def gradients(device):
    for lam in (0.8, torch.tensor([0.0, 0.9, 1.0], device=device)):
        rewards, values, mask = episodes(device, 3, 40, dtype=torch.float64)
        grads = []
        for backend in ("cuda", "torch"):
            inputs = [x.detach().requires_grad_() for x in (rewards, values)]
            results = gae(*inputs, mask, gamma=0.97, lam=lam, backend=backend)
            total = sum(
                (x * x.detach().cos()).sum() * w for x, w in zip(results, (1, 2), strict=True)
            )
            grads.append(torch.autograd.grad(total, inputs))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def same_bits(device):
    inputs = episodes(device, 5, 1000)
    first, second = (gae(*inputs, gamma=0.99, lam=0.95, backend="cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


CASES = [
    empty,
    mask_dtypes,
    dtypes,
    any_strides,
    one_lambda_a_row,
    near_one,
    sparse_masks,
    nothing_leaks_from_masked_tokens,
    nan_goes_to_the_left_only,
    gradients,
    same_bits,
]
