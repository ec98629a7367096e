# SPDX-License-Identifier: Apache-2.0
"""Code of the user's own, given on purpose and by path: ``my_loss.py:MyLoss``.

A configuration cannot name code to run; the command line can.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from nemo_rl_ref.contract.limits import Overtime, line_of, raised_at, time_limit

#: The files that have been imported, with their contents then.
_imported: dict[Path, bytes] = {}


class UsageError(ValueError):
    """The command line cannot be understood. The message is one line."""


def find(spec: str, option: str = "") -> Any:
    """Import ``path/to/file.py:name`` or ``package.module:name`` and return what is there.

    The folder of a file is appended to ``sys.path``, so that what is in it can be pickled by
    reference, and it is imported under its own name, as ``import file`` in that folder would. A
    file that was edited since is imported again.

    Args:
        spec: Where it is.
        option: The command-line option that names it, for messages.

    Raises:
        UsageError: If `spec` is neither, there is no such file, another module has its name, it
            cannot be imported, which includes that it takes too long, or lacks the name.
    """
    try:
        return _find(spec)
    except UsageError as error:
        error.args = (f"{option}: {error}" if option else str(error),)
        raise


def _find(spec: str) -> Any:
    where, _, name = spec.rpartition(":")
    if not (where and name.isidentifier()):
        raise UsageError(f"got {spec!r}, expected path/to/file.py:Name or package.module:Name")
    path = Path(where).resolve() if where.endswith(".py") else None
    module_name = _on_the_path(path, where) if path else where
    try:
        with time_limit():
            contents = {file: file.read_bytes() for file in sources(path)} if path else {}
            if any(_imported.get(file, content) != content for file, content in contents.items()):
                for file in contents:  # Python keeps what it has imported
                    sys.modules.pop(file.stem, None)
            module = importlib.import_module(module_name)
            _imported.update(contents)
    except (Exception, SystemExit, Overtime) as error:  # it is the user's: anything may happen
        named = {SystemExit: "it calls sys.exit", Overtime: f"it {error}"}
        what = named.get(type(error)) or one_line(error)
        at = raised_at(error, str(path)) if path else ""
        raise UsageError(f"cannot import {where}: {what}{at}") from error
    if not hasattr(module, name):
        raise UsageError(f"{where} has no {name!r}{_nearest_in(module, name)}")
    return getattr(module, name)


def _on_the_path(path: Path, where: str) -> str:
    """The name of a file's module, once its folder can be imported from."""
    if not path.is_file():
        raise UsageError(f"no file at {where}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()
    try:
        found = importlib.util.find_spec(path.stem)
    except ValueError:  # as that of __main__
        found = None
    if found is None or not found.origin or Path(found.origin).resolve() != path:
        taken = f", {found.origin}" if found else ""
        raise UsageError(f"the name {path.stem!r} belongs to another module{taken}; rename it")
    return path.stem


def sources(path: Path) -> list[Path]:
    """A Python file, and those of its folder that it imports, and so on."""
    found, todo = set(), [path]
    while todo:
        found.add(file := todo.pop())
        for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            beside = (file.parent / f"{name.replace('.', '/')}.py" for name in names)
            todo += [other for other in beside if other.is_file() and other not in found]
    return sorted(found)


def place_in_user_code(error: BaseException) -> str:
    """File and line of the user's code that an error came through; empty if it did not."""
    return line_of(error, {str(path) for path in _imported})


def _nearest_in(module: Any, name: str) -> str:
    """The nearest name in a module, or what it has to offer, its own first, to end a message."""
    public = [(n, v) for n, v in vars(module).items() if not n.startswith("_") and callable(v)]
    own = [n for n, v in public if getattr(v, "__module__", "") == module.__name__]
    imported = [n for n, _ in public if n not in own]
    for names in (own, imported):
        if near := difflib.get_close_matches(name, names, n=1):
            return f"; did you mean {near[0]!r}?"
    return f"; it has {', '.join(own or imported) or 'none'}"


def one_line(error: BaseException) -> str:
    """An error's type and message in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
