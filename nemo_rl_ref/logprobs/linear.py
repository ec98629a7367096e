# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens from hidden states, without holding all logits.

The logits are made in tiles, (rows, columns) at a time, in one buffer. Forward, a tile only
updates three numbers a row: the largest logit, the sum of the exponentials relative to it, and the
target's logit (with the entropy a fourth). Backward knows the first two already, so a tile of
logits becomes a tile of their gradients on its own, whatever part of the vocabulary it holds:

* a range of columns with all rows gives those rows of the weight's gradient in one matrix product,
  summed in float32 inside and rounded once;
* a range of rows with all columns gives those rows of the hidden states' gradient likewise.

If both gradients are wanted, ranges of columns serve both, and the hidden states' gradient is
summed over them in float32: four matrix products in all, one of them forward. Where the float32
sum, (N, H), leaves too little of the allowed memory for wide tiles, each gradient gets tiles of
its own, which takes a fifth product and no sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rl_ref.kernels import token_logprobs as kernel
from nemo_rl_ref.kernels.backend import use_kernels
from nemo_rl_ref.logprobs.arguments import IGNORE_INDEX, check_linear, check_targets, work_dtype

# What vectors with a number for each row may take together, forward or backward.
_BYTES_PER_ROW = 128

# Columns of a tile with all rows that keep adding to the float32 sum cheap beside the products:
# 8 bytes of traffic against 6 * 2048 operations. With fewer, the fifth product costs less.
_WIDE = 2048

# On CPU: bytes of a tile for each thread, at most so many in all, and the fewest columns. Smaller
# tiles stay in the cache but make slower matrix products. Measured with N=2048, H=256, V=32000 on
# two threads; between 1 and 8 MiB the time differs by a fifteenth.
_CPU_TILE_BYTES, _CPU_ALL_TILE_BYTES = 8 << 20, 32 << 20
_CPU_COLUMNS = 128


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    max_extra_bytes: int = 512 << 20,
    return_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probability of each target from hidden states and the language-model head, in nats.

    What ``token_logprobs(hidden @ weight.T + bias, targets)`` computes, in the same precision,
    without holding the logits of all rows and tokens, neither forward nor backward:

    .. math::
        \log p_y = z_y - \log \sum_v e^{z_v}, \qquad
        z = \tfrac{1}{T}\, c \tanh\!\left(\tfrac{1}{c} (W h + b)\right)

    (without a cap c, z is (W h + b) / T). The logits are made in tiles by PyTorch's matrix
    products and used up at once. Two numbers a row are kept for backward, which makes the logits
    again, so that forward and backward take four matrix products instead of three. The gradient
    of the weight is summed in float32 inside a matrix product and rounded once; there is no float32
    copy of it. First derivatives only.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64. Leading dimensions that cannot be
            seen as one, such as those of ``hidden[:, :-1]``, cost a copy; pass all positions and
            targets of -100 instead.
        weight: (V, H), of the same dtype: the head's weight, as in `torch.nn.Linear`.
        targets: (...), int64, in [0, V), or -100 to leave a position out, as for
            :func:`token_logprobs`.
        bias: (V,), of the same dtype, or None.
        temperature: T, finite and positive.
        logit_softcap: c, finite and positive, as Gemma 2 caps its logits; or None for no cap.
        max_extra_bytes: how much memory forward and backward may each take at once beyond the
            inputs, what is returned and what is kept for backward: tiles of logits, the
            float32 sum of the gradient of the hidden states where they are in 16 bits, and 128
            bytes a row. Workspaces of the matrix products are not in it. On a CPU far less is
            taken, 32 MiB of tiles at most.
        return_entropy: also return the entropy of the softmax, differentiable.
        backend: as for :func:`token_logprobs`.

    Under autocast, hidden states, weight and bias are converted to its dtype first, as
    `torch.nn.Linear` does.

    Returns:
        (...), float32, or float64 for float64 inputs: the log-probabilities, or a pair of them
        and the entropies.

    Raises:
        TypeError: if `hidden` is not of a dtype above, `weight` or `bias` is of another one, or
            `targets` is not int64.
        ValueError: if shapes or devices do not fit, a target is out of range (on CPU), the
            temperature or the cap is not finite and positive, `max_extra_bytes` is too small (the
            message says for how much it would be enough), or `backend` is unknown or does not fit
            the tensors.
        nemo_rl_ref.kernels.loader.KernelsUnavailable: if the kernels are asked for and what
            compiles them is missing.

    Example:
        >>> hidden, weight = torch.tensor([[1.0, 2.0]]), torch.eye(2)
        >>> linear_token_logprobs(hidden, weight, torch.tensor([1]))
        tensor([-0.3133])
        >>> torch.log_softmax(hidden @ weight.T, -1)[:, 1]
        tensor([-0.3133])
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    check_linear(hidden, weight, targets, bias, temperature, logit_softcap)
    kernels = use_kernels(backend, hidden.device)
    rows = hidden.reshape(-1, hidden.shape[-1])
    check_extra_bytes(rows, weight, logit_softcap, max_extra_bytes, return_entropy, kernels)
    logprobs, entropy, _ = linear_token_logprobs_op(
        rows,
        weight,
        targets.reshape(-1),
        bias,
        temperature,
        logit_softcap,
        max_extra_bytes,
        return_entropy,
        kernels,
    )
    logprobs = logprobs.view(targets.shape)
    return (logprobs, entropy.view(targets.shape)) if return_entropy else logprobs


@dataclass(frozen=True)
class Tiling:
    """How large tiles may be.

    Attributes:
        forward: Rows and columns.
        columns: Of a tile with all rows, backward, for the weight or for both.
        rows: Of a tile with all columns, backward, for the hidden states.
        together: Whether tiles with all rows serve both gradients.
    """

    forward: tuple[int, int]
    columns: int
    rows: int
    together: bool


def check_extra_bytes(
    hidden: Tensor,
    weight: Tensor,
    softcap: float | None,
    max_extra_bytes: int,
    return_entropy: bool,
    kernels: bool,
) -> None:
    """Raise if ``max_extra_bytes`` is not enough for the smallest tiles.

    Raises:
        ValueError: With the number that is enough.
    """
    n, v = hidden.shape[0], weight.shape[0]
    element = _element_bytes(hidden, return_entropy, softcap, kernels)
    least = n * _BYTES_PER_ROW + element * max(n, v)
    if max_extra_bytes < least:
        raise ValueError(
            f"max_extra_bytes is {max_extra_bytes}, expected at least {least} for {n} rows and a "
            f"vocabulary of {v}"
        )


def plan(
    hidden: Tensor,
    weight: Tensor,
    softcap: float | None,
    max_extra_bytes: int,
    return_entropy: bool,
    kernels: bool,
) -> Tiling:
    """Choose the sizes of tiles, for at least one row."""
    n, v = hidden.shape[0], weight.shape[0]
    forward_element = _element_bytes(hidden, return_entropy, None, kernels)
    backward_element = _element_bytes(hidden, return_entropy, softcap, kernels)
    room = max_extra_bytes - n * _BYTES_PER_ROW
    sums = _sum_bytes(hidden)
    if hidden.device.type == "cpu":
        size = min(_CPU_TILE_BYTES * torch.get_num_threads(), _CPU_ALL_TILE_BYTES)
        wanted = max(size // (4 * n), _CPU_COLUMNS)
        columns = min(v, wanted, room // (forward_element * n))
        forward = (n, columns)
        enough = _CPU_COLUMNS
    else:
        rows = max(1, min(n, room // (forward_element * min(v, 4 * _WIDE))))
        forward = (rows, min(v, room // (forward_element * rows)))
        wanted, enough = v, _WIDE
    beside_sums = (room - sums) // (backward_element * n)
    together = beside_sums >= min(v, enough)
    alone = room // (backward_element * n)
    return Tiling(
        (forward[0], _even(v, forward[1])),
        _even(v, min(v, wanted, beside_sums if together else alone)),
        max(1, min(n, room // (backward_element * v))),
        together,
    )


def _even(total: int, largest: int) -> int:
    """The size of about equal pieces, at most ``largest``, multiples of 128 if wide."""
    pieces = -(-total // largest)
    size = -(-total // pieces)
    rounded = -(-size // 128) * 128
    return rounded if rounded <= largest else size


def _element_bytes(
    hidden: Tensor, return_entropy: bool, softcap: float | None, kernels: bool
) -> int:
    return sum(d.itemsize for d in _buffers(hidden, return_entropy, softcap, kernels))


def _buffers(
    hidden: Tensor, return_entropy: bool, softcap: float | None, kernels: bool
) -> list[torch.dtype]:
    """Dtypes of the buffers with a tile's shape. The kernels work in the first one alone."""
    work = work_dtype(hidden)
    if kernels:
        return [hidden.dtype]
    extra = (hidden.dtype != work) + return_entropy + (softcap is not None)
    return [hidden.dtype] + [work] * extra


def _sum_bytes(hidden: Tensor) -> int:
    """Extra memory for the sum of the hidden states' gradient over tiles."""
    if hidden.dtype == work_dtype(hidden):
        return 0  # the result itself serves
    on_cpu = hidden.device.type == "cpu"  # no product with a float32 result there
    return hidden.numel() * (4 + (hidden.element_size() if on_cpu else 0))


def _ranges(total: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, step):
        yield start, min(start + step, total)


class _Tiles:
    """Makes logits, and their gradients, in buffers that are reused."""

    def __init__(self, hidden, weight, bias, targets, options, elements, dtypes, keep_tanh=False):
        self.keep_tanh = keep_tanh
        # On a GPU to look would be to wait for it.
        on_cpu = hidden.device.type == "cpu"
        self.has_ignored = not on_cpu or bool((targets == IGNORE_INDEX).any())
        self.hidden, self.weight, self.bias, self.targets = hidden, weight, bias, targets
        self.temperature, self.softcap, self.kernels = options
        self.buffers = [
            torch.empty(elements, dtype=dtype, device=hidden.device) for dtype in dtypes
        ]

    def logits(self, rows, columns):
        """A tile of logits, in the dtype of the hidden states, and further buffers."""
        (r0, r1), (c0, c1) = rows, columns
        shape = (r1 - r0, c1 - c0)
        tile, *others = (b[: shape[0] * shape[1]].view(shape) for b in self.buffers)
        part = self.weight[c0:c1].t()
        if self.bias is None:
            torch.mm(self.hidden[r0:r1], part, out=tile)
        else:
            torch.addmm(self.bias[c0:c1], self.hidden[r0:r1], part, out=tile)
        return tile, others

    def scaled(self, rows, columns):
        """A tile of z = capped logits / temperature in the precision of sums.

        Returns:
            z, tanh(logits / cap) if it is kept, the tile in the dtype of the hidden states,
            and buffers that are left.
        """
        tile, others = self.logits(rows, columns)
        z, tanh = tile, None
        if tile.dtype != work_dtype(tile):
            z, *others = others
            z.copy_(tile)
        if self.keep_tanh:
            *others, tanh = others
            torch.mul(torch.div(z, self.softcap, out=tanh).tanh_(), self.softcap, out=z)
        elif self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            z.div_(self.temperature)
        return z, tanh, tile, others


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    max_extra_bytes: int,
    return_entropy: bool,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (N,), entropies (N,) or empty, and (2, N) for :func:`backward`."""
    (n, _), v = hidden.shape, weight.shape[0]
    logprobs, entropy, state = empty_outputs(hidden, return_entropy)
    if not n:
        return logprobs, entropy, state
    if hidden.device.type == "cuda" and not kernels:  # the kernels look themselves
        inside = (targets >= 0) & (targets < v) | (targets == IGNORE_INDEX)
        message = "a target is neither -100 nor in [0, V)"
        torch._assert_async(inside.all(), message)  # pyright: ignore[reportPrivateImportUsage]
    sizes = plan(hidden, weight, softcap, max_extra_bytes, return_entropy, kernels)
    row_step, column_step = sizes.forward
    tiles = _Tiles(
        hidden,
        weight,
        bias,
        targets,
        (temperature, softcap, kernels),
        row_step * column_step,
        _buffers(hidden, return_entropy, None, kernels),
    )
    outputs = (logprobs, entropy if return_entropy else None, *state)
    for r0, r1 in _ranges(n, row_step):
        part = tuple(None if output is None else output[r0:r1] for output in outputs)
        for c0, c1 in _ranges(v, column_step):
            if kernels:
                kernel.forward(
                    tiles.logits((r0, r1), (c0, c1))[0],
                    targets[r0:r1],
                    part,
                    temperature=temperature,
                    softcap=softcap,
                    first_column=c0,
                    vocabulary=v,
                )
            else:
                _add_tile(tiles, (r0, r1), (c0, c1), part)
    if not kernels:
        _finish(targets, outputs)
    return logprobs, entropy, state


def empty_outputs(hidden: Tensor, return_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what :func:`forward` returns."""
    n, options = hidden.shape[0], {"dtype": work_dtype(hidden), "device": hidden.device}
    return (
        torch.empty(n, **options),
        torch.empty(n if return_entropy else 0, **options),
        torch.empty(2, n, **options),
    )


def _add_tile(tiles: _Tiles, rows, columns, outputs) -> None:
    """The online softmax: takes a tile into the largest z, the sums, and the target's z."""
    chosen, weighted, maximum, total = outputs
    z, _, _, others = tiles.scaled(rows, columns)
    targets = tiles.targets[rows[0] : rows[1]]
    if columns[0] == 0:
        maximum.fill_(-torch.inf)
        for sums in (chosen, total, *([] if weighted is None else [weighted])):
            sums.zero_()
    index, here = _in_range(targets, columns)
    torch.where(here, z.gather(1, index).squeeze(1), chosen, out=chosen)

    raised = torch.maximum(maximum, z.amax(1))
    change = (maximum - raised).clamp_(min=-1e4)
    change.masked_fill_(raised == -torch.inf, 0.0)
    if weighted is not None:
        weighted.addcmul_(total, change).mul_(change.exp())
    total.mul_(change.exp_())
    maximum.copy_(raised)
    # Nothing but -inf so far: any finite reference gives e^(z - reference) = 0.
    z.sub_(raised.masked_fill_(raised == -torch.inf, 0.0).unsqueeze(1))
    if weighted is None:
        total.add_(z.exp_().sum(1))
    else:
        e = torch.exp(z, out=others[0])
        total.add_(e.sum(1))
        weighted.add_(e.mul_(z.clamp_(min=-1e4)).sum(1))


def _finish(targets: Tensor, outputs) -> None:
    """Turns what the tiles left into log-probabilities and entropies."""
    chosen, weighted, maximum, total = outputs
    ignored = targets == IGNORE_INDEX
    log_total = total.log()
    chosen.sub_(maximum).sub_(log_total).masked_fill_(ignored, 0.0)
    if weighted is not None:
        weighted.div_(total).neg_().add_(log_total).masked_fill_(ignored, 0.0)


def _in_range(targets: Tensor, columns) -> tuple[Tensor, Tensor]:
    """The targets as columns of a tile, (rows, 1), 0 where they are outside; where inside."""
    index = targets - columns[0]
    here = (index >= 0) & (index < columns[1] - columns[0])
    return index.masked_fill_(~here, 0).unsqueeze(1), here


def backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    max_extra_bytes: int,
    kernels: bool,
    results: tuple[Tensor, Tensor | None],
    grads: tuple[Tensor | None, Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of hidden states, weight and bias; empty where not needed.

    Args:
        hidden: Of :func:`forward`.
        weight: Of :func:`forward`.
        targets: Of :func:`forward`.
        bias: Of :func:`forward`.
        temperature: Of :func:`forward`.
        softcap: Of :func:`forward`.
        max_extra_bytes: Of :func:`forward`.
        kernels: Of :func:`forward`.
        results: What forward returned: ``state``, and the entropies if their gradient is given.
        grads: Gradients of log-probabilities and entropies.
        needs: Which of the three are needed.
    """
    (n, _), v = hidden.shape, weight.shape[0]
    grad_hidden, grad_weight, grad_bias = empty_gradients(hidden, weight, bias, needs)
    entropy = grads[1] is not None
    if not n:
        return grad_hidden, grad_weight.zero_(), grad_bias.zero_()
    sizes = plan(hidden, weight, softcap, max_extra_bytes, entropy, kernels)
    by_columns = needs[1] or needs[2]
    by_rows = needs[0] and not (by_columns and sizes.together)
    elements = max(n * sizes.columns * by_columns, sizes.rows * v * by_rows)
    tiles = _Tiles(
        hidden,
        weight,
        bias,
        targets,
        (temperature, softcap, kernels),
        elements,
        _buffers(hidden, entropy, softcap, kernels),
        keep_tanh=softcap is not None and not kernels,
    )
    if by_columns:
        total = _Sum(grad_hidden, hidden) if needs[0] and not by_rows else None
        for c0, c1 in _ranges(v, sizes.columns):
            tile, exact = _gradient(tiles, (0, n), (c0, c1), results, grads)
            if needs[1]:
                torch.mm(tile.t(), hidden, out=grad_weight[c0:c1])
            if needs[2]:
                grad_bias[c0:c1] = exact.sum(0, dtype=work_dtype(hidden))
            if total is not None:
                total.add(tile, weight[c0:c1])
        if total is not None:
            total.finish()
    if by_rows:
        for r0, r1 in _ranges(n, sizes.rows):
            tile, _ = _gradient(tiles, (r0, r1), (0, v), results, grads)
            torch.mm(tile, weight, out=grad_hidden[r0:r1])
    return grad_hidden, grad_weight, grad_bias


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what :func:`backward` returns."""
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        (hidden if bias is None else bias).new_empty(weight.shape[:1] if needs[2] else (0,)),
    )


class _Sum:
    """The hidden states' gradient, summed over tiles in float32."""

    def __init__(self, result: Tensor, hidden: Tensor) -> None:
        self.result, self.first = result, True
        work = work_dtype(hidden)
        self.total = result if result.dtype == work else torch.empty_like(result, dtype=work)
        on_cpu = hidden.device.type == "cpu"
        self.product = torch.empty_like(result) if self.total is not result and on_cpu else None

    def add(self, tile: Tensor, weight: Tensor) -> None:
        first, self.first = self.first, False
        if self.total is self.result:
            self.total.addmm_(tile, weight, beta=0 if first else 1)
        elif self.product is None:
            options = {"out_dtype": self.total.dtype, "beta": 0 if first else 1}
            torch.addmm(self.total, tile, weight, out=self.total, **options)
        else:
            torch.mm(tile, weight, out=self.product)
            self.total.copy_(self.product) if first else self.total.add_(self.product)

    def finish(self) -> None:
        if self.total is not self.result:
            self.result.copy_(self.total)


def _gradient(tiles: _Tiles, rows, columns, results, grads) -> tuple[Tensor, Tensor]:
    """A tile of the gradient of the logits, in the dtype of the hidden states, and unrounded.

    The kernels round it at once; then both are the same.
    """
    r0, r1 = rows
    state, entropy = results
    maximum, total = state[:, r0:r1]
    entropy, a, b = (None if t is None else t[r0:r1] for t in (entropy, *grads))
    targets = tiles.targets[r0:r1]
    if tiles.kernels:
        tile, _ = tiles.logits(rows, columns)
        kernel.backward(
            tile,
            targets,
            (maximum, total, entropy),
            (a, b),
            tile,
            temperature=tiles.temperature,
            softcap=tiles.softcap,
            first_column=columns[0],
        )
        return tile, tile
    z, tanh, tile, others = tiles.scaled(rows, columns)
    z.sub_(maximum.unsqueeze(1))
    temperature = tiles.temperature
    at_target = torch.zeros_like(total) if a is None else a / temperature
    scale = at_target.div(total).neg_()
    if b is None:
        grad = z.exp_().mul_(scale.unsqueeze(1))
    else:
        # p (a + b (log p + H)), with log p = z - maximum - log total
        slope = b.div(temperature).div_(total).neg_()
        constant = (entropy - total.log()).mul_(slope).add_(scale)
        grad = torch.exp(z, out=others[0])
        grad.mul_(z.clamp_(min=-1e4).mul_(slope.unsqueeze(1)).add_(constant.unsqueeze(1)))
    index, here = _in_range(targets, columns)
    grad.scatter_add_(1, index, at_target.masked_fill_(~here, 0.0).unsqueeze(1))
    if tanh is not None:
        grad.mul_(tanh.square_().neg_().add_(1.0))
    if tiles.has_ignored:  # a fill, because a NaN times 0 would stay
        grad.masked_fill_((targets == IGNORE_INDEX).unsqueeze(1), 0.0)
    return (grad if grad.dtype == tile.dtype else tile.copy_(grad)), grad


# ---- The same as operators ----


@torch.library.custom_op("nemo_rl_ref::linear_token_logprobs", mutates_args=())
def linear_token_logprobs_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    max_extra_bytes: int,
    return_entropy: bool,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `forward`."""
    if targets.device.type == "cpu":
        check_targets(targets, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(
            hidden,
            weight,
            targets,
            bias,
            temperature,
            softcap,
            max_extra_bytes,
            return_entropy,
            kernels,
        )


@linear_token_logprobs_op.register_fake
def _(hidden, weight, targets, bias, temperature, softcap, max_extra_bytes, return_entropy, _):
    return empty_outputs(hidden, return_entropy)


@torch.library.custom_op("nemo_rl_ref::linear_token_logprobs_backward", mutates_args=())
def linear_token_logprobs_backward_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    max_extra_bytes: int,
    kernels: bool,
    state: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """See `backward`."""
    with torch.autocast(hidden.device.type, enabled=False):
        return backward(
            hidden,
            weight,
            targets,
            bias,
            temperature,
            softcap,
            max_extra_bytes,
            kernels,
            (state, entropy),
            (grad_logprobs, grad_entropy),
            needs,
        )


@linear_token_logprobs_backward_op.register_fake
def _(hidden, weight, targets, bias, *others):
    return empty_gradients(hidden, weight, bias, others[-1])


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, bias, *ctx.options, ctx.return_entropy, ctx.kernels = inputs
    _, entropy, state = output
    ctx.save_for_backward(hidden, weight, targets, bias, entropy, state)
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_logprobs, grad_entropy, _):
    if not ctx.return_entropy:
        grad_entropy = None
    nothing = (None,) * 5
    if grad_logprobs is None and grad_entropy is None:
        return None, None, None, None, *nothing
    hidden, weight, targets, bias, entropy, state = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    needs[2] = needs[2] and bias is not None
    results = linear_token_logprobs_backward_op(
        hidden,
        weight,
        targets,
        bias,
        *ctx.options,
        ctx.kernels,
        state,
        entropy,
        grad_logprobs,
        grad_entropy,
        needs,
    )
    grad_hidden, grad_weight, grad_bias = (
        grad if need else None for grad, need in zip(results, needs, strict=True)
    )
    return grad_hidden, grad_weight, None, grad_bias, *nothing


linear_token_logprobs_op.register_autograd(_differentiate, setup_context=_setup_context)


def _raise_at_second_derivative(ctx, *grads):
    raise RuntimeError(
        "linear_token_logprobs has no second derivative: it was differentiated twice"
    )


linear_token_logprobs_backward_op.register_autograd(_raise_at_second_derivative)
