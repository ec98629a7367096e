# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning with NeMo RL's configuration.

.. code-block:: sh

    python -m nemo_rl_ref.run_sft --config sft.yaml policy.model_name=… data.train.data_path=…
    accelerate launch --num_processes 4 -m nemo_rl_ref.run_sft --config sft.yaml …

It trains on the tokens of the assistant's messages, all of them or the last one
(``sft.only_unmask_final``), from the last checkpoint if there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from nemo_rl_ref.algorithms.loss import NLLLossFn
from nemo_rl_ref.config.sections import SFTSettings
from nemo_rl_ref.training.command_line import run
from nemo_rl_ref.training.models import load_policy, load_tokenizer
from nemo_rl_ref.training.samples import supervised_samples
from nemo_rl_ref.training.supervised import Task, fit, read_supervised_settings
from nemo_rl_ref.training.user_code import checked_loss


def train(config: dict[str, Any], *, loss: str | None = None, strict: bool = False, **options: Any):
    """Fine-tune as a configuration says.

    Args:
        config: The configuration, resolved, a plain dict.
        loss: ``file.py:Class`` to take in the place of the negative log-likelihood.
        strict: Refuse such a loss if it breaks one of NeMo RL's promises.
        **options: Passed to `nemo_rl_ref.training.supervised.fit`.

    Returns:
        What `nemo_rl_ref.training.supervised.fit` returns.
    """
    settings = read_supervised_settings(config, SFTSettings)
    loss_fn = NLLLossFn()
    if loss:
        loss_fn = checked_loss(loss, settings.sft.given(), "sft", pairs=False, strict=strict)
    tokenizer = load_tokenizer(settings.policy.tokenizer)
    training, validation = supervised_samples(settings, tokenizer)
    if not validation and settings.sft.val_period > 0:
        raise ValueError(
            f"sft.val_period: got {settings.sft.val_period} without data.validation; set it to 0, "
            "or data.train.split_validation_size above 0"
        )
    names, load = {"loss": "val_loss"}, partial(load_policy, tokenizer=tokenizer)
    task = Task(training, validation, load, loss_fn, names, pairs=False)
    return fit(task, settings, tokenizer, config, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run(argv, (__doc__ or "").split("\n")[0], train, SFTSettings)


if __name__ == "__main__":
    sys.exit(main())
