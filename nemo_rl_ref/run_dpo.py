# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization with NeMo RL's configuration.

.. code-block:: sh

    python -m nemo_rl_ref.run_dpo --config dpo.yaml policy.model_name=… data.train.data_path=…
    python -m nemo_rl_ref.run_dpo --config dpo.yaml --loss my_loss.py:MyLoss ++dpo.margin=0.5 …
    accelerate launch --num_processes 4 -m nemo_rl_ref.run_dpo --config dpo.yaml …

The reference policy is the model of ``policy.model_name`` as it is before training. It does not
change, and neither does a sample, so its log-probabilities are computed once, for the samples that
the run will use; NeMo RL computes them again in every step. They are kept beside the checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn
from nemo_rl_ref.config.sections import DPOSettings
from nemo_rl_ref.training.command_line import run
from nemo_rl_ref.training.models import load_policy, load_tokenizer
from nemo_rl_ref.training.reference import keep_reference_logprobs
from nemo_rl_ref.training.samples import preference_samples
from nemo_rl_ref.training.supervised import Task, fit, read_supervised_settings
from nemo_rl_ref.training.user_code import checked_loss

METRICS = (
    "loss", "sft_loss", "preference_loss", "accuracy", "rewards_chosen_mean",
    "rewards_rejected_mean", "num_valid_samples", "global_valid_seqs", "global_valid_toks",
)  # fmt: skip


def train(config: dict[str, Any], *, loss: str | None = None, strict: bool = False, **options: Any):
    """Train as a configuration says.

    Args:
        config: The configuration, resolved, a plain dict.
        loss: ``file.py:Class`` to take in the place of `DPOLossFn`.
        strict: Refuse such a loss if it breaks one of NeMo RL's promises.
        **options: Passed to `nemo_rl_ref.training.supervised.fit`.

    Returns:
        What `nemo_rl_ref.training.supervised.fit` returns.
    """
    settings = read_supervised_settings(config, DPOSettings)
    if loss:
        loss_fn = checked_loss(loss, settings.dpo.given(), "dpo", pairs=True, strict=strict)
    else:
        loss_fn = DPOLossFn(DPOLossConfig(**settings.dpo.given()))
    tokenizer = load_tokenizer(settings.policy.tokenizer)
    training, validation = preference_samples(settings, tokenizer, add_loss_mask=True)
    load = partial(load_policy, tokenizer=tokenizer)
    task = Task(
        training,
        validation,
        load,
        loss_fn,
        validation_metrics=None if loss else {name: name for name in METRICS},
    )
    task.prepare = lambda accelerator, sets, folder: keep_reference_logprobs(
        settings.policy, sets, load, accelerator, folder
    )
    return fit(task, settings, tokenizer, config, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run(argv, (__doc__ or "").split("\n")[0], train, DPOSettings)


if __name__ == "__main__":
    sys.exit(main())
