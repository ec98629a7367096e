# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens, and entropies, without a float32 copy of the logits."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Targets with this value are left out: log-probability 0, entropy 0, no gradient.
IGNORE_INDEX = -100

#: Logits are worked on in pieces of about this many elements (4 MiB a float32 piece on CPU: it
#: stays in cache; larger on a GPU, where each piece costs kernel launches).
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probability of each target under softmax(logits / temperature), in nats.

    .. math::
        \log p_y = z_y - \log \sum_v e^{z_v}, \qquad H = -\sum_v p_v \log p_v,
        \qquad z = \text{logits} / T

    The logits are worked on in pieces, in float32, forward and backward. Beyond inputs, outputs
    and the gradient of the logits, the memory is that of a few pieces, whatever the number of
    rows. Nothing of the size of the logits is saved for backward but the logits themselves, so do
    not change them in place before it. First derivatives only.

    To score ``input_ids`` with the model's own ``logits`` (B, S, V), pass ``logits[:, :-1]``,
    which is not copied, and ``input_ids[:, 1:]``. Or pass all logits and ``input_ids`` shifted to
    the left with -100 in the last column: then the gradient, too, is made only once.

    A token with a logit of -inf has probability 0: as a target its log-probability is -inf, and
    in the entropy it counts 0. A row whose logits are all -inf gives NaN.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64, any strides.
        targets: (...), int64, in [0, V), or -100 to leave a position out (log-probability 0.0,
            entropy 0.0, no gradient). On CPU out-of-range targets raise `ValueError`. On a GPU
            they are not looked at, which would have to wait for it; there they fail in a
            device-side assertion.
        temperature: T, finite and positive. The logits are divided by it in float32.
        return_entropy: also return the entropy of softmax(logits / T), differentiable.

    Returns:
        (...), float32, or float64 for float64 logits: the log-probabilities, or a pair of them
        and the entropies.

    Raises:
        TypeError: if `logits` is not of a dtype above or `targets` is not int64.
        ValueError: if the shapes do not fit, the devices differ, a target is out of range or
            the temperature is not finite and positive.
    """
    _check(logits, targets, temperature)
    # On CPU one pass over the targets says whether they are legal and whether -100 occurs.
    has_ignored = True
    if targets.device.type == "cpu":
        has_ignored = _check_targets(targets, logits.shape[-1])
    elif targets.device.type == "meta":
        has_ignored = False

    if torch.is_grad_enabled() and logits.requires_grad:
        outputs = _TokenLogprobs.apply(logits, targets, temperature, return_entropy, has_ignored)
    else:
        outputs = _forward(logits, targets, temperature, return_entropy, has_ignored)
    return outputs if return_entropy else outputs[0]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, return_entropy, has_ignored):
        logprobs, entropy = _forward(logits, targets, temperature, return_entropy, has_ignored)
        ctx.save_for_backward(logits, targets, entropy)
        ctx.temperature = temperature
        ctx.has_ignored = has_ignored
        ctx.set_materialize_grads(False)  # an output that the loss does not use costs nothing
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        logits, targets, entropy = ctx.saved_tensors
        pieces = _pieces(logits)
        if len(pieces) == 1:
            grad = _backward_piece(ctx, logits, targets, entropy, grad_logprobs, grad_entropy)
            return grad.to(logits.dtype), None, None, None, None
        grad = torch.empty_like(logits)
        for piece in pieces:
            grad[piece] = _backward_piece(
                ctx,
                logits[piece],
                targets[piece],
                None if entropy is None else entropy[piece],
                None if grad_logprobs is None else grad_logprobs[piece],
                None if grad_entropy is None else grad_entropy[piece],
            )
        return grad, None, None, None, None


def _forward(
    logits: Tensor, targets: Tensor, temperature: float, return_entropy: bool, has_ignored: bool
) -> tuple[Tensor, Tensor | None]:
    pieces = _pieces(logits)
    if len(pieces) == 1:
        return _forward_piece(logits, targets, temperature, return_entropy, has_ignored)
    logprobs = torch.empty(targets.shape, dtype=_work_dtype(logits), device=logits.device)
    entropy = torch.empty_like(logprobs) if return_entropy else None
    for piece in pieces:
        logprobs[piece], piece_entropy = _forward_piece(
            logits[piece], targets[piece], temperature, return_entropy, has_ignored
        )
        if return_entropy:
            entropy[piece] = piece_entropy
    return logprobs, entropy


def _forward_piece(
    logits: Tensor, targets: Tensor, temperature: float, return_entropy: bool, has_ignored: bool
) -> tuple[Tensor, Tensor | None]:
    logp = _log_softmax(logits, temperature)
    if has_ignored:
        ignored = targets == IGNORE_INDEX
        targets = targets.masked_fill(ignored, 0)
    logprobs = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    entropy = None
    if return_entropy:
        # p log p is 0 at p = 0, where log p is -inf: a finite log p makes the product 0.
        p = logp.exp()
        entropy = -p.mul_(logp.clamp_(min=torch.finfo(logp.dtype).min)).sum(-1)
    if has_ignored:
        logprobs.masked_fill_(ignored, 0.0)
        if entropy is not None:
            entropy.masked_fill_(ignored, 0.0)
    return logprobs, entropy


def _backward_piece(
    ctx,
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient of the logits: g_v = (a (1[v=y] - p_v) - b p_v (log p_v + H)) / T.

    a and b are the gradients of the log-probability and of the entropy H. The softmax is
    computed again; it was not saved.
    """
    if grad_entropy is None:
        p = torch.softmax(_scaled(logits, ctx.temperature), -1, dtype=_work_dtype(logits))
        weight = grad_logprobs.unsqueeze(-1)
    else:
        logp = _log_softmax(logits, ctx.temperature)
        p = logp.exp()
        weight = logp.clamp_(min=torch.finfo(logp.dtype).min).add_(entropy.unsqueeze(-1))
        weight.mul_(grad_entropy.unsqueeze(-1))
        if grad_logprobs is not None:
            weight.add_(grad_logprobs.unsqueeze(-1))
    grad = p.mul_(weight).neg_()

    ignored = (targets == IGNORE_INDEX).unsqueeze(-1) if ctx.has_ignored else None
    if grad_logprobs is not None:
        index = targets.unsqueeze(-1)
        if ignored is not None:
            index = index.masked_fill(ignored, 0)
        grad.scatter_add_(-1, index, grad_logprobs.unsqueeze(-1))
    if ctx.temperature != 1.0:
        grad.div_(ctx.temperature)
    if ignored is not None:
        grad.masked_fill_(ignored, 0.0)  # last, so that a NaN in the row does not survive
    return grad


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(_scaled(logits, temperature), -1, dtype=_work_dtype(logits))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits.to(_work_dtype(logits)) / temperature


def _work_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _pieces(logits: Tensor) -> list[tuple[int | slice, ...]]:
    """Cuts the rows of the logits into pieces: indices that give views, whatever the strides."""
    limit = _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS["cpu"])
    if logits.numel() <= limit:
        return [()]
    return list(_cut(tuple(logits.shape), limit))


def _cut(shape: tuple[int, ...], limit: int) -> Iterator[tuple[int | slice, ...]]:
    if len(shape) == 1 or math.prod(shape) <= limit:
        yield ()
        return
    step = limit // math.prod(shape[1:])
    if step:
        for start in range(0, shape[0], step):
            yield (slice(start, start + step),)
        return
    for i in range(shape[0]):  # one entry is too large alone: cut its own rows
        for rest in _cut(shape[1:], limit):
            yield (i, *rest)


def _check(logits: Tensor, targets: Tensor, temperature: float) -> None:
    if logits.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"logits has dtype {logits.dtype}, expected one of {names}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets has dtype {targets.dtype}, expected torch.int64")
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (..., V) with V > 0")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, expected that of logits without its last "
            f"dimension, {tuple(logits.shape[:-1])}"
        )
    if targets.device != logits.device:
        raise ValueError(f"targets is on {targets.device}, expected the logits' {logits.device}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a finite number above 0")


def _check_targets(targets: Tensor, vocabulary: int) -> bool:
    """Raises if a target is out of range. Returns whether -100 occurs."""
    if not targets.numel():
        return False
    low, high = (bound.item() for bound in torch.aminmax(targets))
    if low < 0:
        low = min((t for t in targets.unique().tolist() if t != IGNORE_INDEX), default=0)
        has_ignored = True
    else:
        has_ignored = False
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise ValueError(
            f"targets holds {bad}, expected {IGNORE_INDEX} or 0 to {vocabulary - 1}"
        )
    return has_ignored
