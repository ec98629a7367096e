# SPDX-License-Identifier: Apache-2.0
"""Every name that a page may have in backquotes, and what is wrong with one that is not known.

Names are NeMo RL's (symbols, keys also by their endings, files, accepted values), ours (modules,
definitions, parameters, attributes, options, metrics, environment variables, files), and those of
`allowed_names.toml`, each with a reason.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from nemo_rl_facts import CONFIGS, Facts, nearest

ALLOWED = "docs/_ext/allowed_names.toml"
#: A dotted name, a path, an option, a value with hyphens; not a number, not what is in ``<>``.
WORD = re.compile(r"(?<![\w.<$\\/-])(?:--)?[A-Za-z_~][\w./-]*\w/?")
PATH = re.compile(r"/|\.(?:py|yaml|yml|json|jsonl|md|toml|txt|cu|db|html|safetensors)$")
#: Folders of code whose definitions are names of ours.
CODE = ("nemo_rl_ref", "notebooks", "benchmarks", "docs", "tests/help")
LISTED = (*CODE, "configs", "tests", ".ci", ".github")


class Names:
    """The names that are known.

    Args:
        top: the project's folder.
        facts: what NeMo RL has.
    """

    def __init__(self, top: Path, facts: Facts) -> None:
        self.facts = facts
        self.paths = set(our_paths(top))
        self.modules = {
            path.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
            for path in self.paths
            if path.startswith("nemo_rl_ref/") and path.endswith(".py")
        } | {path.rstrip("/").replace("/", ".") for path in self.paths if path.endswith("/")}
        allowed = tomllib.loads((top / ALLOWED).read_text(encoding="utf-8"))
        self.allowed = {name: reason for reason, names in allowed.items() for name in names}
        words = set(self.allowed) | {Path(path).name for path in self.paths}
        words |= {*keyword.kwlist, *dir(builtins)}
        for folder in CODE:
            for path in sorted((top / folder).rglob("*.py")):
                words |= set(names_in(path, everything=folder == "notebooks"))
        words |= set(re.findall(r"[\w./-]*\w", (top / "Makefile").read_text(encoding="utf-8")))
        for path in sorted((top / "tests").rglob("*.py")):  # programs among the tests
            text = path.read_text(encoding="utf-8")
            words |= set(re.findall(r"add_argument\(\s*[\"'](--[\w-]+)", text))
            words |= set(re.findall(r"environ(?:\.get\(|\[)[\"'](\w+)", text))
        for path in sorted((top / "configs").rglob("*.yaml")):
            words |= set(re.findall(r"[\w-]+", path.read_text(encoding="utf-8")))
        self.defined = {word for word in words if "." not in word}
        self.words = words | set(theirs(facts))
        self.sections = {key.partition(".")[0] for key in facts.keys if "." in key}
        keys = {key for key in (*facts.keys, *facts.open) if "." in key}
        self.endings = {key.split(".", n)[-1] for key in keys for n in range(1, key.count(".") + 1)}
        self.endings |= set(facts.by_ending)
        self.endings |= {
            m.split(".", n)[-1] for m in self.modules for n in range(1, m.count(".") + 1)
        }
        for module in facts.modules:
            self.endings |= {module.split(".", n)[-1] for n in range(1, module.count(".") + 1)}

    def problems(self, text: str) -> Iterator[str]:
        """Say of each word in a literal that is no known name what it may have meant."""
        if text in self.allowed:
            return
        for match in WORD.finditer(text):
            word = match[0].strip("~.").rstrip("-")
            if word.endswith("_") or text[match.end() :][:1] in ("*", "…", "<", "{"):  # goes on
                word = word.rstrip("_")
                if any(known.startswith(word) for known in (*self.words, *self.paths)):
                    continue
            if len(word) > 2 and not self.is_known(word, match[0].startswith("~")):
                yield f"`{word}` is no name of NeMo RL's or of this project{self.nearest(word)}"

    def is_known(self, word: str, hidden: bool = False) -> bool:
        """Say whether a word is a known name."""
        if word in self.words or word in self.paths or word in self.endings or hidden:
            return True
        if PATH.search(word):
            return self.is_path(word)
        parts = word.split(".")
        if len(parts) > 1:
            if parts[0] == "nemo_rl":
                return self.is_theirs(word)
            if parts[0] == "nemo_rl_ref" or f"nemo_rl_ref.{parts[0]}" in self.modules:
                full = word if parts[0] == "nemo_rl_ref" else f"nemo_rl_ref.{word}"
                return self.is_ours(full) or self.facts.has_key(word) or self.is_theirs(word)
            if parts[0] in self.sections:
                return self.facts.has_key(indexed(word))
            return all(part in self.words for part in parts)
        return all(part in self.words for part in re.split(r"[-/]", word)) and "--" not in word

    def is_path(self, word: str) -> bool:
        """Say whether a path is a file's, here or in NeMo RL, or is made of known words."""
        path = word.removeprefix("/")
        if path in self.paths or f"{path}/" in self.paths or path in self.facts.scripts:
            return True
        if path in self.facts.modules.values():
            return True
        if path.removeprefix(f"{CONFIGS}/") in self.facts.configs:
            return True
        if path == CONFIGS or any(known.endswith(f"/{path}") for known in self.paths):
            return True
        if path.startswith(tuple(f"{folder}/" for folder in (*LISTED, "nemo_rl", "examples"))):
            return False
        return "/" in path and all(part in self.words for part in re.split(r"[/.]", path) if part)

    def is_ours(self, word: str) -> bool:
        """Say whether a dotted name begins with a module of ours and goes on with definitions."""
        parts = word.split(".")
        for count in range(len(parts), 1, -1):
            if ".".join(parts[:count]) in self.modules:
                return all(part in self.defined for part in parts[count:])
        return False

    def is_theirs(self, word: str) -> bool:
        """Say whether a dotted name is a symbol of NeMo RL's."""
        try:
            self.facts.symbol(word)
        except ValueError as problem:
            return "is several" in str(problem)
        return True

    def nearest(self, word: str) -> str:
        """Suggest a name like an unknown one."""
        dotted = (*self.facts.keys, *self.paths, *self.modules)
        for known in (dotted if re.search(r"[./]", word) else (), self.words, self.endings):
            if found := nearest(word, known):
                return found
        return ""


def indexed(key: str) -> str:
    """A key with `#` for an index."""
    return ".".join("#" if part.isdecimal() else part for part in key.split("."))


def theirs(facts: Facts) -> Iterator[str]:
    """Words of NeMo RL's: parts of names and keys, parameters, accepted values, files."""
    for name in (*facts.members, *facts.modules, *facts.keys, *facts.open):
        yield from name.split(".")
    for symbol in facts.symbols.values():
        signatures = [symbol.get("signature") or ""]
        signatures += [method["signature"] for method in symbol.get("methods", {}).values()]
        types = [field.get("type") or "" for field in symbol.get("fields", {}).values()]
        for text in (*signatures, *types, *symbol.get("bases", [])):
            yield from re.findall(r"[A-Za-z_][\w-]*", text)
    for name, config in facts.configs.items():
        yield name
        for value in config.values():
            if isinstance(value, str) and " " not in value:
                yield value
    for path in facts.all_files:
        yield from (path, Path(path).name)


def our_paths(top: Path) -> Iterator[str]:
    """Files and folders of the project, relative; a folder ends in a slash."""
    yield from (path.name for path in top.iterdir() if path.is_file())
    for folder in LISTED:
        yield f"{folder}/"
        for path in (top / folder).rglob("*"):
            if "__pycache__" not in path.parts:
                yield path.relative_to(top).as_posix() + ("/" if path.is_dir() else "")


def names_in(path: Path, everything: bool) -> Iterator[str]:
    """Names that a Python file defines or uses; local variables only if `everything` is wanted."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
            if isinstance(node, ast.ClassDef):
                yield from (
                    target.id
                    for item in node.body
                    if isinstance(item, (ast.Assign, ast.AnnAssign))
                    for target in (item.targets if isinstance(item, ast.Assign) else [item.target])
                    if isinstance(target, ast.Name)
                )
        elif isinstance(node, (ast.arg, ast.keyword)):
            yield node.arg or ""
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield from (node.name, *node.name.split("."), node.asname or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in prose and len(node.value) < 60:
                yield from re.findall(r"[\w.-]*\w", node.value)
        elif everything and isinstance(node, ast.Name):
            yield node.id
    for node in tree.body:
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                yield target.id
