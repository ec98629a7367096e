# SPDX-License-Identifier: Apache-2.0
"""The loss of ``--loss my_file.py:MyLoss`` and the reward of ``--env``: found, built, checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from nemo_rl_ref.contract import check_loss
from nemo_rl_ref.contract.build import call_loss_class, fields_of, signature_of, takes_any_field
from nemo_rl_ref.contract.limits import Overtime, file_of, raised_at, time_limit, written_at
from nemo_rl_ref.contract.user_code import UsageError, find
from nemo_rl_ref.training.processes import from_main, process_state


def load_reward(spec: str) -> Callable[[str, str, str], Any]:
    """Load a reward function; see `nemo_rl_ref.rl.rewards`.

    Args:
        spec: ``path/to/my_file.py:my_reward``.

    Raises:
        UsageError: If it cannot be loaded, or is no function of three texts.
    """
    reward = find(spec, "--env")
    expected = "expected a function of three texts: (prompt, response, ground_truth)"
    if isinstance(reward, type) or not callable(reward):
        what = "a class" if isinstance(reward, type) else f"{type(reward).__name__}"
        raise UsageError(
            f"--env: {spec}: got {what}{written_at(reward) or f' ({reward!r:.80})'}, {expected}"
        )
    try:
        inspect.signature(reward).bind("", "", "")
    except TypeError as error:
        raise UsageError(f"--env: {spec}{written_at(reward)}: {error}, {expected}") from error
    return reward


def build_loss(kind: Any, section: Mapping[str, Any], key: str) -> Any:
    """Build a loss with the settings of a configuration's section.

    NeMo RL gives a loss the section it belongs to, ``dpo`` for DPO, as the class that its
    ``__init__`` asks for. The same is done here: the class of the first argument that is a
    pydantic model or TypedDict, or the one whose name fits, gets the fields that it has, and all
    of them if it takes any. Other arguments are taken from the section by their names.

    Args:
        kind: The class. Anything else is returned as it is: a loss that is already built.
        section: The section, a plain dict.
        key: Its name, for messages.

    Raises:
        UsageError: If the class refuses the settings.
    """
    if not isinstance(kind, type):
        if not callable(kind) or not hasattr(kind, "input_type"):
            at = written_at(kind) or f" ({kind!r:.80})"
            raise UsageError(
                f"--loss: got {type(kind).__name__}{at}, expected a class of losses, "
                "with loss_type and input_type"
            )
        return kind
    if inspect.isabstract(kind) or not any("__call__" in vars(base) for base in kind.__mro__):
        missing = ", ".join(sorted(getattr(kind, "__abstractmethods__", ()))) or "__call__"
        raise UsageError(f"--loss: {kind.__name__}{written_at(kind)} has no {missing}")
    argument, config, others = signature_of(kind)
    wanted = section if takes_any_field(config) else fields_of(config)
    settings = {name: section[name] for name in section if name in wanted and name not in others}
    given = {name: section[name] for name in others if name in section}
    try:
        return call_loss_class(kind, argument, config, given, settings)
    except UsageError as error:
        raise UsageError(f"--loss with the section {key}: {error}") from error


def checked_loss(
    spec: str, section: Mapping[str, Any], key: str, *, pairs: bool, strict: bool
) -> Any:
    """Load a loss, build it, and find out which of NeMo RL's promises it keeps.

    Args:
        spec: ``path/to/my_file.py:MyLoss``.
        section: The settings, see `build_loss`.
        key: The section's name.
        pairs: Whether rows are chosen and rejected in turn.
        strict: Whether a broken promise is an error, unless NeMo RL's loss that it derives from
            breaks it in the same way. Otherwise it is printed.

    Returns:
        The loss.

    Raises:
        UsageError: If it cannot be loaded, or does not answer within two minutes, or, with
            `strict`, breaks a promise.
    """
    kind = find(spec, "--loss")
    try:
        with time_limit():
            loss_fn = build_loss(kind, section, key)
    except Overtime as error:
        raise UsageError(f"--loss: {spec} {error}{raised_at(error, file_of(kind))}") from None
    failed, is_main = (), process_state().is_main_process
    if is_main:
        report = check_loss(loss_fn, pairs=pairs or None)
        failed = report.own
        print(f"{spec} keeps NeMo RL's promises" if report.ok else report.summary())
    failed = from_main(failed)
    if failed:
        broken = f"{spec} breaks NeMo RL's promises: {', '.join(failed)}"
        if strict:
            raise UsageError(f"--strict: {broken}")
        if is_main:
            print(f"WARNING: {broken}; above is what to write instead")
    return loss_fn
