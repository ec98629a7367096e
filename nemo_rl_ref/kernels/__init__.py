# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels for what is limited by memory in RL losses, and how they are built.

They know tensors and numbers. The functions that call them choose by themselves between a kernel
and plain PyTorch: :mod:`nemo_rl_ref.logprobs` for log-probabilities, the estimator
`nemo_rl_ref.algorithms.advantage_estimator.GeneralizedAdvantageEstimator` for its recurrence, and
`nemo_rl_ref.algorithms.loss.ClippedPGLossFn` for its loss and metrics.
"""
