# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels for what is limited by memory in RL losses, and how they are built.

The functions that use them stand elsewhere and choose by themselves: see
:mod:`nemo_rl_ref.logprobs`.
"""
