# SPDX-License-Identifier: Apache-2.0
"""Python files with the import prefix changed from this package's to NeMo RL's."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nemo_rl_ref.custom
from nemo_rl_ref.upstream import load_manifest

_OURS, _THEIRS = "nemo_rl_ref", "nemo_rl"
_CUSTOM = Path(nemo_rl_ref.custom.__file__).parent
_MIRROR = ("algorithms", "data", "distributed", "utils")

#: Private methods of NeMo RL's losses that a loss may override or call; the mirror has more.
PRIVATE_METHODS = ("_preference_loss", "_dpo_loss")


class ExportError(ValueError):
    """Something cannot be carried to NeMo RL. The message is one line."""


@dataclass(frozen=True)
class Carried:
    """Modules to put beside each other.

    Attributes:
        modules: Text by module name, NeMo RL's prefix in it.
        packages: Installed packages that they import, besides PyTorch and NeMo RL.
    """

    modules: dict[str, str]
    packages: tuple[str, ...]


def module_name(file: Path) -> str:
    """Return the name under which a file is carried."""
    return f"custom_{file.stem}" if file.parent == _CUSTOM else file.stem


def carry(files: Iterable[Path]) -> Carried:
    """Read files and those that they import from beside them and from ``custom/``, rewritten.

    Args:
        files: Python files.

    Raises:
        ExportError: If one needs what NeMo RL does not have, or what is no file beside it. The
            message has file and line.
    """
    texts: dict[str, str] = {}
    origins: dict[str, Path] = {}
    packages: set[str] = set()
    todo = list(files)
    while todo:
        file = todo.pop()
        name = module_name(file)
        if name in texts:
            if origins[name] != file:
                raise ExportError(f"{file} and {origins[name]} would both be {name}.py")
            continue
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text, str(file))
        _refuse_what_stays_here(tree, file)
        for node, module, names in _imports(tree, file):
            top = module.partition(".")[0]
            if top == _OURS:
                todo += _checked(module, names, f"{file}:{node.lineno}")
            elif (beside := _beside(top, file)) is not None:
                if beside.name == "__init__.py" or module != top:
                    raise ExportError(
                        f"{file}:{node.lineno}: {module} is a folder beside this file; put what is "
                        f"needed of it into a file of its own, {file.parent}/….py"
                    )
                todo.append(beside)
            elif top not in sys.stdlib_module_names and top not in ("torch", _THEIRS):
                packages.add(top)
        texts[name], origins[name] = _rewritten(text), file
    return Carried(texts, tuple(sorted(packages)))


def _rewritten(text: str) -> str:
    text = re.sub(rf"\b{_OURS}\.custom\.(\w+)", r"custom_\1", text)
    return re.sub(rf"\b{_OURS}\b", _THEIRS, text)


def _imports(tree: ast.Module, file: Path) -> Iterator[tuple[ast.stmt, str, list[str]]]:
    """Every import: the statement, the module, and the names that are taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name, []
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise ExportError(
                    f"{file}:{node.lineno}: got a relative import, expected a file beside this one, "
                    "imported by its name"
                )
            yield node, node.module, [alias.name for alias in node.names]


def _checked(module: str, names: list[str], at: str) -> list[Path]:
    """Whether NeMo RL has what is imported from this package; the files to carry if not."""
    parts = module.split(".")
    if parts[1:2] == ["custom"]:
        file = _CUSTOM / f"{'.'.join(parts[2:])}.py"
        if len(parts) != 3 or not file.is_file():
            raise ExportError(
                f"{at}: got {module}, expected {_OURS}.custom.pairwise or another file"
            )
        return [file]
    theirs = ".".join([_THEIRS, *parts[1:]])
    symbols = load_manifest()["symbols"]
    modules = {symbol.rpartition(".")[0] for symbol in symbols}
    for name in names or [""]:
        whole = f"{theirs}.{name}".rstrip(".")
        reexported = whole.replace(".algorithms.loss.", ".algorithms.loss.loss_functions.")
        known = whole in symbols or reexported in symbols or _is_module(whole, modules)
        if not (known or _is_constant(module, name)):
            raise ExportError(
                f"{at}: NeMo RL has no {whole}; put its code into a file of your own, or leave it out"
            )
    return []


def _is_module(name: str, modules: set[str]) -> bool:
    return name != _THEIRS and any(one == name or one.startswith(f"{name}.") for one in modules)


def _is_constant(module: str, name: str) -> bool:
    """Whether it is a public value of the mirror, which the manifest does not list."""
    parts = module.split(".")
    if (
        parts[1:2] == []
        or parts[1] not in _MIRROR
        or any(p.startswith("_") for p in (*parts, name))
    ):
        return False
    try:
        value = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return False
    return not (callable(value) or inspect.ismodule(value))


def _beside(top: str, file: Path) -> Path | None:
    """The file of a module that Python finds in the folder of another, if it does."""
    try:
        found = importlib.util.find_spec(top)
    except ValueError:  # as that of __main__
        return None
    if found is None:
        return None
    folders = [Path(one) / "__init__.py" for one in found.submodule_search_locations or ()]
    origin = (folders[0] if folders else Path(found.origin or "")).resolve()
    return origin if file.parent.resolve() in (origin.parent, origin.parent.parent) else None


def _refuse_what_stays_here(tree: ast.Module, file: Path) -> None:
    """Refuse what names this package or this folder in a way that a changed prefix does not mend."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "__file__":
            raise ExportError(
                f"{file}:{node.lineno}: it looks for files beside itself, which are not carried; "
                "take their path from a setting"
            )
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.search(rf"\b{_OURS}\b", node.value) and id(node) not in docstrings:
                raise ExportError(
                    f"{file}:{node.lineno}: a text names {_OURS}, which is not there in NeMo RL"
                )


def refuse_private_methods(kind: type) -> None:
    """Refuse a loss that overrides or calls what only the mirror's class has.

    Args:
        kind: The class. In NeMo RL such a method would never be called, or be missing.

    Raises:
        ExportError: If there is one, with file and line.
    """
    mirrored = [base for base in kind.__mro__ if base.__module__.startswith(f"{_OURS}.algorithms.")]
    ours = {
        name
        for base in mirrored
        for name, value in vars(base).items()
        if re.match(r"_(?!_|abc_)", name) and callable(value) and name not in PRIVATE_METHODS
    }
    for base in set(kind.__mro__) - {*mirrored, object}:
        try:
            file, (lines, first) = inspect.getsourcefile(base), inspect.getsourcelines(base)
        except (OSError, TypeError):  # a class of Python's own
            continue
        for node in ast.walk(ast.parse(textwrap.dedent("".join(lines)))):
            named = getattr(node, "attr", getattr(node, "name", None))
            if named in ours:
                raise ExportError(
                    f"{file}:{first + getattr(node, 'lineno', 1) - 1}: NeMo RL's class has no "
                    f"{named}, only {_OURS}'s has; override __call__"
                )
