# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels for what is limited by memory in RL losses, and how they are built.

`gae` and `clipped_pg_terms` are what the advantage estimator and the policy-gradient loss call;
:mod:`nemo_rl_ref.logprobs` has the functions for log-probabilities. Each chooses by itself between
its kernel and plain PyTorch.
"""

from nemo_rl_ref.kernels._clipped_pg import TERMS, clipped_pg_terms
from nemo_rl_ref.kernels._gae import gae

__all__ = ["TERMS", "clipped_pg_terms", "gae"]
