# SPDX-License-Identifier: Apache-2.0
"""The making of ``keys.json`` and ``places.json`` from a checkout of NeMo RL.

The checkout is at the pinned commit::

.. code-block:: sh

    python -m nemo_rl_ref.upstream.make_keys path/to/RL

A key exists if a configuration class has it, starting from every ``MasterConfig``, or if a YAML
file of the examples has it. The classes are read from their source; nothing of the checkout is
imported or executed. In a key, ``#`` stands for the index of a list's entry, ``*`` for any name.

A key's place is a file and a line: in the first of `PLACES` that has it, else the field of the
class that has it.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_rl_ref.files.whole import write_text
from nemo_rl_ref.upstream import COMMIT

#: Where the configurations of NeMo RL's entry points are, in a checkout.
YAML_FILES = (
    "examples/configs/**/*.yaml",
    "examples/modelopt/*.yaml",
    "examples/nemo_gym/**/*.yaml",
    "examples/swe_bench/*.yaml",
    "research/*/configs/**/*.yaml",
)

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
    places: dict[str, tuple[Path, int]] = field(default_factory=dict)


class _Classes:
    """The classes and type aliases of a source tree, by module and name."""

    def __init__(self, root: Path) -> None:
        self.nodes: dict[tuple[Path, str], ast.expr | ast.ClassDef] = {}
        for path in sorted((root / "nemo_rl").rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    self.nodes[path, node.name] = node
                elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    self.nodes[path, node.targets[0].id] = node.value

    def named(self, name: str, module: Path) -> tuple[Path, ast.expr | ast.ClassDef] | None:
        """What `name` means in `module`: its own, or else the one of that name elsewhere."""
        if (module, name) in self.nodes:
            return module, self.nodes[module, name]
        places = [place for place, other in self.nodes if other == name]
        return (places[0], self.nodes[places[0], name]) if len(places) == 1 else None

    def masters(self) -> Iterator[tuple[Path, ast.ClassDef]]:
        """Every class called MasterConfig."""
        for (path, name), node in self.nodes.items():
            if name == "MasterConfig" and isinstance(node, ast.ClassDef):
                yield path, node

    def subclasses(self, name: str) -> Iterator[tuple[Path, ast.ClassDef]]:
        """The classes that name `name` among their bases."""
        for (path, _), node in self.nodes.items():
            if isinstance(node, ast.ClassDef):
                if any(isinstance(base, ast.Name) and base.id == name for base in node.bases):
                    yield path, node

    def add_class(self, path: Path, node: ast.ClassDef, prefix: str, found: _Found) -> None:
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

    def _add_fields(self, path: Path, node: ast.ClassDef, prefix: str, found: _Found) -> None:
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                key = f"{prefix}{item.target.id}"
                found.places.setdefault(key, (path, item.lineno))
                self.add_type(item.annotation, path, key, found)

    def add_type(self, node: ast.expr, module: Path, key: str, found: _Found) -> None:
        """Adds `key`, and what an annotation says is below it."""
        found.keys.add(key)
        for name in HELD_TOO.get(key, ()):
            place, held = self.named(name, module) or (module, None)
            if not isinstance(held, ast.ClassDef):
                raise ValueError(f"{key}: no class {name} in this checkout")
            self.add_class(place, held, f"{key}.", found)
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

    def _add_below(self, node: ast.expr, module: Path, key: str, found: _Found) -> None:
        """As `add_type`, without `key` itself: a list of numbers has no keys."""
        below = _Found()
        self.add_type(node, module, key, below)
        found.keys |= below.keys - {key}
        for name, place in below.places.items():
            found.places.setdefault(name, place)
        found.open |= below.open


def _yaml_keys(value: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a parsed YAML file, sections too, indices of lists as ``#``."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield f"{prefix}{name}"
            yield from _yaml_keys(item, f"{prefix}{name}.")
    elif isinstance(value, list):
        for item in value:
            yield from _yaml_keys(item, f"{prefix}#.")


def _yaml_places(node: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """The keys of a parsed YAML file as `_yaml_keys` writes them, with their lines."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield f"{prefix}{name.value}", name.start_mark.line + 1
            yield from _yaml_places(value, f"{prefix}{name.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _yaml_places(value, f"{prefix}#.")


def make_keys(checkout: Path) -> dict[str, Any]:
    """Collects the keys.

    Args:
        checkout: The folder of a checkout of NeMo RL at `nemo_rl_ref.upstream.COMMIT`.

    Returns:
        What ``keys.json`` holds: ``commit``; ``keys``, every key and section; ``open``, the
        sections below which any key is legal.

    Raises:
        ValueError: If the checkout is of another commit, or is none.
    """
    found = _collect(checkout)
    return {"commit": COMMIT, "keys": sorted(found.keys), "open": sorted(found.open)}


def make_places(checkout: Path) -> dict[str, Any]:
    """Looks up where each key stands.

    Args:
        checkout: See `make_keys`.

    Returns:
        What ``places.json`` holds: ``commit``; ``files``, paths in the checkout; ``places``, for a
        key the number of its file and its line, from 1. Keys of other files only have none.

    Raises:
        ValueError: See `make_keys`.
    """
    import yaml

    found, places = _collect(checkout), {}
    for name in (name for name in PLACES if (checkout / name).exists()):
        root = yaml.compose((checkout / name).read_text(encoding="utf-8"))
        for key, line in _yaml_places(root):
            places.setdefault(key, (name, line))
    for key, (path, line) in found.places.items():
        places.setdefault(key, (path.relative_to(checkout).as_posix(), line))
    places = {key: place for key, place in sorted(places.items()) if key in found.keys}
    files = sorted({name for name, _ in places.values()})
    numbered = {key: [files.index(name), line] for key, (name, line) in places.items()}
    return {"commit": COMMIT, "files": files, "places": numbered}


def _collect(checkout: Path) -> _Found:
    from omegaconf import OmegaConf

    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if head != COMMIT:
        raise ValueError(f"checkout {checkout}: got commit {head or 'none'}, expected {COMMIT}")
    found = _Found(set(LOOKED_UP), set(PASSED_ON))
    classes = _Classes(checkout)
    for path, node in classes.masters():
        classes.add_class(path, node, "", found)
    for path in sorted({path for glob in YAML_FILES for path in checkout.glob(glob)}):
        content = OmegaConf.to_container(OmegaConf.load(path))
        found.keys |= {key for key in _yaml_keys(content) if key != "defaults"}
    found.keys = {key for key in found.keys if not key.endswith("_override_")}
    found.keys -= {f"{key}.*" for key in found.open}
    return found


def main(argv: list[str] | None = None) -> None:
    """Writes ``keys.json`` and ``places.json`` beside this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, help="folder of a checkout of NVIDIA-NeMo/RL")
    checkout = parser.parse_args(argv).checkout
    try:
        content, places = make_keys(checkout), make_places(checkout)
    except ValueError as error:
        sys.exit(str(error))
    _write("keys.json", json.dumps(content, indent=1))
    one_a_line = json.dumps(places, indent=1)
    one_a_line = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", one_a_line)
    _write("places.json", one_a_line)
    print(
        f"{len(content['keys'])} keys, {len(content['open'])} open sections, "
        f"{len(places['places'])} places"
    )


def _write(name: str, text: str) -> None:
    path = Path(__file__).with_name(name)
    write_text(path, text + "\n")
    print(path)


if __name__ == "__main__":
    main()
