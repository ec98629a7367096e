# SPDX-License-Identifier: Apache-2.0
"""GRPO and PPO on one machine, with NeMo RL's configuration files.

.. code-block:: sh

    python -m nemo_rl_ref.run_grpo --config configs/grpo_tiny.yaml grpo.max_num_steps=50
    python -m nemo_rl_ref.run_grpo --config configs/ppo.yaml --env my_file.py:reward
    accelerate launch --num_processes 2 -m nemo_rl_ref.run_grpo --config configs/grpo_tiny.yaml

A configuration with a section ``ppo`` is trained with PPO, one with ``grpo`` with GRPO; what a step
does is in :mod:`nemo_rl_ref.rl.trainer`.
"""

from __future__ import annotations

import sys
from typing import Any

from nemo_rl_ref.rl.settings import (
    NOT_HERE_IN_RL,
    GRPOSettings,
    PPOSettings,
    check_prompts,
    read_rl_settings,
)
from nemo_rl_ref.rl.trainer import RLTrainer
from nemo_rl_ref.training.command_line import run
from nemo_rl_ref.training.loop import Run
from nemo_rl_ref.training.user_code import checked_loss, load_reward


def train(
    config: dict[str, Any],
    *,
    env: str | None = None,
    loss: str | None = None,
    strict: bool = False,
    **options: Any,
) -> dict[str, float]:
    """Run GRPO or PPO to the end, from the last checkpoint if there is one.

    Args:
        config: The configuration, resolved, a plain dict.
        env: ``file.py:function`` that scores all responses, see `nemo_rl_ref.rl.rewards`; if not
            given, each dataset's ``env_name`` does.
        loss: ``file.py:Class`` to take in the place of `ClippedPGLossFn`.
        strict: Refuse such a loss if it breaks one of NeMo RL's promises.
        **options: ``allow_config_changes``, ``observe`` and ``report`` of
            `nemo_rl_ref.training.loop.Run`.

    Returns:
        The last validation's metrics; empty if there was none.

    Raises:
        ValueError: If the configuration cannot be used. The message names the key.
        CheckpointError: If the checkpoint cannot be used, or none can be written.
        NotFinite: If a loss or gradient is not finite. The message names step, samples and layer.
    """
    settings = read_rl_settings(config)
    loss_fn = None
    if loss:
        section = settings.loss_fn.model_dump(exclude_unset=True)
        loss_fn = checked_loss(loss, section, "loss_fn", pairs=False, strict=strict)
    environment = load_reward(env) if env else None
    trainer = RLTrainer(config, environment=environment, loss_fn=loss_fn, load=False)
    check_prompts(trainer.cfg, trainer.train_prompts, trainer.val_prompts)
    loop = Run(trainer, **options)  # pyright: ignore[reportArgumentType], see [tool.pyright]
    return loop.train()["validation"]


def main(argv: list[str] | None = None) -> int:
    """Train with the configuration on the command line, and return the exit status."""
    kinds = (PPOSettings, GRPOSettings)
    title = (__doc__ or "").splitlines()[0]
    return run(argv, title, train, *kinds, env=True, not_here=NOT_HERE_IN_RL)


if __name__ == "__main__":
    sys.exit(main())
