# SPDX-License-Identifier: Apache-2.0
"""This project's run of the same configuration."""

import importlib

import record

from nemo_rl_ref.rl import trainer
from nemo_rl_ref.training import step, supervised
from nemo_rl_ref.utils import checkpoint, logger

VALUE = "RLTrainer.update_value"  # where the value model's loss is made


def run(algorithm, words, pieces=None, folder="."):
    """Run this project's program of an algorithm, see `nemo_rl_side.run`."""
    run_batch = step.run_batch

    def noted(model, loss_fn, batch, accelerator, **options):
        found = run_batch(model, loss_fn, batch, accelerator, **options)
        value = "loss" in options and getattr(options["loss"], "__qualname__", "").startswith(VALUE)
        of = "value" if value else "policy"
        record.batch(batch, batch.size, training=options["backward"], of=of)
        return found

    step.run_batch = supervised.run_batch = noted
    record.metrics_of(logger.Logger)
    record.checkpoints_of(checkpoint.CheckpointManager)
    if pieces:
        file = f"{folder}/{pieces.module}.py"
        words = [*words, "--loss", f"{file}:{pieces.loss}"]
        if pieces.reward:
            words += ["--env", f"{file}:{pieces.reward}"]
    if pieces and pieces.estimator:  # our program has no option for one; NeMo RL has none either
        kind = getattr(importlib.import_module(pieces.module), pieces.estimator)
        trainer.make_estimator = lambda settings: kind(
            settings.section.adv_estimator, settings.loss_fn
        )
    program = importlib.import_module(f"nemo_rl_ref.run_{algorithm.replace('ppo', 'grpo')}")
    status = program.main(words)
    if status:
        raise SystemExit(status)
