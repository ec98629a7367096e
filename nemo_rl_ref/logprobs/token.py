# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens from logits, without a float32 copy of the logits."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.kernels import token_logprobs as kernel
from nemo_rl_ref.kernels.backend import use_kernels
from nemo_rl_ref.logprobs.arguments import IGNORE_INDEX, check, check_targets, work_dtype

# Logits are worked on in pieces of at most this many elements, or of one row where that is more.
# On CPU the number is for each thread: 1 MiB of float32 stays in its cache; smaller and much larger
# pieces measured slower. On a GPU a piece costs a few kernel launches, so it is larger: 128 MiB.
_PIECE_ELEMENTS = 1 << 18
_GPU_PIECE_ELEMENTS = 1 << 25


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probability of each target under softmax(logits / temperature), in nats.

    .. math::
        \log p_y = z_y - \log \sum_v e^{z_v}, \qquad H = -\sum_v p_v \log p_v,
        \qquad z = \text{logits} / T

    On CUDA one kernel reads every logit once, forward, with the entropy in the same pass, and
    another reads it once and writes its gradient once, backward. Plain PyTorch works on the logits
    in pieces. Both compute in float32. Beyond inputs, outputs and the gradient of the logits, the
    memory is that of a few pieces, whatever the number of rows. Nothing of the size of the logits
    is saved for backward but the logits themselves, so do not change them in place before it.
    First derivatives only.

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
        temperature: T, finite and positive. The logits are divided by it in
            the precision of the result.
        return_entropy: also return the entropy of softmax(logits / T), differentiable.
        inplace_backward: the gradient of the logits overwrites the logits, which saves memory of
            their size. For logits that nothing reads after this call; PyTorch raises an error if
            a backward pass needs what was overwritten. Logits that share memory among themselves
            (expanded ones) are not overwritten.
        backend: "cuda" for the CUDA kernels, "torch" for plain PyTorch, None for what the
            environment variable ``NEMO_RL_REF_BACKEND`` says, and without it for the kernels
            where the tensors are on CUDA. Logits whose columns do not lie side by side are slow
            in the kernels.

    Returns:
        (...), float32, or float64 for float64 logits: the log-probabilities, or a pair of them
        and the entropies.

    Raises:
        TypeError: if `logits` is not of a dtype above or `targets` is not int64.
        ValueError: if the shapes do not fit, the devices differ, a target is out of range or
            the temperature is not finite and positive, or `backend` is unknown or does not fit
            the tensors.
        nemo_rl_ref.kernels.loader.KernelsUnavailable: if the kernels are asked for and what
            compiles them is missing.

    Example:
        Two tokens that are equally likely; the second target is left out:

        >>> token_logprobs(torch.zeros(2, 2), torch.tensor([1, -100]), return_entropy=True)
        (tensor([-0.6931,  0.0000]), tensor([0.6931, 0.0000]))
    """
    check(logits, targets, temperature)
    kernels = use_kernels(backend, logits.device)
    if kernels or torch.compiler.is_compiling():
        options = (temperature, return_entropy, inplace_backward, kernels)
        outputs = _token_logprobs_op(logits, targets, *options)
        return outputs[:2] if return_entropy else outputs[0]

    # On CPU one pass over the targets says whether they are legal and whether -100 occurs.
    has_ignored = True
    if targets.device.type == "cpu":
        has_ignored = check_targets(targets, logits.shape[-1])

    if torch.is_grad_enabled() and logits.requires_grad:
        options = (temperature, return_entropy, has_ignored, inplace_backward)
        logprobs, entropy = _TokenLogprobs.apply(logits, targets, *options)
    else:
        logprobs, entropy = _forward(logits, targets, temperature, return_entropy, has_ignored)
    return logprobs if entropy is None else (logprobs, entropy)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, return_entropy, has_ignored, inplace):
        logprobs, entropy = _forward(logits, targets, temperature, return_entropy, has_ignored)
        ctx.save_for_backward(logits, targets, entropy)
        ctx.temperature = temperature
        ctx.has_ignored = has_ignored
        ctx.inplace = inplace
        ctx.set_materialize_grads(False)  # an output that the loss does not use stays None
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, None, None
        logits, targets, entropy = ctx.saved_tensors
        if grad_entropy is None:
            entropy = None
        tensors = (logits, targets, grad_logprobs, entropy, grad_entropy)
        with torch.no_grad():
            out = logits.detach() if ctx.inplace and not _overlaps(logits) else None
            grad = _backward(tensors, ctx.temperature, ctx.has_ignored, out)
        if torch.is_grad_enabled():  # with create_graph=True
            grad = _NoSecondDerivative.apply(grad, logits)
        return grad, None, None, None, None, None


class _NoSecondDerivative(torch.autograd.Function):
    """Passes a gradient on and raises where it would be differentiated again."""

    @staticmethod
    def forward(ctx, grad, logits):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("token_logprobs has no second derivative: it was differentiated twice")


def _forward(
    logits: Tensor, targets: Tensor, temperature: float, return_entropy: bool, has_ignored: bool
) -> tuple[Tensor, Tensor | None]:
    options = (temperature, return_entropy, has_ignored)
    pieces = _pieces(logits)
    if len(pieces) == 1:
        return _forward_piece(logits, targets, *options)
    logprobs = torch.empty(targets.shape, dtype=work_dtype(logits), device=logits.device)
    entropy = torch.empty_like(logprobs) if return_entropy else None
    for piece in pieces:
        logprobs[piece], piece_entropy = _forward_piece(logits[piece], targets[piece], *options)
        if entropy is not None and piece_entropy is not None:
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
    entropy = logp.exp().mul_(_finite(logp)).sum(-1).neg_() if return_entropy else None
    if has_ignored:
        logprobs.masked_fill_(ignored, 0.0)
        if entropy is not None:
            entropy.masked_fill_(ignored, 0.0)
    return logprobs, entropy


def _backward(
    tensors: tuple[Any, ...],
    temperature: float,
    has_ignored: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of the logits, `tensors[0]`, from the arguments of `_backward_piece`."""
    logits = tensors[0]
    pieces = _pieces(logits)
    if len(pieces) == 1:
        grad = _backward_piece(*tensors, temperature=temperature, has_ignored=has_ignored)
        grad = grad.to(logits.dtype)
        return grad if out is None else out.copy_(grad)
    grad = torch.empty_like(logits) if out is None else out
    for piece in pieces:
        part: list[Any] = [None if tensor is None else tensor[piece] for tensor in tensors]
        grad[piece] = _backward_piece(*part, temperature=temperature, has_ignored=has_ignored)
    return grad


def _backward_piece(
    logits: Tensor,
    targets: Tensor,
    grad_logprobs: Tensor | None,
    entropy: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    has_ignored: bool,
) -> Tensor:
    """Gradient of the logits: (a 1[v=y] - p_v (a + b (log p_v + H))) / T.

    a and b are the gradients of the log-probability and of the entropy H. The softmax is
    computed again, not saved. The result is float32; the caller rounds it once.
    """
    a = None if grad_logprobs is None else grad_logprobs.unsqueeze(-1) / temperature
    if grad_entropy is None:
        grad = torch.softmax(_scaled(logits, temperature), -1, dtype=work_dtype(logits))
        assert a is not None  # one of the two gradients is given
        grad.mul_(-a)
    else:
        assert entropy is not None  # with its gradient
        b = grad_entropy.unsqueeze(-1) / temperature
        logp = _log_softmax(logits, temperature)
        grad = logp.exp()
        factor = _finite(logp).add_(entropy.unsqueeze(-1)).mul_(-b)
        grad.mul_(factor if a is None else factor.sub_(a))

    index = targets.unsqueeze(-1)
    if has_ignored:
        ignored = index == IGNORE_INDEX
        index = index.masked_fill(ignored, 0)
    if a is not None:
        grad.scatter_add_(-1, index, a)
    if has_ignored:
        grad.masked_fill_(ignored, 0.0)  # a fill, because a NaN times 0 would stay
    return grad


# ---- The same as operators, for the CUDA kernels and for torch.compile ----


@torch.library.custom_op("nemo_rl_ref::token_logprobs", mutates_args=())
def _token_logprobs_op(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    return_entropy: bool,
    inplace_backward: bool,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, and what the backward kernel needs of the softmax.

    The second is empty if it is not asked for. The third is (2, ...), the largest logit and the
    sum of the exponentials relative to it, or empty without kernels.
    """
    logprobs, entropy, state = _empty_outputs(logits, targets, return_entropy, kernels)
    if kernels:
        outputs = (logprobs, entropy if return_entropy else None, *state)
        kernel.forward(logits, targets, outputs, temperature=temperature)
        return logprobs, entropy, state
    has_ignored = targets.device.type != "cpu" or check_targets(targets, logits.shape[-1])
    logprobs, values = _forward(logits, targets, temperature, return_entropy, has_ignored)
    return logprobs, entropy if values is None else values, state


def _empty_outputs(
    logits: Tensor, targets: Tensor, return_entropy: bool, kernels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, shape = work_dtype(logits), targets.shape
    logprobs = torch.empty(shape, dtype=dtype, device=logits.device)
    entropy = torch.empty(shape if return_entropy else (0,), dtype=dtype, device=logits.device)
    state = torch.empty((2, *shape) if kernels else (0,), dtype=dtype, device=logits.device)
    return logprobs, entropy, state


@_token_logprobs_op.register_fake
def _(logits, targets, temperature, return_entropy, inplace_backward, kernels):
    return _empty_outputs(logits, targets, return_entropy, kernels)


def _setup_context(ctx, inputs, output):
    logits, targets, ctx.temperature, ctx.return_entropy, ctx.inplace, ctx.kernels = inputs
    _, entropy, state = output
    ctx.save_for_backward(logits, targets, entropy, state)
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_logprobs, grad_entropy, _):
    if not ctx.return_entropy:
        grad_entropy = None
    if grad_logprobs is None and grad_entropy is None:
        return None, None, None, None, None, None
    logits, targets, entropy, state = ctx.saved_tensors
    others = (targets, entropy, state, grad_logprobs, grad_entropy, ctx.temperature, ctx.kernels)
    if ctx.inplace and not _overlaps(logits):
        grad = logits.detach()
        _token_logprobs_backward_inplace_op(grad, *others)
    else:
        grad = _token_logprobs_backward_op(logits, *others)
    return grad, None, None, None, None, None


_token_logprobs_op.register_autograd(_differentiate, setup_context=_setup_context)


@torch.library.custom_op("nemo_rl_ref::token_logprobs_backward", mutates_args=())
def _token_logprobs_backward_op(
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    state: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    kernels: bool,
) -> Tensor:
    """The gradient of the logits."""
    grad = torch.empty_like(logits)
    _gradient_into(
        grad, logits, targets, entropy, state, grad_logprobs, grad_entropy, temperature, kernels
    )
    return grad


@_token_logprobs_backward_op.register_fake
def _(logits, *_):
    return torch.empty_like(logits)


def _raise_at_second_derivative(ctx, grad):
    raise RuntimeError("token_logprobs has no second derivative: it was differentiated twice")


_token_logprobs_backward_op.register_autograd(_raise_at_second_derivative)


@torch.library.custom_op("nemo_rl_ref::token_logprobs_backward_inplace", mutates_args=("logits",))
def _token_logprobs_backward_inplace_op(
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    state: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    kernels: bool,
) -> None:
    """The gradient of the logits, written over them."""
    _gradient_into(
        logits, logits, targets, entropy, state, grad_logprobs, grad_entropy, temperature, kernels
    )


def _gradient_into(
    grad, logits, targets, entropy, state, grad_logprobs, grad_entropy, temperature, kernels
):
    if kernels:
        results, grads = (*state, entropy), (grad_logprobs, grad_entropy)
        kernel.backward(logits, targets, results, grads, grad, temperature=temperature)
        return
    tensors = (logits, targets, grad_logprobs, entropy, grad_entropy)
    _backward(tensors, temperature, has_ignored=True, out=grad)


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as those of an expanded tensor do."""
    return any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _finite(logp: Tensor) -> Tensor:
    """Replaces -inf, in place, so that p log p is 0 where p is 0."""
    return logp.clamp_(min=torch.finfo(logp.dtype).min)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(_scaled(logits, temperature), -1, dtype=work_dtype(logits))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits.to(work_dtype(logits)) / temperature


def _pieces(logits: Tensor) -> list[tuple[int | slice, ...]]:
    """Cuts the rows of the logits into pieces: indices that give views, whatever the strides."""
    if logits.numel() <= _PIECE_ELEMENTS:
        return [()]  # the index of everything
    on_cpu = logits.device.type == "cpu"
    limit = _PIECE_ELEMENTS * torch.get_num_threads() if on_cpu else _GPU_PIECE_ELEMENTS
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
