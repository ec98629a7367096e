# SPDX-License-Identifier: Apache-2.0
"""`linear_token_logprobs` with the CUDA kernels, executed on the CPU, against plain PyTorch."""

import pytest
import torch
from thread_harness import SKIPPED, compiler
from token_logprobs_harness import BLOCK, harness

from nemo_rl_ref.kernels import token_logprobs as kernel
from nemo_rl_ref.logprobs import IGNORE_INDEX, linear_token_logprobs
from nemo_rl_ref.logprobs import linear as module

pytestmark = pytest.mark.skipif(compiler() is None, reason=SKIPPED)


@pytest.mark.parametrize("columns", [1000, 40])
@pytest.mark.parametrize(
    ("dtype", "softcap", "entropy"),
    [("float", None, True), ("float", 2.0, True), ("bfloat16", None, False), ("double", 2.0, True)],
)
def test_as_plain_pytorch(dtype, softcap, entropy, columns, on_threads, monkeypatch):
    on_threads(harness(dtype))
    for name in ("_SMALL_BLOCK", "_BLOCK"):
        monkeypatch.setattr(kernel, name, BLOCK)
    monkeypatch.setattr(module, "_CPU_TILE_BYTES", 1)
    monkeypatch.setattr(module, "_CPU_COLUMNS", columns)
    dtype = {"float": torch.float32, "bfloat16": torch.bfloat16, "double": torch.float64}[dtype]
    generator = torch.Generator().manual_seed(1)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((2, 3, 16), (130, 16), (130,))
    )
    targets = torch.randint(130, (2, 3), generator=generator)
    targets[0, 1] = IGNORE_INDEX
    results = []
    for backend in ("torch", "cuda"):
        outputs = linear_token_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=0.9,
            logit_softcap=softcap,
            return_entropy=entropy,
            backend=backend,
        )
        outputs = outputs if entropy else (outputs,)
        loss = sum((i + 1) * output.sin().sum() for i, output in enumerate(outputs))
        results.append([*outputs, *torch.autograd.grad(loss, (hidden, weight, bias))])
    exact = dtype != torch.bfloat16
    tolerance = {} if exact else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(results[1], results[0], **tolerance)
