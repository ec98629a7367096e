# SPDX-License-Identifier: Apache-2.0
"""What the kernels are measured beside: plain PyTorch, torch.compile, other projects' functions.

A maker takes nothing and returns a function of the inputs of one call. Other projects are imported
when their function is made; `requirements-gpu.txt` pins the versions whose signatures are meant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F

from nemo_rl_ref.algorithms._recurrence import gae
from nemo_rl_ref.algorithms.loss._clipped_pg_terms import clipped_pg_terms
from nemo_rl_ref.logprobs import linear_token_logprobs, token_logprobs

#: Packages of the peers, by the name under which they are reported.
PACKAGES = {
    "TRL": "trl",
    "Liger": "liger-kernel",
    "cut-cross-entropy": "cut-cross-entropy",
    "quack": "quack-kernels",
}


def versions() -> dict[str, str]:
    """The versions of the peers' packages, "absent" where one is not installed."""
    found = {}
    for name, package in PACKAGES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def _selected(logits, targets):
    """Log-probabilities and log-softmax, in float32 as NeMo RL has them."""
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(-1, targets[:, None])[:, 0], logp


def with_entropy(logits, targets):
    """Plain PyTorch: log-probabilities and entropies."""
    chosen, logp = _selected(logits, targets)
    return chosen, -(logp.exp() * logp).sum(-1)


def without_entropy(logits, targets):
    """Plain PyTorch: log-probabilities."""
    return _selected(logits, targets)[0]


def linear(hidden, weight, targets):
    """Plain PyTorch: all logits, then log-softmax and gather."""
    return _selected(F.linear(hidden, weight), targets)[0]


def time_loop(rewards, values, mask, *, gamma, lam):
    """GAE one time step after the other, as NeMo RL's estimator goes; what it computes is the same.

    At a masked step the next value and the carried advantage stay what they are.
    """
    next_value = torch.zeros_like(values[:, 0])
    carried = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(values.shape[1])):
        on = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = on * (delta + gamma * lam * carried) + (1 - on) * carried
        next_value = on * values[:, t] + (1 - on) * next_value
        columns.append(carried)
    advantages = torch.stack(columns[::-1], 1)
    return advantages, advantages + values


def clipped_pg(*arguments):
    """Plain PyTorch: the sums that the loss and its metrics are made of."""
    return clipped_pg_terms(*arguments, backend="torch")


def _trl_entropy():
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


def _trl_selective():
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def _trl_chunked():
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def run(hidden, weight, targets):
        return ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )[0]

    return run


def _liger_cross_entropy():
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, targets: -liger_cross_entropy(logits, targets, reduction="none")


def _liger_linear(reduction: str):
    def make():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return lambda hidden, weight, targets: (
            -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction=reduction)
        )

    return make


def _cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: (
        -linear_cross_entropy(hidden, weight, targets, reduction="none")
    )


def _quack():
    from quack.cross_entropy import cross_entropy

    return lambda logits, targets: -cross_entropy(logits, targets, reduction="none")


def _quack_linear():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, targets: (
        -chunked_linear_cross_entropy(hidden, weight, targets, reduction="sum")
    )


def _compiled(function: Callable) -> Callable[[], Callable]:
    return lambda: torch.compile(function, dynamic=False)


def _just(function: Callable) -> Callable[[], Callable]:
    return lambda: function


#: By workload: the makers of what is measured, "ours" first. A name that ends in "(scalar)" returns
#: one number for all tokens, which no loss with a weight a token can use.
CONTENDERS: dict[str, dict[str, Callable[[], Callable]]] = {
    "log-probabilities and entropy, forward": {
        "ours": _just(lambda logits, targets: token_logprobs(logits, targets, return_entropy=True)),
        "PyTorch": _just(with_entropy),
        "torch.compile": _compiled(with_entropy),
        "TRL": _trl_entropy,
    },
    "log-probabilities, forward and backward": {
        "ours": _just(token_logprobs),
        "PyTorch": _just(without_entropy),
        "torch.compile": _compiled(without_entropy),
        "TRL": _trl_selective,
        "Liger": _liger_cross_entropy,
        "quack": _quack,
    },
    "linear log-probabilities, forward and backward": {
        "ours": _just(linear_token_logprobs),
        "PyTorch": _just(linear),
        "torch.compile": _compiled(linear),
        "TRL": _trl_chunked,
        "Liger": _liger_linear("none"),
        "cut-cross-entropy": _cut_cross_entropy,
        "Liger (scalar)": _liger_linear("sum"),
        "quack (scalar)": _quack_linear,
    },
    "generalized advantage estimation": {
        "ours": _just(gae),
        "NeMo RL's time loop": _just(time_loop),
        "PyTorch": _just(partial(gae, backend="torch")),
    },
    "clipped policy gradient, forward and backward": {
        "ours": _just(clipped_pg_terms),
        "PyTorch": _just(clipped_pg),
        "torch.compile": _compiled(clipped_pg),
    },
}
