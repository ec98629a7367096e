# SPDX-License-Identifier: Apache-2.0
"""A world so small that every answer in it can be listed.

A policy is a table of logits: one row for each prefix that an answer can have, one column for
each token. All answers are listed, so every expectation is a sum, exact in float64, and autograd
goes through it. What holds here by a theorem holds to rounding; nothing is sampled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


class World:
    """All answers of at most `horizon` tokens over a small vocabulary.

    Attributes:
        answers: tokens of each answer, int64 `(Y, T)`; what follows the end token is 0.
        prefixes: the row of the policy's table that each token is drawn from, int64 `(Y, T)`.
        mask: 1.0 for the tokens of an answer and 0.0 for what follows its end, float64 `(Y, T)`.
        states: number of rows of a policy's table.
        vocab: number of tokens V.
    """

    def __init__(self, vocab: int = 3, horizon: int = 3, *, end: int | None = None) -> None:
        """List the answers.

        Args:
            vocab: number of tokens V.
            horizon: number of tokens T of the longest answer.
            end: the token that ends an answer; None for answers that all have T tokens.

        Raises:
            ValueError: `vocab` or `horizon` is below 1, `end` is no token, or there would be more
                than 100,000 answers.
        """
        for name, value in (("vocab", vocab), ("horizon", horizon)):
            if value < 1:
                raise ValueError(f"{name} should be at least 1, got {value}")
        if end is not None and not 0 <= end < vocab:
            raise ValueError(f"end should be a token from 0 to {vocab - 1}, got {end}")
        if vocab**horizon > 100_000:
            raise ValueError(
                f"vocab ** horizon should be at most 100000, got {vocab} ** {horizon} answers"
            )
        listed: dict[tuple[int, ...], None] = {}
        for tokens in itertools.product(range(vocab), repeat=horizon):
            stop = tokens.index(end) + 1 if end in tokens else horizon
            listed.setdefault(tokens[:stop])
        rows: dict[tuple[int, ...], int] = {}
        for answer in listed:
            for step in range(len(answer)):
                rows.setdefault(answer[:step], len(rows))
        self.vocab = vocab
        self.states = len(rows)
        shape = (len(listed), horizon)
        self.answers = torch.zeros(shape, dtype=torch.int64)
        self.prefixes = torch.zeros(shape, dtype=torch.int64)
        self.mask = torch.zeros(shape, dtype=torch.float64)
        for place, answer in enumerate(listed):
            for step, token in enumerate(answer):
                self.answers[place, step] = token
                self.prefixes[place, step] = rows[answer[:step]]
                self.mask[place, step] = 1.0

    def __len__(self) -> int:
        """Return the number of answers Y."""
        return len(self.answers)

    def policy(self, scale: float = 1.0, *, seed: int = 0) -> Tensor:
        """Return the logits of a random policy.

        Args:
            scale: standard deviation of the logits; 0 is the uniform policy, 10 nearly
                deterministic.
            seed: seed of the random numbers.

        Returns:
            Float64 `(states, V)`, a leaf that requires a gradient.
        """
        generator = torch.Generator().manual_seed(seed)
        size = (self.states, self.vocab)
        logits = scale * torch.randn(size, generator=generator, dtype=torch.float64)
        return logits.requires_grad_()

    def token_logprobs(self, logits: Tensor) -> Tensor:
        """Return the log-probability of each token given those before it, `(Y, T)`, in nats.

        Args:
            logits: a policy, `(states, V)`.
        """
        table = torch.log_softmax(logits, dim=-1)
        return table[self.prefixes, self.answers] * self.mask

    def logprob(self, logits: Tensor) -> Tensor:
        """Return the log-probability of each answer, `(Y,)`, in nats.

        Args:
            logits: a policy, `(states, V)`.
        """
        return self.token_logprobs(logits).sum(-1)


def expect(log_p: Tensor, values: Tensor) -> Tensor:
    """Return the exact expectation of `values` under a distribution.

    Args:
        log_p: log-probability of each outcome, `(Y,)`, in nats.
        values: a value for each outcome, `(Y,)` or `(Y, …)`.

    Returns:
        The expectation, a scalar or `(…)`. Its gradient with respect to what `log_p` is made of is
        exact, too.
    """
    weights = log_p.exp().reshape(-1, *[1] * (values.ndim - 1))
    return (weights * values).sum(0)


def variance(log_p: Tensor, values: Tensor) -> Tensor:
    """Return the exact variance of `values` under a distribution, see :func:`expect`."""
    return expect(log_p, (values - expect(log_p, values)) ** 2)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) in nats, an expectation under p, the first argument.

    Args:
        log_p: log-probabilities of p, `(Y,)`.
        log_q: log-probabilities of q, `(Y,)`.
    """
    return expect(log_p, log_p - log_q)


def groups(log_p: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """List all groups of independent samples.

    Args:
        log_p: log-probability of each outcome, `(Y,)`, in nats.
        size: samples in a group, G.

    Returns:
        The outcomes of each group, int64 `(Y**G, G)`, and the group's log-probability, `(Y**G,)`.

    Raises:
        ValueError: there would be more than a million groups.
    """
    if len(log_p) ** size > 1_000_000:
        raise ValueError(
            f"size should give at most a million groups, got {len(log_p)} ** {size} of them"
        )
    members = torch.cartesian_prod(*[torch.arange(len(log_p))] * size).reshape(-1, size)
    return members, log_p[members].sum(-1)


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    """Return the gradient of a scalar with respect to a policy's logits, `(states, V)`."""
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def ascend(objective: Callable[[Tensor], Tensor], logits: Tensor, steps: int = 500) -> Tensor:
    """Return the policy that maximizes an objective, found by L-BFGS from `logits`.

    Args:
        objective: takes logits and returns a scalar.
        logits: where to begin, `(states, V)`; it is not changed.
        steps: at most so many iterations.

    Returns:
        The logits found, without a gradient.
    """
    found = logits.detach().clone().requires_grad_()
    search = torch.optim.LBFGS(
        [found],
        max_iter=steps,
        tolerance_grad=1e-12,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        search.zero_grad()
        loss = -objective(found)
        loss.backward()
        return loss

    search.step(closure)
    return found.detach()
