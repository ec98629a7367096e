# SPDX-License-Identifier: Apache-2.0
"""Data: NeMo RL's preference formats, from a JSONL file to a padded batch.

The path is the one NeMo RL takes: a dataset of ``context`` and ranked ``completions``
(:mod:`nemo_rl_ref.data.datasets.preference_datasets`), a preprocessor that tokenizes one pair
(:mod:`nemo_rl_ref.data.processors`), and a collate function that interleaves and pads
(:mod:`nemo_rl_ref.data.collate_fn`). What trains on them is
:class:`nemo_rl_ref.training.samples.Samples`.
"""
