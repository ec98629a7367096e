# SPDX-License-Identifier: Apache-2.0
"""Code of the user's own, given on purpose and by path: ``--loss my_file.py:MyLoss``.

A configuration cannot name code to run; the command line can.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_rl_ref.training.identity import sources
from nemo_rl_ref.training.processes import from_main, process_state

#: The files that have been imported, with their contents then.
_imported: dict[Path, bytes] = {}


def load_object(spec: str, option: str = "--loss") -> Any:
    """Import a file and return what a name in it stands for.

    The file's folder is appended to ``sys.path``, so that the object can be pickled by reference,
    and the file is imported under its own name, as ``import my_file`` in that folder would.

    Args:
        spec: ``path/to/my_file.py:Name``, or ``package.module:Name``.
        option: The command-line option it comes from, for messages.

    Raises:
        ValueError: If it is not of that form, there is no such file, another module has the
            file's name, or the file does not define the name.
        ImportError: If the file cannot be imported.
    """
    from nemo_rl_ref.contract.build import UsageError, find, nearest_in

    path_text, _, name = spec.rpartition(":")
    path = Path(path_text).resolve()
    if path.suffix != ".py" or not name.isidentifier():
        try:
            return find(spec)
        except UsageError as error:
            raise ValueError(f"{option}: {error}") from error
    if not path.is_file():
        raise ValueError(f"{option}: no file at {path_text}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
        importlib.invalidate_caches()
    found = importlib.util.find_spec(path.stem)
    if found is None or found.origin is None or Path(found.origin).resolve() != path:
        raise ValueError(
            f"{option}: the name {path.stem!r} belongs to another module"
            f"{f', {found.origin}' if found else ''}; rename the file"
        )
    try:
        contents = {file: file.read_bytes() for file in sources(path)}
        if any(_imported.get(file, content) != content for file, content in contents.items()):
            for file in contents:  # edited since: Python keeps what it has imported
                sys.modules.pop(file.stem, None)
        module = importlib.import_module(path.stem)
        _imported.update(contents)
    except (Exception, SystemExit) as error:  # the file is the user's: anything may happen in it
        _imported.setdefault(path, b"")
        place = place_in_user_code(error) or path_text
        what = "it calls sys.exit" if isinstance(error, SystemExit) else type(error).__name__
        raise ImportError(f"{option}: {place}: {what}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{option}: {path_text} has no {name!r}{nearest_in(module, name)}")
    return getattr(module, name)


def place_in_user_code(error: BaseException | None) -> str | None:
    """File and line of the user's code that an error came through; None if it did not."""
    while error is not None:
        if isinstance(error, SyntaxError) and error.filename and Path(error.filename) in _imported:
            return f"{error.filename}:{error.lineno}"
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{f.filename}:{f.lineno}" for f in frames if Path(f.filename) in _imported]
        if places:
            return places[-1]
        error = error.__cause__
    return None


def _place(thing: Any) -> str:
    """File and line where the user has written a function or a class."""
    try:
        return f"{inspect.getsourcefile(thing)}:{inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):
        return repr(thing)[:80]


def load_reward(spec: str) -> Callable[[str, str, str], Any]:
    """Load a reward function; see `nemo_rl_ref.rl.rewards`.

    Args:
        spec: ``path/to/my_file.py:my_reward``.

    Raises:
        ValueError: If it cannot be loaded, or is no function of three texts.
        ImportError: If the file cannot be imported.
    """
    reward = load_object(spec, "--env")
    expected = "expected a function of three texts: (prompt, response, ground_truth)"
    if isinstance(reward, type) or not callable(reward):
        what = "a class" if isinstance(reward, type) else f"{type(reward).__name__}"
        raise ValueError(f"--env: {spec}: got {what} ({_place(reward)}), {expected}")
    try:
        inspect.signature(reward).bind("", "", "")
    except TypeError as error:
        raise ValueError(f"--env: {spec} ({_place(reward)}): {error}, {expected}") from error
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
        ValueError: If the class refuses the settings.
    """
    from nemo_rl_ref.contract.build import (
        UsageError,
        call_loss_class,
        fields_of,
        signature_of,
        takes_any_field,
    )

    if not isinstance(kind, type):
        if not callable(kind) or not hasattr(kind, "input_type"):
            raise ValueError(
                f"--loss: got {type(kind).__name__} ({_place(kind)}), expected a class of losses, "
                "with loss_type and input_type"
            )
        return kind
    if inspect.isabstract(kind) or not any("__call__" in vars(base) for base in kind.__mro__):
        missing = ", ".join(sorted(getattr(kind, "__abstractmethods__", ()))) or "__call__"
        raise ValueError(f"--loss: {kind.__name__} ({_place(kind)}) has no {missing}")
    argument, config, others = signature_of(kind)
    wanted = section if takes_any_field(config) else fields_of(config)
    settings = {name: section[name] for name in section if name in wanted and name not in others}
    given = {name: section[name] for name in others if name in section}
    try:
        return call_loss_class(kind, argument, config, given, settings)
    except UsageError as error:
        raise ValueError(f"--loss with the section {key}: {error}") from error


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
        ValueError: If it cannot be loaded, or does not answer within two minutes, or, with
            `strict`, breaks a promise.
    """
    from nemo_rl_ref.contract import check_loss
    from nemo_rl_ref.contract.limits import Overtime, raised_at, time_limit

    try:
        with time_limit():
            loss_fn = build_loss(load_object(spec), section, key)
    except Overtime as error:
        at = raised_at(error, str(Path(spec.rpartition(":")[0]).resolve()))
        raise ValueError(f"--loss: {spec} {error}{at}") from None
    failed, is_main = (), process_state().is_main_process
    if is_main:
        report = check_loss(loss_fn, pairs=pairs or None)
        failed = report.own
        print(f"{spec} keeps NeMo RL's promises" if report.ok else report.summary())
    failed = from_main(failed)
    if failed:
        broken = f"{spec} breaks NeMo RL's promises: {', '.join(failed)}"
        if strict:
            raise ValueError(f"--strict: {broken}")
        if is_main:
            print(f"WARNING: {broken}; above is what to write instead")
    return loss_fn
