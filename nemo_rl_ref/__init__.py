# SPDX-License-Identifier: Apache-2.0
"""A reference implementation of NeMo RL's algorithm layer in plain PyTorch.

Modules keep the paths of NeMo RL: what is ``nemo_rl.algorithms.loss.DPOLossFn`` there is
``nemo_rl_ref.algorithms.loss.DPOLossFn`` here. Importing this package imports nothing else.
"""
