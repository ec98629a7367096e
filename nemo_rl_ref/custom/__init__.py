# SPDX-License-Identifier: Apache-2.0
"""Losses that NeMo RL does not have, written against its protocol.

Each file stands alone: it imports only what NeMo RL has under the same path. Copy a file into a
project, change the import prefix ``nemo_rl_ref`` to ``nemo_rl``, and its losses run in NeMo RL.

A preference loss is built from a `DPOLossConfig`, a policy-gradient loss from a
`ClippedPGLossConfig`. Its own settings are further keys of that config, which NeMo RL accepts:
under ``dpo:`` or ``loss_fn:`` in the YAML file they arrive with the rest.

Two attributes say what a loss needs that NeMo RL's does not:

- ``needs_data``: keys that it reads in ``data`` besides those of DPO or of the clipped policy
  gradient; absent if there are none.
- ``needs_whole_batch``: true if it couples the rows of a micro-batch, so that micro-batches do
  not sum to the batch; absent or false otherwise.

Nothing is imported here: ``from nemo_rl_ref.custom.pairwise import IPOLossFn``.
"""
