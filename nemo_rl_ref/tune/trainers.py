# SPDX-License-Identifier: Apache-2.0
"""Which of this package's trainings an algorithm has, and which keys it reads."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

#: The algorithms that can be searched: those that this package trains.
ALGORITHMS = ("sft", "dpo", "rm", "grpo", "ppo")


@dataclass(frozen=True)
class AlgorithmRunner:
    """How an algorithm is trained.

    Attributes:
        train: Trains as a configuration says; takes ``observe``.
        used: Patterns of the keys that it reads.
        not_here: Switches that must be off.
    """

    train: Callable[..., Any]
    used: tuple[str, ...]
    not_here: Mapping[str, str]


@cache
def runner_of(algorithm: str) -> AlgorithmRunner:
    """Import the runner of an algorithm."""
    from nemo_rl_ref.config.lists import NOT_HERE
    from nemo_rl_ref.config.sections import DPOSettings, RMSettings, SFTSettings
    from nemo_rl_ref.config.settings import used_keys

    if algorithm in ("grpo", "ppo"):
        from nemo_rl_ref import run_grpo
        from nemo_rl_ref.rl.settings import NOT_HERE_IN_RL, GRPOSettings, PPOSettings

        used = used_keys(PPOSettings, GRPOSettings)
        return AlgorithmRunner(run_grpo.train, used, NOT_HERE_IN_RL)
    module = importlib.import_module(f"nemo_rl_ref.run_{algorithm}")
    settings = {"sft": SFTSettings, "dpo": DPOSettings, "rm": RMSettings}[algorithm]
    return AlgorithmRunner(module.train, used_keys(settings), NOT_HERE)
