# SPDX-License-Identifier: Apache-2.0
"""Where the pages, notebooks, configurations and the mirror use a name of NeMo RL."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from nemo_rl_ref.upstream.keys import yaml_places

#: What is read, below the root of the repository, and what is not.
READ = ("README.md", "docs/**/*.md", "docs/**/*.py", "notebooks/*.py", "configs/*.yaml")
READ_TOO = ("nemo_rl_ref/**/*.py",)
NOT_READ = ("nemo_rl_ref/upstream/", "docs/_ext/", "docs/reference/when-nemo-rl-moves.md")

#: The folders of the mirror.
MIRROR = ("algorithms", "data", "distributed", "utils")

_NAME = re.compile(r"[A-Za-z_*#][\w*#-]*(?:[./][\w*#-]+)*")
_FENCE = re.compile(r"^(`{3,})\s*\{?(?:code-block\}\s*)?yaml[^\n]*\n(.*?)^\1", re.M | re.S)


class Uses:
    """Every name in the repository, by place.

    Args:
        root: The root of the repository.
        shared: Names that several of NeMo RL's modules have. Neither they nor plain English words
            name a symbol by themselves.
    """

    def __init__(self, root: Path, shared: Iterable[str] = ()) -> None:
        self.names: dict[str, dict[str, None]] = {}
        self.parts: dict[str, dict[str, None]] = {}
        self.keys: dict[str, dict[str, None]] = {}
        self.mirrored: dict[tuple[str, str], str] = {}
        self.inside: dict[str, set[str]] = {}
        self.shared = set(shared)
        for path in sorted({path for glob in READ + READ_TOO for path in root.glob(glob)}):
            file = path.relative_to(root).as_posix()
            if not file.startswith(NOT_READ):
                self._read(file, path.read_text(encoding="utf-8"))

    def _read(self, file: str, text: str) -> None:
        for number, line in enumerate(text.splitlines(), 1):
            for match in _NAME.finditer(line):
                name, place = match[0].rstrip(".-"), f"{file}:{number}"
                self.names.setdefault(name, {})[place] = None
                for part in name.split("."):
                    self.parts.setdefault(part, {})[place] = None
        for offset, block in _yaml_in(file, text):
            for key, line in block:
                self.keys.setdefault(key, {})[f"{file}:{line + offset}"] = None
        top, _, rest = file.partition("/")
        folder = rest.partition("/")[0]
        if top == "nemo_rl_ref" and folder in MIRROR:
            for node in ast.parse(text).body:
                if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    continue
                name = node.name
                if not name.startswith("_"):
                    place = f"{file}:{node.lineno}"
                    self.mirrored[folder, name] = self.mirrored[file, name] = place
                    self.inside[place] = {n for item in node.body for n in _bound(item)}

    def symbol(self, path: str, exports: Iterable[str] = ()) -> list[str]:
        """Where a function or class is named, by whole path, by module and name, or by name."""
        module, _, name = path.rpartition(".")
        near = f"{module.rpartition('.')[2]}.{name}"
        found = dict.fromkeys(p for one in (path, near, *exports) for p in self.names.get(one, ()))
        if name not in self.shared and re.search(r"[a-z][A-Z]|_|[A-Z]{2}", name):
            found |= self.parts.get(name, {})
        return list(found)

    def mirror(self, path: str, inner: str | None = None) -> str | None:
        """File and line of the mirror of a function or class, if it has the field or method too."""
        parts = path.split(".")
        where = parts[1]
        if parts[-1] in self.shared:
            where = f"nemo_rl_ref/{'/'.join(parts[1:-1])}.py"
        place = self.mirrored.get((where, parts[-1]))
        return place if inner is None or inner in self.inside.get(place or "", ()) else None

    def key(self, key: str) -> list[str]:
        """Where a configuration key stands, in YAML or written out with dots."""
        written = self.names.get(key, {}) if "." in key else {}
        return list(written | self.keys.get(key, {}))

    def file(self, path: str) -> list[str]:
        """Where a file is named, by its path or as a module."""
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return list(dict.fromkeys(p for one in (path, module) for p in self.names.get(one, ())))


def _bound(item: ast.stmt) -> list[str]:
    """The name that a statement in a class gives to a field or method."""
    target = getattr(item, "target", None) or next(iter(getattr(item, "targets", ())), None)
    return [name] if (name := getattr(item, "name", None) or getattr(target, "id", None)) else []


def _yaml_in(file: str, text: str) -> Iterator[tuple[int, list[tuple[str, int]]]]:
    """The keys of a YAML file, or of a page's YAML blocks, with the lines before each block."""
    import yaml

    blocks = [(0, text)] if file.endswith(".yaml") else []
    if file.endswith(".md"):
        blocks = [(text.count("\n", 0, m.start(2)), m[2]) for m in _FENCE.finditer(text)]
    for offset, block in blocks:
        try:
            yield offset, list(yaml_places(yaml.compose(block, Loader=yaml.SafeLoader)))
        except yaml.YAMLError:
            continue  # a fragment; its dotted names were read as text
