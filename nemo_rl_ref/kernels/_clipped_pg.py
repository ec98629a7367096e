# SPDX-License-Identifier: Apache-2.0
"""The terms of the clipped policy-gradient loss: plain PyTorch, or the kernels of ``clipped_pg.cu``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_rl_ref.kernels import loader
from nemo_rl_ref.kernels.backend import use_kernels

if TYPE_CHECKING:
    from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn

#: What `clipped_pg_terms` returns, in this order. The names are those of the loss's metrics.
TERMS = (
    "loss",
    "probs_ratio",
    "probs_ratio_min",
    "probs_ratio_max",
    "probs_ratio_clamped",
    "probs_ratio_clamped_min",
    "probs_ratio_clamped_max",
    "kl_penalty",
    "token_mult_prob_error",
    "gen_kl_error",
    "policy_kl_error",
    "js_divergence_error",
    "sampling_importance_ratio",
    "is_oob_ratio",
    "num_valid_samples",
    "approx_entropy",
    "positive_nll_loss",
)

# The methods of `ClippedPGLossFn` that the kernels do the work of.
_PARTS = (
    "_terms",
    "_ratios",
    "_surrogate",
    "_importance_weights",
    "_kl_estimate",
    "_importance_metrics",
)

# Bits that tell the kernels what to compute, as in clipped_pg.cu.
_FLAGS = {
    name: 1 << bit
    for bit, name in enumerate(
        (
            "ratio of response",
            "ratio is log-probability",
            "ratio is one",
            "cispo",
            "dual clip",
            "kl",
            "k1",
            "k2",
            "kl input clamp",
            "kl output clamp",
            "kl weighted",
            "correction",
            "weight of response",
            "clamp weights",
            "zero weights",
            "zero responses",
            "mean of responses",
            "positive nll",
        )
    )
}
_TYPES = {torch.float32: "float", torch.float64: "double"}
_MASKS = {
    torch.bool: "unsigned char",
    torch.uint8: "unsigned char",
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "long long",
}
#: How a kernel is told the dtype of a tensor with a number for a row, or one.
_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.int64: 2,
    torch.int32: 3,
    torch.bool: 4,
    torch.uint8: 4,
}

# How much a block gets. About this many blocks, each with this many tokens. The numbers do not
# depend on the GPU, so that sums do not either.
_BLOCKS, _FEWEST_TOKENS, _MOST_TOKENS, _MOST_THREADS = 1024, 512, 4096, 256
# One kernel for each set of flags, without what they leave out. If False, one for all of them.
_SPECIALIZE = True

# As in clipped_pg.cu: numbers a block hands on, and numbers kept for the backward kernel.
_PARTIAL, _KEPT_HEADER, _KEPT = 18, 1, 4


def clipped_pg_terms(
    logprobs: Tensor,
    prev_logprobs: Tensor | None,
    generation_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    config: ClippedPGLossConfig | ClippedPGLossFn,
    *,
    sample_mask: Tensor | None = None,
    rewards: Tensor | None = None,
    unfiltered_logprobs: Tensor | None = None,
    global_valid_seqs: Tensor | float | None = None,
    global_valid_toks: Tensor | float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The clipped policy-gradient loss and all its metrics, in one vector on the device.

    `ClippedPGLossFn` says what they are and turns them into numbers. Everything is a sum over the
    micro-batch under the masks, divided by a count of the global batch. On CUDA it is one kernel
    forward and one backward; neither waits for the host, and both give the same bits for the same
    input. All flags of the configuration are theirs too. Plain PyTorch runs instead, whatever the
    backend, where the kernels would compute something else or nothing:

    - with no tokens at all;
    - where a tensor other than `logprobs` and `unfiltered_logprobs` requires a gradient, which
      the kernels do not give;
    - where `config` is a `ClippedPGLossFn` of a class that replaces one of its parts.

    What stands under a mask is multiplied by 0: a NaN there makes the loss NaN, as in NeMo RL. Two
    values can be a number or an infinity from the kernels where plain PyTorch has NaN: the terms
    of a response whose ratio (``sequence_level_importance_ratios``) is more than float32 can hold,
    and ``js_divergence_error`` where both policies give a token less than e^-100.

    Args:
        logprobs: log π_θ, (B, T) floating, nats, one a predicted token.
        prev_logprobs: log π_old, (B, T); None with ``force_on_policy_ratio``.
        generation_logprobs: log π_gen, (B, T).
        reference_logprobs: log π_ref, (B, T); None without a KL term.
        advantages: (B, T).
        mask: (B, T), 1 on response tokens.
        config: the flags, or a loss that has them.
        sample_mask: (B,), 1 for responses that count; all, if None.
        rewards: (B,), for the NLL of positive examples, which is left out without them.
        unfiltered_logprobs: log π_θ for the KL term, (B, T); `logprobs`, if None.
        global_valid_seqs: responses in the global batch, scalar. None for 1: means over responses
            are sums.
        global_valid_toks: unmasked tokens in the global batch, scalar. None for 1: means over
            tokens are sums.
        backend: "cuda", "torch", or None for what `NEMO_RL_REF_BACKEND` says, else by device.

    Returns:
        (17,): the values named in `TERMS`, 0 for what the flags leave out. float32, or the widest
        floating dtype of the inputs. ``loss``, ``kl_penalty`` and ``positive_nll_loss`` have a
        gradient in `logprobs` and `unfiltered_logprobs`.

    Raises:
        TypeError: if log-probabilities are not floating.
        ValueError: if a shape does not fit, a tensor is missing that the flags need, flags
            contradict each other, or the backend is unknown or not to be had.
    """
    from nemo_rl_ref.algorithms.loss import ClippedPGLossFn  # which imports this module

    loss_fn = config if isinstance(config, ClippedPGLossFn) else ClippedPGLossFn(config)
    others = {
        "generation_logprobs": generation_logprobs,
        "advantages": advantages,
        "mask": mask,
        "unfiltered_logprobs": unfiltered_logprobs,
    }
    if not loss_fn.force_on_policy_ratio:
        others["prev_logprobs"] = _given(prev_logprobs, "prev_logprobs", "force_on_policy_ratio")
    if loss_fn.reference_policy_kl_penalty != 0:
        others["reference_logprobs"] = _given(
            reference_logprobs, "reference_logprobs", "reference_policy_kl_penalty=0"
        )
    _check(logprobs, others, sample_mask, rewards)
    if sample_mask is None:
        sample_mask = torch.ones(len(logprobs), device=logprobs.device)
    prev = logprobs.detach() if loss_fn.force_on_policy_ratio else prev_logprobs
    if loss_fn.positive_example_nll_weight <= 0:
        rewards = None
    if loss_fn.reference_policy_kl_penalty == 0:
        reference_logprobs = unfiltered_logprobs = None
    tensors = (logprobs, prev, generation_logprobs, reference_logprobs, advantages)
    rest = (unfiltered_logprobs, mask, sample_mask, rewards, global_valid_seqs, global_valid_toks)

    if use_kernels(backend, logprobs.device) and not needs_plain(loss_fn, *tensors, *rest[:4]):
        return _run_op(loss_fn, *tensors, *rest)
    return plain_terms(loss_fn, *tensors, *rest)


def plain_terms(
    loss_fn: ClippedPGLossFn,
    logprobs: Tensor,
    prev: Tensor,
    generation: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    unfiltered: Tensor | None,
    mask: Tensor,
    sample_mask: Tensor,
    rewards: Tensor | None,
    valid_seqs: Tensor | float | None,
    valid_toks: Tensor | float | None,
) -> Tensor:
    """What `clipped_pg_terms` returns, in plain PyTorch."""
    counts = (1.0 if count is None else count for count in (valid_seqs, valid_toks))
    terms = loss_fn._terms(
        *(logprobs, prev, generation, reference, advantages, unfiltered),
        *(mask, sample_mask, rewards, *counts),
    )
    zero = logprobs.new_zeros(())
    vector = torch.stack([terms.get(name, zero) for name in TERMS])
    return vector.to(torch.promote_types(vector.dtype, torch.float32))


def needs_plain(
    loss_fn: ClippedPGLossFn,
    logprobs: Tensor,
    prev: Tensor,
    generation: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    unfiltered: Tensor | None,
    mask: Tensor,
    sample_mask: Tensor,
    rewards: Tensor | None,
) -> str | None:
    """Why the kernels would not compute what plain PyTorch does, or None."""
    from nemo_rl_ref.algorithms.loss import ClippedPGLossFn

    if logprobs.numel() == 0:
        return "there are no tokens"
    fixed = (prev, generation, reference, advantages, mask, sample_mask, rewards)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in fixed):
        return "another tensor than the log-probabilities of the policy requires a gradient"
    for part in _PARTS:
        if getattr(type(loss_fn), part) is not getattr(ClippedPGLossFn, part):
            return f"{type(loss_fn).__name__} has its own {part}"
    return None


def _given(tensor: Tensor | None, name: str, without: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"{name} is None, expected (B, T): only {without} goes without")
    return tensor


def _check(
    logprobs: Tensor,
    others: dict[str, Tensor | None],
    sample_mask: Tensor | None,
    rewards: Tensor | None,
) -> None:
    if logprobs.ndim != 2:
        raise ValueError(f"logprobs has shape {tuple(logprobs.shape)}, expected (B, T)")
    for name, tensor in (("logprobs", logprobs), *others.items()):
        if tensor is None:
            continue
        if name.endswith("logprobs") and not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")
        if tensor.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected that of logprobs, "
                f"{tuple(logprobs.shape)}"
            )
    for name, tensor in (("sample_mask", sample_mask), ("rewards", rewards)):
        if tensor is not None and tensor.shape != logprobs.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected (B,) = "
                f"{tuple(logprobs.shape[:1])}"
            )


def settings_of(loss_fn: ClippedPGLossFn) -> tuple[int, list[float]]:
    """The flags and numbers of a loss, as the kernels take them."""
    from nemo_rl_ref.algorithms.loss.interfaces import LossType

    kind = loss_fn.truncated_importance_sampling_type
    by_response = loss_fn.sequence_level_importance_ratios
    beta, mu = loss_fn.reference_policy_kl_penalty, loss_fn.positive_example_nll_weight
    ratio = "token"
    if loss_fn.force_on_policy_ratio:
        ratio = "ratio is one"
    elif loss_fn.disable_ppo_ratio:
        ratio = "ratio is log-probability"
    elif by_response:
        ratio = "ratio of response"
    on = {
        ratio: ratio != "token",
        "cispo": loss_fn.use_cispo,
        "dual clip": loss_fn.ratio_clip_c is not None,
        "kl": beta != 0,
        "k1": loss_fn.reference_policy_kl_type == "k1",
        "k2": loss_fn.reference_policy_kl_type == "k2",
        "kl input clamp": loss_fn.kl_input_clamp_value is not None,
        "kl output clamp": loss_fn.kl_output_clamp_value is not None,
        "kl weighted": loss_fn.use_on_policy_kl_approximation,
        "correction": loss_fn.use_importance_sampling_correction,
        "weight of response": by_response,
        "clamp weights": kind == "tis",
        "zero weights": kind == "icepop",
        "zero responses": kind == "seq-mask-tis",
        "mean of responses": loss_fn.loss_type is LossType.SEQUENCE_LEVEL,
        "positive nll": mu > 0,
    }
    numbers = [
        1.0 - loss_fn.ratio_clip_min,
        1.0 + loss_fn.ratio_clip_max,
        loss_fn.ratio_clip_c,
        loss_fn.kl_input_clamp_value,
        loss_fn.kl_output_clamp_value,
        loss_fn.truncated_importance_sampling_ratio_min,
        loss_fn.truncated_importance_sampling_ratio,
        beta,
        mu,
    ]
    flags = sum(_FLAGS[name] for name, wanted in on.items() if wanted)
    return flags, [0.0 if number is None else float(number) for number in numbers]


def _run_op(
    loss_fn: ClippedPGLossFn,
    logprobs: Tensor,
    prev: Tensor,
    generation: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    unfiltered: Tensor | None,
    mask: Tensor,
    sample_mask: Tensor,
    rewards: Tensor | None,
    valid_seqs: Tensor | float | None,
    valid_toks: Tensor | float | None,
) -> Tensor:
    """Brings the arguments into the form that the kernels take."""
    flags, numbers = settings_of(loss_fn)
    if rewards is None:
        flags &= ~_FLAGS["positive nll"]
    tensors = (logprobs, prev, generation, reference, advantages, unfiltered)
    dtype = torch.float32
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        dtype = torch.float64
    tensors = tuple(None if x is None else x.to(dtype) for x in tensors)
    if mask.dtype not in _MASKS:
        mask = mask.to(dtype)

    def scalar(count: Tensor | float | None) -> Tensor | None:
        if count is None:
            return None
        if not isinstance(count, Tensor):  # filled on the device: to copy it would be to wait
            return torch.full((), count, dtype=torch.float64, device=logprobs.device)
        count = count.to(logprobs.device)
        return count if count.dtype in _DTYPES else count.double()

    of_rows = (
        None if x is None else x if x.dtype in _DTYPES else x.double()
        for x in (sample_mask, rewards)
    )
    return _op(
        *tensors, mask, *of_rows, scalar(valid_seqs), scalar(valid_toks), flags, numbers, True
    )[0]


@torch.library.custom_op("nemo_rl_ref::clipped_pg_terms", mutates_args=())
def _op(
    logprobs: Tensor,
    prev: Tensor,
    generation: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    unfiltered: Tensor | None,
    mask: Tensor,
    sample_mask: Tensor,
    rewards: Tensor | None,
    valid_seqs: Tensor | None,
    valid_toks: Tensor | None,
    flags: int,
    numbers: list[float],
    kernels: bool,
) -> tuple[Tensor, Tensor]:
    tensors = (logprobs, prev, generation, reference, advantages, unfiltered, mask, sample_mask)
    tensors = (*tensors, rewards, valid_seqs, valid_toks)
    if kernels:
        return run_forward(*tensors, flags, numbers)
    terms = plain_terms(_loss_of(flags, numbers), *tensors)
    kept = terms.new_zeros(_kept_size(len(logprobs)), dtype=torch.float64)
    return terms.to(logprobs.dtype), kept


@torch.library.custom_op("nemo_rl_ref::clipped_pg_grad", mutates_args=())
def _grad_op(
    grad_terms: Tensor,
    kept: Tensor,
    logprobs: Tensor,
    prev: Tensor,
    generation: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    unfiltered: Tensor | None,
    mask: Tensor,
    sample_mask: Tensor,
    rewards: Tensor | None,
    valid_seqs: Tensor | None,
    valid_toks: Tensor | None,
    flags: int,
    numbers: list[float],
    kernels: bool,
) -> tuple[Tensor, Tensor]:
    tensors = (logprobs, prev, generation, reference, advantages, unfiltered, mask, sample_mask)
    tensors = (*tensors, rewards, valid_seqs, valid_toks)
    if kernels:
        return run_backward(grad_terms, kept, *tensors, flags, numbers)
    # Inside an operator PyTorch records no graph; that is a matter of the thread.
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(_differentiate, grad_terms, *tensors, flags, numbers).result()


def _differentiate(
    grad_terms: Tensor, logprobs: Tensor, prev: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    *rest, flags, numbers = arguments
    policy, unfiltered = logprobs.detach().requires_grad_(), rest[3]
    if flags & _FLAGS["ratio is one"]:
        prev = policy.detach()
    wanted = [policy]
    if unfiltered is not None:
        rest[3] = unfiltered.detach().requires_grad_()
        wanted.append(rest[3])
    terms = plain_terms(_loss_of(flags, numbers), policy, prev, *rest)
    grads = torch.autograd.grad(terms, wanted, grad_terms.to(terms.dtype))
    return grads[0], logprobs.new_empty(0) if unfiltered is None else grads[1]


def _kept_size(rows: int) -> int:
    return _KEPT_HEADER + _KEPT * rows


@_op.register_fake
def _(logprobs: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    kept = logprobs.new_empty(_kept_size(logprobs.shape[0]), dtype=torch.float64)
    return logprobs.new_empty(len(TERMS)), kept


@_grad_op.register_fake
def _(
    grad_terms: Tensor,
    kept: Tensor,
    logprobs: Tensor,
    prev: Tensor,
    generation: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    unfiltered: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    return logprobs.new_empty(logprobs.shape), logprobs.new_empty(
        (0,) if unfiltered is None else logprobs.shape
    )


def _loss_of(flags: int, numbers: list[float]) -> ClippedPGLossFn:
    """The loss that `settings_of` has made these of."""
    from nemo_rl_ref.algorithms.loss import ClippedPGLossFn

    def has(name: str) -> bool:
        return bool(flags & _FLAGS[name])

    ratio_low, ratio_high, dual, kl_input, kl_output, low, high, beta, mu = numbers
    truncations = {
        "clamp weights": "tis",
        "zero weights": "icepop",
        "zero responses": "seq-mask-tis",
    }
    kind = next((kind for flag, kind in truncations.items() if has(flag)), None)
    config = SimpleNamespace(
        disable_ppo_ratio=has("ratio is log-probability"),
        token_level_loss=not has("mean of responses"),
        sequence_level_importance_ratios=has("weight of response"),
        ratio_clip_min=1.0 - ratio_low,
        ratio_clip_max=ratio_high - 1.0,
        ratio_clip_c=dual if has("dual clip") else None,
        reference_policy_kl_penalty=beta,
        reference_policy_kl_type="k1" if has("k1") else "k2" if has("k2") else "k3",
        kl_input_clamp_value=kl_input if has("kl input clamp") else None,
        kl_output_clamp_value=kl_output if has("kl output clamp") else None,
        use_kl_in_reward=False,
        use_importance_sampling_correction=has("correction"),
        truncated_importance_sampling_type=kind,
        truncated_importance_sampling_ratio=high if kind else None,
        truncated_importance_sampling_ratio_min=low if kind else None,
        use_on_policy_kl_approximation=has("kl weighted"),
        force_on_policy_ratio=has("ratio is one"),
        use_cispo=has("cispo"),
        positive_example_nll_weight=mu,
    )
    return ClippedPGLossFn(config)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.flags, ctx.numbers, ctx.kernels = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx: Any, grad_terms: Tensor, grad_kept: Tensor) -> tuple[Any, ...]:
    kept, *tensors = ctx.saved_tensors
    grad, grad_unfiltered = _grad_op(
        grad_terms.contiguous(), kept, *tensors, ctx.flags, ctx.numbers, ctx.kernels
    )
    return grad, *[None] * 4, None if tensors[5] is None else grad_unfiltered, *[None] * 8


_op.register_autograd(_backward, setup_context=_setup_context)


def run_forward(
    logprobs: Tensor,
    prev: Tensor,
    generation: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    unfiltered: Tensor | None,
    mask: Tensor,
    sample_mask: Tensor,
    rewards: Tensor | None,
    valid_seqs: Tensor | None,
    valid_toks: Tensor | None,
    flags: int,
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel: the terms, and what the backward kernel needs to know of the rows."""
    shared, grid, threads = _arguments(
        *(logprobs, prev, generation, reference, advantages, unfiltered, mask, sample_mask),
        *(rewards, valid_seqs, valid_toks),
    )
    double = {"dtype": torch.float64, "device": logprobs.device}
    partial = torch.empty(_PARTIAL * grid, **double)
    kept = torch.empty(_kept_size(len(logprobs)), **double)
    terms = torch.empty(len(TERMS), dtype=logprobs.dtype, device=logprobs.device)
    arguments = [*shared, partial, _counter(logprobs.device), kept, terms, flags, *numbers]
    expression = _expression("clipped_pg_forward", logprobs, mask, flags)
    loader.launch("clipped_pg", expression, grid, threads, arguments, logprobs.device)
    return terms, kept


def run_backward(
    grad_terms: Tensor,
    kept: Tensor,
    logprobs: Tensor,
    prev: Tensor,
    generation: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    unfiltered: Tensor | None,
    mask: Tensor,
    sample_mask: Tensor,
    rewards: Tensor | None,
    valid_seqs: Tensor | None,
    valid_toks: Tensor | None,
    flags: int,
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    """Run the backward kernel: the gradients of `logprobs` and `unfiltered`, empty for None."""
    shared, grid, threads = _arguments(
        *(logprobs, prev, generation, reference, advantages, unfiltered, mask, sample_mask),
        *(rewards, valid_seqs, valid_toks),
    )
    grad = torch.empty(logprobs.shape, dtype=logprobs.dtype, device=logprobs.device)
    grad_unfiltered = grad.new_empty((0,) if unfiltered is None else logprobs.shape)
    arguments = [
        *(grad_terms, kept, *shared, grad, None if unfiltered is None else grad_unfiltered),
        *(flags, *numbers),
    ]
    expression = _expression("clipped_pg_backward", logprobs, mask, flags)
    loader.launch("clipped_pg", expression, grid, threads, arguments, logprobs.device)
    return grad, grad_unfiltered


def _expression(kernel: str, logprobs: Tensor, mask: Tensor, flags: int) -> str:
    known = flags if _SPECIALIZE else -1
    return f"{kernel}<{_TYPES[logprobs.dtype]}, {_MASKS[mask.dtype]}, {known}>"


def _arguments(*tensors: Tensor | None) -> tuple[list[Any], int, int]:
    """What both kernels take, with the number of blocks and of threads a block."""
    *by_token, sample_mask, rewards, valid_seqs, valid_toks = tensors
    by_token = [x if x is None or x.stride(1) == 1 else x.contiguous() for x in by_token]
    rows, steps = by_token[0].shape
    length = min(max(_FEWEST_TOKENS, -(-rows * steps // _BLOCKS)), _MOST_TOKENS)
    segments = -(-steps // length)
    length = -(-steps // segments)
    threads = min(-(-length // 64) * 32, _MOST_THREADS)
    arguments: list[Any] = [*by_token, *(0 if x is None else x.stride(0) for x in by_token)]
    for x in (sample_mask, rewards, valid_seqs, valid_toks):
        arguments += [None, 0] if x is None else [x.contiguous(), _DTYPES[x.dtype]]
    return [*arguments, rows, steps, segments, length], rows * segments, threads


_counters: dict[tuple[Any, ...], Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """A zero to count blocks with, which the kernel makes zero again: one for each stream.

    Kernels on one stream run one after the other. A graph can be replayed on any, so it gets its
    own.
    """
    stream = 0
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return torch.zeros(1, dtype=torch.int32, device=device)
            stream = torch.cuda.current_stream().cuda_stream
    key = (device.type, device.index, stream)
    if key not in _counters:
        # What this thread allocates while torch.compile warms up for a graph is that graph's
        # memory, where nothing may be kept. What another thread allocates is not.
        with ThreadPoolExecutor(1) as executor:
            _counters[key] = executor.submit(_new_counter, device).result()
    return _counters[key]


def _new_counter(device: torch.device) -> Tensor:
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    if device.type == "cuda":  # any stream may use it from now on
        torch.cuda.current_stream(device).synchronize()
    return counter
