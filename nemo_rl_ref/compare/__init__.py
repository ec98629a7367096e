# SPDX-License-Identifier: Apache-2.0
"""Comparison of two trainings over seeds: a loss, a reward or a setting against another.

.. code-block:: sh

    python -m nemo_rl_ref.compare dpo --config configs/dpo.yaml --loss my_loss.py:MyLoss \
        --metric val:validation-default_accuracy --seeds 5
    python -m nemo_rl_ref.compare grpo --config configs/grpo_tiny.yaml --env my_reward.py:reward
    python -m nemo_rl_ref.compare dpo --config configs/dpo.yaml \
        --change dpo.reference_policy_kl_penalty=0.5 dpo.max_num_steps=40

Both sides are trained on the same seeds, so with the same order of the data, and compared by their
differences on the same seed, as a search compares its best trials with the default
(`nemo_rl_ref.tune.outcome.reevaluate`). What has been trained is not trained again: the same command
goes on after an interruption, and with more seeds.
"""
