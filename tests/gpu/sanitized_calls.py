# SPDX-License-Identifier: Apache-2.0
"""One small call of every kernel, forward and backward, for compute-sanitizer to look at.

    compute-sanitizer --tool racecheck python tests/gpu/sanitized_calls.py

Shapes are chosen so that rows start at addresses that 16 does not divide, end in a partial vector,
and hold ignored targets. The results are looked at too, so that a kernel that does nothing is
noticed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from nemo_rl_ref.algorithms._recurrence import gae
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl_ref.algorithms.loss._clipped_pg_terms import (
    Settings,
    clipped_pg_terms,
)
from nemo_rl_ref.logprobs import linear_token_logprobs, token_logprobs

DEVICE = torch.device("cuda")
BACKENDS = ("cuda", "torch")


def check(name, ours, theirs):
    """Compares the results of two backends, whatever they are made of."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    print(f"{name}: ok")


def both(function, inputs, **options):
    """Outputs and gradients of the CUDA kernels and of plain PyTorch."""
    found = []
    for backend in BACKENDS:
        leaves = [tensor.detach().clone() for tensor in inputs]
        for leaf, tensor in zip(leaves, inputs, strict=True):
            leaf.requires_grad_(tensor.requires_grad)
        outputs = function(*leaves, backend=backend, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if any(leaf.requires_grad for leaf in leaves):
            # Of the policy gradient's terms the loss, 0, has a gradient, and metrics have none.
            terms = [outputs[0][0]] if function is clipped_pg_terms else outputs
            sum(output.float().sum() for output in terms).backward()
        found.append([*outputs, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    return found


def main():
    """Call every kernel."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(5, 1003, device=DEVICE, dtype=dtype, requires_grad=True)
        targets = torch.tensor([0, 1002, -100, 501, 7], device=DEVICE)
        check("token_logprobs", *both(token_logprobs, (logits, targets), return_entropy=True))
        hidden = torch.randn(5, 64, device=DEVICE, dtype=dtype, requires_grad=True)
        weight = (torch.randn(1003, 64, device=DEVICE, dtype=dtype) / 8).requires_grad_()
        check("linear_token_logprobs", *both(linear_token_logprobs, (hidden, weight, targets)))
    rewards, values = torch.randn(2, 3, 517, device=DEVICE)
    mask = (torch.rand(3, 517, device=DEVICE) < 0.8).float()
    check("gae", *both(gae, (rewards, values, mask), gamma=0.99, lam=0.95))
    current = (-torch.rand(3, 517, device=DEVICE)).requires_grad_()
    others = [current.detach() + 0.1 * torch.randn_like(rewards) for _ in range(3)]
    tensors = (current, *others, torch.randn_like(rewards), mask)
    settings = Settings.of(ClippedPGLossFn(ClippedPGLossConfig(ratio_clip_c=3.0)))
    check("clipped_pg_terms", *both(clipped_pg_terms, tensors, settings=settings))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
