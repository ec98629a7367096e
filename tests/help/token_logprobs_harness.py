# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``token_logprobs.cu``, compiled for CPU threads."""

from functools import cache

from thread_harness import ThreadHarness

BLOCK = 64


def instances(dtype, block=BLOCK, entropies=("true", "false"), caps=("false", "true")):
    return [
        f"token_logprobs_{name}<{dtype}, {block}, {entropy}, {cap}>"
        for name in ("forward", "backward")
        for entropy in entropies
        for cap in caps
        if (entropy, cap) != ("false", "true")
    ]


@cache
def harness(dtype):
    return ThreadHarness("token_logprobs", instances(dtype))
