# SPDX-License-Identifier: Apache-2.0
"""The configuration keys of NeMo RL at one commit, and where each of them stands.

A key exists if a configuration class has it, starting from every ``MasterConfig``, or if a YAML
file of the examples has it. In a key, ``#`` stands for the index of a list's entry, ``*`` for any
name. A key's place is a file and a line: in the first of `PLACES` that has it, else the field of
the class that has it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nemo_rl_ref.upstream.checkout import Checkout

#: Where to point to for a key: the configurations that people start from.
PLACES = (
    "examples/configs/dpo.yaml",
    "examples/configs/grpo_math_1B.yaml",
    "examples/configs/ppo_math_1B.yaml",
    "examples/configs/sft.yaml",
    "examples/configs/rm.yaml",
)

#: Classes that a section holds besides those of its annotation, by name in the source.
HELD_TOO = {
    "policy.generation": ("DynamoConfig",),
    "teacher": ("PolicyConfig",),
    "teachers.#": ("PolicyConfig",),
}

#: Sections that NeMo RL passes on as keyword arguments, though their classes list some keys.
PASSED_ON = (
    "data.default",
    "data.train",
    "data.train.#",
    "data.validation",
    "data.validation.#",
    "data.val_data_paths",
    "infra",
)

#: Keys that are only looked up in the code: in no class and no file.
LOOKED_UP = (
    "data.val_data_paths",
    "infra",
    "policy.megatron_cfg.virtual_pipeline_model_parallel_size",
)


@dataclass
class _Found:
    keys: set[str] = field(default_factory=set)
    open: set[str] = field(default_factory=set)
    places: dict[str, tuple[str, int]] = field(default_factory=dict)


class _Classes:
    """The classes and type aliases of a source tree, by file and name."""

    def __init__(self, checkout: Checkout) -> None:
        self.notes = checkout.notes
        self.nodes: dict[tuple[str, str], ast.expr | ast.ClassDef] = {}
        for path, tree in checkout.modules.items():
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    self.nodes[path, node.name] = node
                elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    self.nodes[path, node.targets[0].id] = node.value

    def named(self, name: str, module: str) -> tuple[str, ast.expr | ast.ClassDef] | None:
        """What `name` means in `module`: its own, or else the one of that name elsewhere."""
        if (module, name) in self.nodes:
            return module, self.nodes[module, name]
        places = [place for place, other in self.nodes if other == name]
        return (places[0], self.nodes[places[0], name]) if len(places) == 1 else None

    def masters(self) -> Iterator[tuple[str, ast.ClassDef]]:
        """Every class called MasterConfig."""
        for (path, name), node in self.nodes.items():
            if name == "MasterConfig" and isinstance(node, ast.ClassDef):
                yield path, node

    def subclasses(self, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
        """The classes that name `name` among their bases."""
        for (path, _), node in self.nodes.items():
            if isinstance(node, ast.ClassDef):
                if any(isinstance(base, ast.Name) and base.id == name for base in node.bases):
                    yield path, node

    def add_class(self, path: str, node: ast.ClassDef, prefix: str, found: _Found) -> None:
        """Adds the fields of a class, and those of its bases and subclasses, below `prefix`."""
        for base in node.bases:
            if isinstance(base, ast.Name) and (named := self.named(base.id, path)):
                place, parent = named
                if isinstance(parent, ast.ClassDef):
                    self._add_fields(place, parent, prefix, found)
        self._add_fields(path, node, prefix, found)
        if node.name != "MasterConfig":
            for place, subclass in self.subclasses(node.name):
                self._add_fields(place, subclass, prefix, found)

    def _add_fields(self, path: str, node: ast.ClassDef, prefix: str, found: _Found) -> None:
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                key = f"{prefix}{item.target.id}"
                found.places.setdefault(key, (path, item.lineno))
                self.add_type(item.annotation, path, key, found)

    def add_type(self, node: ast.expr, module: str, key: str, found: _Found) -> None:
        """Adds `key`, and what an annotation says is below it."""
        found.keys.add(key)
        for name in HELD_TOO.get(key, ()):
            place, held = self.named(name, module) or (module, None)
            if isinstance(held, ast.ClassDef):
                self.add_class(place, held, f"{key}.", found)
            else:
                note = f"{module}: {key} has no keys of a class {name}, which is not there"
                self.notes.extend({note} - set(self.notes))
        match node:
            case ast.Constant(value=str(text)):
                self.add_type(ast.parse(text, mode="eval").body, module, key, found)
            case ast.BinOp(left=left, right=right):
                self.add_type(left, module, key, found)
                self.add_type(right, module, key, found)
            case ast.Subscript(value=ast.Name(id="dict" | "Dict"), slice=ast.Tuple(elts=[_, to])):
                self.add_type(to, module, f"{key}.*", found)
            case ast.Subscript(value=ast.Name(id="list" | "List"), slice=to):
                self._add_below(to, module, f"{key}.#", found)
            case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[first, *_])):
                self.add_type(first, module, key, found)
            case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=several)):
                for one in several:
                    self.add_type(one, module, key, found)
            case ast.Subscript(value=ast.Name(id="Optional" | "NotRequired" | "Required")):
                self.add_type(node.slice, module, key, found)
            case ast.Name(id="Any" | "dict" | "Dict"):
                found.open.add(key.removesuffix(".*"))
            case ast.Name(id=name) if named := self.named(name, module):
                place, meant = named
                if isinstance(meant, ast.ClassDef):
                    self.add_class(place, meant, f"{key}.", found)
                else:
                    self.add_type(meant, place, key, found)

    def _add_below(self, node: ast.expr, module: str, key: str, found: _Found) -> None:
        """As `add_type`, without `key` itself: a list of numbers has no keys."""
        below = _Found()
        self.add_type(node, module, key, below)
        found.keys |= below.keys - {key}
        for name, place in below.places.items():
            found.places.setdefault(name, place)
        found.open |= below.open


def yaml_places(node: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """List the keys below a node of a YAML file, sections too, with their lines from 1."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield f"{prefix}{name.value}", name.start_mark.line + 1
            yield from yaml_places(value, f"{prefix}{name.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from yaml_places(value, f"{prefix}#.")


def extract_keys(checkout: Checkout) -> tuple[dict[str, Any], dict[str, Any]]:
    """Collect the keys and their places.

    Args:
        checkout: The commit to read.

    Returns:
        What ``keys.json`` holds: ``commit``; ``keys``, every key and section; ``open``, the
        sections below which any key is legal. And what ``places.json`` holds: ``commit``;
        ``files``; ``places``, for a key the number of its file and its line, from 1. Keys of other
        files only have none.
    """
    found = _Found(set(LOOKED_UP), set(PASSED_ON))
    classes = _Classes(checkout)
    for path, node in classes.masters():
        classes.add_class(path, node, "", found)
    by_file = {path: _first(yaml_places(node)) for path, node in checkout.yamls.items()}
    found.keys |= {key for keys in by_file.values() for key in keys if key != "defaults"}
    found.keys = {key for key in found.keys if not key.endswith("_override_")}
    found.keys -= {f"{key}.*" for key in found.open}

    places: dict[str, tuple[str, int]] = {}
    for name in PLACES:
        for key, line in by_file.get(name, {}).items():
            places.setdefault(key, (name, line))
    places = {key: place for key, place in (found.places | places).items() if key in found.keys}
    files = sorted({name for name, _ in places.values()})
    numbered = {key: [files.index(name), line] for key, (name, line) in sorted(places.items())}
    return (
        {"commit": checkout.commit, "keys": sorted(found.keys), "open": sorted(found.open)},
        {"commit": checkout.commit, "files": files, "places": numbered},
    )


def _first(places: Iterator[tuple[str, int]]) -> dict[str, int]:
    """The first line of each key; entries of a list share theirs."""
    lines: dict[str, int] = {}
    for key, line in places:
        lines.setdefault(key, line)
    return lines
