# SPDX-License-Identifier: Apache-2.0
"""The least that each function has to move and to compute, whoever implements it.

No implementation that reads its inputs from memory and writes its outputs there is faster than
the bytes over the bandwidth, nor than the operations over the rate of the matrix units. The
benchmarks divide by these, and the page on the kernels prints them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Floor:
    """What has to be done.

    Attributes:
        bytes: read and written.
        operations: of matrix products, an addition and a multiplication each counted.
    """

    bytes: int
    operations: int = 0

    def seconds(self, bandwidth: float, rate: float = float("inf")) -> float:
        """The least time, with `bandwidth` bytes and `rate` operations a second."""
        return max(self.bytes / bandwidth, self.operations / rate)

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes


def token_logprobs(N: int, V: int, *, backward: bool, size: int = 2) -> Floor:
    """Of `nemo_rl_ref.logprobs.token_logprobs`.

    Forward reads ``(N, V)`` logits and N targets of 8 bytes, and writes two float32 numbers a row.
    Backward reads the logits again, because the softmax of a row is known only at its end, and
    writes a gradient of their size; of a row it reads the target, the gradient that arrives, and
    what forward has kept, the maximum and the sum.

    Args:
        N: rows.
        V: vocabulary.
        backward: whether backward is part of it.
        size: bytes of a logit.
    """
    forward = N * V * size + N * (8 + 2 * 4)
    return Floor(forward + (2 * N * V * size + N * (8 + 3 * 4) if backward else 0))


def linear_token_logprobs(N: int, V: int, H: int, *, size: int = 2) -> Floor:
    """Of `nemo_rl_ref.logprobs.linear_token_logprobs`, forward and backward.

    The logits are a matrix product of ``2 N H V`` operations. Their gradient needs the weight of
    each token in the loss, which is not known before backward, and the logits are not kept: so
    backward makes them again, and two more products make the gradients of hidden states and
    weight. Hidden states and weight are read in forward and in backward, and their gradients
    written.

    Args:
        N: rows.
        V: vocabulary.
        H: hidden size.
        size: bytes of a number.
    """
    return Floor(3 * (N + V) * H * size + N * (2 * 8 + 3 * 4), 4 * 2 * N * H * V)


def gae(B: int, S: int, *, size: int = 4) -> Floor:
    """Of the recurrence of GAE: rewards, values and mask read, advantages and returns written.

    Args:
        B: rows.
        S: tokens of a row.
        size: bytes of a number.
    """
    return Floor(5 * B * S * size)


def clipped_pg_terms(B: int, S: int, *, size: int = 4) -> Floor:
    """Of the terms of `ClippedPGLossFn`, forward and backward.

    Four log-probabilities, the advantage and the mask of each token are read in forward and, since
    they decide about its gradient, in backward; there the gradient is written. Rows and sums are
    small beside them.

    Args:
        B: rows.
        S: tokens of a row.
        size: bytes of a number.
    """
    return Floor((6 + 7) * B * S * size)
