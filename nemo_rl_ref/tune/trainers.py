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

    if algorithm in ("grpo", "ppo"):
        from nemo_rl_ref import run_grpo
        from nemo_rl_ref.rl.settings import NOT_HERE_IN_RL, USED_KEYS
        from nemo_rl_ref.training.loop import USED_KEYS as EVERY_RUNNERS_KEYS

        return AlgorithmRunner(run_grpo.train, (*EVERY_RUNNERS_KEYS, *USED_KEYS), NOT_HERE_IN_RL)
    module = importlib.import_module(f"nemo_rl_ref.run_{algorithm}")
    return AlgorithmRunner(module.train, module.USED, NOT_HERE)
