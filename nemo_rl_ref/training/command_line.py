# SPDX-License-Identifier: Apache-2.0
"""The command line that the runners share: a configuration, overrides, and a loss of one's own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_rl_ref.config.lists import NOT_HERE
from nemo_rl_ref.config.sections import RunSettings
from nemo_rl_ref.config.settings import read_settings, used_keys
from nemo_rl_ref.training.processes import from_main, process_state


def run(
    argv: Sequence[str] | None,
    description: str,
    train: Callable[..., Any],
    *kinds: type[RunSettings],
    env: bool = False,
    not_here: Mapping[str, str] = NOT_HERE,
) -> int:
    """Read a configuration, account for its keys, and train.

    Args:
        argv: The arguments; None for those of the process.
        description: What the program does.
        train: Called with the configuration, a plain dict, and the options ``loss``, ``strict`` and
            ``allow_config_changes``, and ``env`` if there is such an option.
        *kinds: The settings it may have, see `nemo_rl_ref.config.settings.read_settings`.
        env: Whether there is an option ``--env``, for a reward of one's own.
        not_here: Switches that must be off, see `nemo_rl_ref.config.keys.check_keys`.

    Returns:
        The exit status: 0, or 1 after an error that is printed in one piece.
    """
    from nemo_rl_ref.config.read import read_config
    from nemo_rl_ref.files.sealed import CheckpointError
    from nemo_rl_ref.utils.config import OverridesError
    from nemo_rl_ref.utils.logger import get_next_experiment_dir

    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=description,
        epilog="All other arguments are overrides in Hydra's grammar, as NeMo RL takes them: "
        "policy.model_name=… dpo.max_num_steps=10 ++policy.optimizer.kwargs.amsgrad=true",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file of NeMo RL's")
    parser.add_argument("--loss", metavar="FILE.py:CLASS", help="a loss of your own; is imported")
    if env:
        parser.add_argument("--env", metavar="FILE.py:FUNCTION", help="a reward of your own")
    parser.add_argument("--strict", action="store_true", help="refuse a loss that breaks a promise")
    parser.add_argument(
        "--allow-config-changes",
        action="store_true",
        help="resume from a checkpoint although configuration or data have changed",
    )
    options, overrides = parser.parse_known_args(argv)
    if misspelt := [text for text in overrides if text.startswith("--")]:
        parser.error(f"{misspelt[0]}: no such option")
    try:
        config, report = read_config(
            options.config, overrides, used_keys(*kinds), not_here=not_here
        )
        log_dir = read_settings(config, *kinds).logger.log_dir
        if process_state().is_main_process:
            print(report)
            log_dir = get_next_experiment_dir(log_dir)
        config["logger"]["log_dir"] = from_main(log_dir)
        train(
            config,
            loss=options.loss,
            strict=options.strict,
            allow_config_changes=options.allow_config_changes,
            **({"env": options.env} if env else {}),
        )
    except (
        CheckpointError, OverridesError, FloatingPointError, ImportError, OSError, ValueError
    ) as error:  # fmt: skip
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
