# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens, and entropies, from logits or from hidden states.

:func:`token_logprobs` starts from logits, :func:`linear_token_logprobs` from hidden states and the
language-model head, and never holds all logits. Where the tensors are on CUDA they run the CUDA
kernels of :mod:`nemo_rl_ref.kernels`, elsewhere plain PyTorch; the argument ``backend`` and the
environment variable ``NEMO_RL_REF_BACKEND`` choose otherwise.
"""

from nemo_rl_ref.logprobs.arguments import IGNORE_INDEX
from nemo_rl_ref.logprobs.linear import linear_token_logprobs
from nemo_rl_ref.logprobs.token import token_logprobs

__all__ = ["IGNORE_INDEX", "linear_token_logprobs", "token_logprobs"]
