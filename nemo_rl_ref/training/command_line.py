# SPDX-License-Identifier: Apache-2.0
"""The command line that the runners share: a configuration, overrides, and a loss of one's own."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from nemo_rl_ref.config.lists import NOT_HERE
from nemo_rl_ref.config.sections import RunSettings
from nemo_rl_ref.config.settings import read_settings, used_keys
from nemo_rl_ref.contract.user_code import UsageError, place_in_user_code
from nemo_rl_ref.files.sealed import CheckpointError
from nemo_rl_ref.training.processes import from_main, process_state
from nemo_rl_ref.utils.checkpoint import CheckpointManager

#: Exit status of a program that Ctrl-C has ended, by convention.
INTERRUPTED = 130


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
        train: Called with the configuration, a plain dict, and the options ``loss``, ``strict``,
            ``allow_config_changes`` and ``report`` (see `nemo_rl_ref.training.loop.Run`), and
            ``env`` if there is such an option.
        *kinds: The settings it may have, see `nemo_rl_ref.config.settings.read_settings`.
        env: Whether there is an option ``--env``, for a reward of one's own.
        not_here: Switches that must be off, see `nemo_rl_ref.config.keys.check_keys`.

    Returns:
        The exit status: 0, or 1 after an error that is printed in one piece, or 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    options, overrides = _parse(words, description, env)
    command = ["python", "-m", f"nemo_rl_ref.run_{kinds[-1].algorithm}", *words]
    result: dict[str, Any] = {}
    config: dict[str, Any] = {}
    status, log_dir = 1, None
    with ExitStack() as stack:
        output = stack.enter_context(redirect_stdout(_GoesOn(sys.stdout)))
        errors = stack.enter_context(redirect_stderr(_GoesOn(sys.stderr)))
        if options.json:
            stack.enter_context(redirect_stdout(errors))
        try:
            config = _configuration(options.config, overrides, kinds, not_here)
            log_dir = stack.enter_context(_experiment_dir(config["logger"]["log_dir"]))
            config["logger"]["log_dir"] = log_dir
            train(
                config,
                loss=options.loss,
                strict=options.strict,
                allow_config_changes=options.allow_config_changes,
                report=result.update,
                **({"env": options.env} if env else {}),
            )
            status = 0
            if result:
                result["next"] = shlex.join(_next(command, result))
                print(f"  to train on      {result['next']}")
        except KeyboardInterrupt:
            status, result["error"] = INTERRUPTED, _interrupted(config, command)
        except (Exception, SystemExit) as error:
            result["error"] = _in_one_line(error, log_dir)
        if status and (status != INTERRUPTED or process_state().is_main_process):
            print("" if status == INTERRUPTED else "error: ", end="", file=sys.stderr)
            print(result["error"], file=sys.stderr)
        if options.json and process_state().is_main_process:
            print(json.dumps(_plain(result)), file=output, flush=True)
    return status


def _parse(words: list[str], description: str, env: bool) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the overrides, which are all that is no option."""
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
        help="resume from a checkpoint although configuration, data or code have changed",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the results as one JSON object, and all else to the standard error",
    )
    options, overrides = parser.parse_known_args(words)
    if misspelt := [text for text in overrides if text.startswith("--")]:
        parser.error(f"{misspelt[0]}: no such option")
    return options, overrides


def _configuration(
    path: str, overrides: list[str], kinds: tuple[type[RunSettings], ...], not_here: Any
) -> dict[str, Any]:
    """The configuration, checked; prints the report on its keys."""
    from nemo_rl_ref.config.read import read_config

    config, report = read_config(path, overrides, used_keys(*kinds), not_here=not_here)
    read_settings(config, *kinds)
    if process_state().is_main_process:
        print(report)
    return config


@contextmanager
def _experiment_dir(log_dir: str) -> Iterator[str]:
    """The next free folder below another. What nothing is written to is removed in the end."""
    from nemo_rl_ref.utils.logger import get_next_experiment_dir

    base, folder, problem = Path(log_dir), None, None
    made = [path for path in (base, *base.parents) if not path.exists()]
    is_main = process_state().is_main_process
    if is_main:
        try:
            folder = get_next_experiment_dir(log_dir)
        except OSError as error:
            problem = f"logger.log_dir: {log_dir} cannot be written to: {error}"
    folder, problem = from_main((folder, problem))
    if problem:
        raise ValueError(problem)
    try:
        yield folder
    finally:
        for path in (Path(folder), *made) if is_main else ():
            try:
                path.rmdir()
            except OSError:  # something is in it
                break


def _next(command: list[str], result: Mapping[str, Any]) -> list[str]:
    """The command that trains longer, or, after a run that time has stopped, goes on."""
    if result["state"] == "stopped":
        return command
    section = result["algorithm"]
    if result["limit"] == "validation":
        return [*command, f"{section}.stop_at_validation_threshold=…"]
    key = f"{section}.{result['limit']}"
    left = [word for word in command if word.lstrip("+").partition("=")[0] != key]
    return [*left, f"{key}={2 * result['limited_to']}"]


def _interrupted(config: Mapping[str, Any], command: list[str]) -> str:
    """What to say after Ctrl-C: what is saved, and how to go on."""
    saving, again = config.get("checkpointing") or {}, shlex.join(command)
    if not saving.get("enabled"):
        return f"interrupted: no checkpoint is written; this starts again: {again}"
    latest = CheckpointManager(saving).get_latest_checkpoint_path()
    if latest is None:
        return f"interrupted before the first checkpoint; this starts again: {again}"
    return f"interrupted: the last checkpoint is {latest}; this goes on from it: {again}"


def _in_one_line(error: BaseException, log_dir: str | None) -> str:
    """What went wrong. An error that nobody has written a sentence for leaves its traceback."""
    from nemo_rl_ref.utils.config import OverridesError

    expected = (
        CheckpointError,
        OverridesError,
        FloatingPointError,
        ImportError,
        OSError,
        ValueError,
    )
    place = place_in_user_code(error)
    if isinstance(error, UsageError) or (isinstance(error, expected) and not place):
        return str(error)
    name = f"{place or 'this program failed'}: {type(error).__name__}: {error}"
    if log_dir is None:
        return name
    file, lines = Path(log_dir) / "traceback.txt", traceback.format_exception(error)
    try:
        file.write_text("".join(lines), encoding="utf-8")
    except OSError:
        return name
    return f"{name} (traceback: {file})"


def _plain(value: Any) -> Any:
    """A value that JSON has: NaN and infinities become text, as in ``metrics.jsonl``."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


class _GoesOn:
    """A stream that swallows what nobody reads any more, or what a full disk does not take."""

    def __init__(self, stream: Any):
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write to the stream, or to nowhere."""
        return self._or_nowhere(self._stream.write, text) or len(text)

    def flush(self) -> None:
        """Flush the stream, if it is there."""
        self._or_nowhere(self._stream.flush)

    def _or_nowhere(self, call: Callable[..., Any], *arguments: str) -> Any:
        try:
            return call(*arguments)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            return None
