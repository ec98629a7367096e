# SPDX-License-Identifier: Apache-2.0
"""What pages may say about NeMo RL: its symbols, configuration keys, scripts, and their lines.

The one reader of `nemo_rl_ref/upstream/*.json` for the documentation. It needs neither PyTorch nor
the package, so that every build can ask.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = "https://github.com/NVIDIA-NeMo/RL"
FACTS = "nemo_rl_ref/upstream"
FILES = ("manifest.json", "keys.json", "places.json")
#: Read when somebody asks which line reads a key.
READERS = "readers.json"
CONFIGS = "examples/configs"


class Place(NamedTuple):
    """A file of NeMo RL's, and a line where one is known."""

    file: str
    line: int | None = None


class UnknownName(ValueError):
    """NeMo RL has no such name; the message suggests the nearest that it has."""


class Facts:
    """NeMo RL at the pinned commit.

    Args:
        folder: holds `FILES`, of one commit.

    Raises:
        ValueError: they describe different commits.
    """

    def __init__(self, folder: Path) -> None:
        manifest, keys, places = (
            json.loads((folder / name).read_text(encoding="utf-8")) for name in FILES
        )
        self.folder, self.commit = folder, manifest["commit"]
        for name, content in zip(FILES[1:], (keys, places), strict=True):
            if content["commit"] != self.commit:
                raise ValueError(
                    f"{folder}: {name} is of commit {content['commit']}, {FILES[0]} of {self.commit}"
                )
        self.keys, self.open = set(keys["keys"]), set(keys["open"])
        self.files, self.places = places["files"], places["places"]
        self.symbols: dict[str, Any] = manifest["symbols"]
        self.configs: dict[str, dict[str, Any]] = manifest["configs"]
        self.scripts: list[str] = manifest["scripts"]
        self.all_files: list[str] = manifest["files"]

    def url(self, place: Place) -> str:
        """The address of a place at the pinned commit."""
        line = f"#L{place.line}" if place.line else ""
        return f"{SOURCE}/blob/{self.commit}/{place.file}{line}"

    # Symbols

    @cached_property
    def modules(self) -> dict[str, str]:
        """Files by dotted module name, packages too, which have the file of their `__init__`."""
        files = {symbol["file"] for symbol in self.symbols.values()}
        found = {file.removesuffix(".py").replace("/", "."): file for file in files}
        for module in list(found):
            parts = module.split(".")
            for count in range(1, len(parts)):
                package = parts[:count]
                found.setdefault(".".join(package), "/".join([*package, "__init__.py"]))
        return found

    @cached_property
    def members(self) -> dict[str, Place]:
        """Places of all symbols, their methods and fields, by full dotted name."""
        found = {}
        for name, symbol in self.symbols.items():
            found[name] = Place(symbol["file"], symbol["line"])
            for method, facts in symbol.get("methods", {}).items():
                found[f"{name}.{method}"] = Place(symbol["file"], facts["line"])
            for field in symbol.get("fields", {}):
                found.setdefault(f"{name}.{field}", Place(symbol["file"], symbol["line"]))
        return found

    @cached_property
    def by_ending(self) -> dict[str, list[str]]:
        """Full names of symbols and members by each dotted ending of theirs."""
        found: dict[str, list[str]] = {}
        for name in self.members:
            parts = name.split(".")
            for start in range(1, len(parts)):
                found.setdefault(".".join(parts[start:]), []).append(name)
        return found

    def symbol(self, name: str) -> Place:
        """Find a module, class, function, method or field.

        Args:
            name: dotted, with or without `nemo_rl` and the private file that defines it:
                `algorithms.loss.DPOLossFn` is in `nemo_rl/algorithms/loss/loss_functions.py`.

        Raises:
            UnknownName: there is none, or there are several.
        """
        short = name.removeprefix("nemo_rl.")
        if module := self.modules.get(f"nemo_rl.{short}" if short != "nemo_rl" else short):
            return Place(module)
        found = self.by_ending.get(short, [])
        if exact := [full for full in found if full == f"nemo_rl.{short}"]:
            found = exact
        if not found:  # a package that hands on what a file in it defines
            package, _, last = short.rpartition(".")
            while package and not found:
                found = [
                    full
                    for full in self.by_ending.get(last, [])
                    if full.startswith(f"nemo_rl.{package}.")
                ]
                package, _, part = package.rpartition(".")
                last = f"{part}.{last}"
        if not found:
            known = [*self.by_ending, *(name.removeprefix("nemo_rl.") for name in self.modules)]
            raise UnknownName(f"NeMo RL has no symbol {name!r}{nearest(short, known)}")
        if len({self.members[full] for full in found}) > 1:
            raise UnknownName(f"{name!r} is several of NeMo RL's: {', '.join(sorted(found)[:4])}")
        return self.members[found[0]]

    # Files and lines

    @cached_property
    def lines(self) -> dict[str, dict[int, str]]:
        """By file, the lines on which something is known to stand, and what."""
        found: dict[str, dict[int, str]] = {}
        for name, (file, line) in self.members.items():
            if line:
                found.setdefault(file, {}).setdefault(line, name)
        for key, (number, line) in self.places.items():
            found.setdefault(self.files[number], {}).setdefault(line, key)
        return found

    def line(self, text: str) -> tuple[Place, str]:
        """Find `file:line`, and what stands there.

        Raises:
            UnknownName: the file or line holds nothing that is known.
        """
        file, _, number = text.partition(":")
        if file not in self.lines:
            raise UnknownName(f"NeMo RL has no file {file!r}{nearest(file, self.lines)}")
        known = self.lines[file]
        if not number.isdecimal() or int(number) not in known:
            at = min(known, key=lambda line: abs(line - int(number))) if number.isdecimal() else 0
            hint = f"; {known[at]} stands on line {at}" if at else ", expected FILE:LINE"
            raise UnknownName(f"nothing known stands on line {number or '(none)'} of {file}{hint}")
        return Place(file, int(number)), known[int(number)]

    def script(self, text: str) -> Place:
        """Find an entry script or a YAML file of the examples, the latter also by name alone.

        Raises:
            UnknownName: there is none.
        """
        examples = [path for path in self.all_files if path.startswith("examples/")]
        for path in (text, f"{CONFIGS}/{text}"):
            if path in examples:
                return Place(path)
        found = [path for path in examples if path.endswith(f"/{text}")]
        if len(found) == 1:
            return Place(found[0])
        names = [*examples, *(path.rpartition("/")[2] for path in examples)]
        raise UnknownName(f"NeMo RL has no script or configuration {text!r}{nearest(text, names)}")

    # Keys

    def has_key(self, key: str) -> bool:
        """Say whether NeMo RL has a key, or takes any key where it stands."""
        return key in self.keys or any(above in self.open for above in above_key(key))

    def key_place(self, key: str) -> Place:
        """File and line of a key; of the section above it where any key is taken.

        Raises:
            UnknownName: there is no such key, or its place is not known.
        """
        if not self.has_key(key):
            known = nearest(key, self.keys)
            raise UnknownName(f"NeMo RL has no configuration key {key!r}{known}")
        for name in (key, *above_key(key)):
            if name in self.places:
                number, line = self.places[name]
                return Place(self.files[number], line)
        raise UnknownName(f"it is not known where in NeMo RL's source the key {key!r} stands")

    @cached_property
    def key_fields(self) -> dict[str, dict[str, str]]:
        """Type and default by key, as the classes below every `MasterConfig` declare them."""
        classes = {name.rpartition(".")[2]: symbol for name, symbol in self.symbols.items()}
        found: dict[str, dict[str, str]] = {}

        def walk(fields: dict[str, Any], prefix: str, inside: tuple[str, ...]) -> None:
            for name, field in fields.items():
                found.setdefault(f"{prefix}{name}", field)
                for word in re.findall(r"\w+", field.get("type") or ""):
                    if word in classes and word not in inside:
                        below = classes[word].get("fields", {})
                        walk(below, f"{prefix}{name}.", (*inside, word))

        for name, symbol in self.symbols.items():
            if name.endswith(".MasterConfig"):
                walk(symbol["fields"], "", ())
        return found

    @cached_property
    def sections(self) -> set[str]:
        """The keys that others stand below."""
        return {above for key in self.keys for above in above_key(key)}

    @cached_property
    def readers(self) -> dict[str, Place | str | None]:
        """By key the first line that reads it, or what is known instead; see `readers.json`."""
        content = json.loads((self.folder / READERS).read_text(encoding="utf-8"))
        files = content["files"]
        return {
            key: Place(files[one[0][0]], one[0][1]) if isinstance(one, list) else one
            for key, one in content["readers"].items()
        }

    def set_in(self, key: str) -> dict[str, Any]:
        """The values of a key in NeMo RL's own configuration files that set it, by file."""
        return {name: config[key] for name, config in self.configs.items() if key in config}

    def default(self, text: str) -> tuple[str, str]:
        """A key's default, or its value in a configuration file, and where it comes from.

        Args:
            text: `dpo.sft_loss_weight`, or `policy.optimizer.kwargs.lr in dpo.yaml`.

        Raises:
            UnknownName: there is no such key, default or file.
        """
        key, _, config = text.partition(" in ")
        self.key_place(key)
        if config:
            name: str | None = self.script(config).file.removeprefix(f"{CONFIGS}/")
            while name in self.configs:
                if key in self.configs[name]:
                    return value_text(self.configs[name][key]), name
                parent = self.configs[name].get("defaults")
                name = parent if isinstance(parent, str) else None
            raise UnknownName(f"{config} does not set {key!r}")
        default = self.key_fields.get(key, {}).get("default", "")
        try:
            return value_text(ast.literal_eval(default)), "its class"
        except (ValueError, SyntaxError):
            files = ", ".join(self.set_in(key)) or "no file"
            raise UnknownName(
                f"NeMo RL declares no default for {key!r}; write '{key} in FILE', it is set in {files}"
            ) from None

    def describe_key(self, key: str) -> str:
        """Type, default and the files that set a key, in one line."""
        field = self.key_fields.get(key, {})
        parts = [f"type {field['type']}"] if field.get("type") else []
        if "default" in field:
            parts.append(f"default {field['default']}")
        files = [f"{name}: {value_text(value)}" for name, value in self.set_in(key).items()]
        shown = files[:6] + ([f"and {len(files) - 6} more"] if len(files) > 6 else [])
        return "; ".join([*parts, *(["set in " + ", ".join(shown)] if files else [])])


def above_key(key: str) -> list[str]:
    """The sections that a key is in, the nearest first."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def value_text(value: Any) -> str:
    """A value as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest what a name that is not known may have meant; empty if nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


@lru_cache(maxsize=1)
def read_facts(folder: Path) -> Facts:
    """Read the facts once in a build."""
    return Facts(folder)
