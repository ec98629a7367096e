# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``token_logprobs.cu``, executed on the CPU, against float64 references."""

import pytest
import torch

from nemo_rl_ref.kernels import _token_logprobs as kernel
from nemo_rl_ref.kernels import loader
from thread_harness import SKIPPED, ThreadHarness, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason=SKIPPED)


def test_forward_runs(monkeypatch):
    harness = ThreadHarness("token_logprobs", ["token_logprobs_forward<float, 64, true, false>"])
    monkeypatch.setattr(loader, "launch", harness.launch)
    monkeypatch.setattr(kernel, "_SMALL_BLOCK", 64)
    logits, targets = torch.randn(5, 33), torch.randint(33, (5,))
    outputs = tuple(torch.full((5,), torch.nan) for _ in range(4))
    kernel.forward(logits, targets, outputs, temperature=0.7)
    logp = (logits.double() / 0.7).log_softmax(-1)
    torch.testing.assert_close(outputs[0].double(), logp.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(outputs[1].double(), -(logp.exp() * logp).sum(1))
