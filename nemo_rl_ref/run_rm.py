# SPDX-License-Identifier: Apache-2.0
"""Training a Bradley-Terry reward model with NeMo RL's configuration.

.. code-block:: sh

    python -m nemo_rl_ref.run_rm --config rm.yaml policy.model_name=… data.train.data_path=…

The model gets a new output, drawn with the run's seed, that maps the state at the last token to a
reward.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from nemo_rl_ref.algorithms.loss import PreferenceLossFn
from nemo_rl_ref.config.sections import RMSettings
from nemo_rl_ref.training.command_line import run
from nemo_rl_ref.training.models import load_reward_model, load_tokenizer
from nemo_rl_ref.training.samples import preference_samples
from nemo_rl_ref.training.supervised import Task, fit, read_supervised_settings
from nemo_rl_ref.training.user_code import checked_loss

METRICS = ("loss", "accuracy", "rewards_chosen_mean", "rewards_rejected_mean", "num_valid_samples")


def train(config: dict[str, Any], *, loss: str | None = None, strict: bool = False, **options: Any):
    """Train as a configuration says.

    Args:
        config: The configuration, resolved, a plain dict.
        loss: ``file.py:Class`` to take in the place of `PreferenceLossFn`.
        strict: Refuse such a loss if it breaks one of NeMo RL's promises.
        **options: Passed to `nemo_rl_ref.training.supervised.fit`.

    Returns:
        What `nemo_rl_ref.training.supervised.fit` returns.
    """
    settings = read_supervised_settings(config, RMSettings)
    loss_fn = PreferenceLossFn()
    if loss:
        loss_fn = checked_loss(loss, settings.rm.given(), "rm", pairs=True, strict=strict)
    tokenizer = load_tokenizer(settings.policy.tokenizer)
    training, validation = preference_samples(settings, tokenizer, add_loss_mask=False)
    task = Task(
        training,
        validation,
        lambda name: load_reward_model(name, tokenizer.pad_token_id, tokenizer),
        loss_fn,
        validation_metrics=None if loss else {name: name for name in METRICS},
    )
    return fit(task, settings, tokenizer, config, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run(argv, (__doc__ or "").split("\n")[0], train, RMSettings)


if __name__ == "__main__":
    sys.exit(main())
