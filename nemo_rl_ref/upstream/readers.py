# SPDX-License-Identifier: Apache-2.0
"""The lines of NeMo RL that read each configuration key.

The source is parsed, nothing is imported or executed. A read is ``x["key"]``, ``x.get("key")``,
``x.key``, ``"key" in x`` or ``getattr(x, "key")``. It reads the key ``section.key`` if what stands
before it is named after the section, with or without config or cfg at its end, or is a variable that
was given the section in the same file. A section is handed over as a whole by ``f(**x)`` and
``x.items()``: whatever is in it is read. A key of which neither is found is read by nothing.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from nemo_rl_ref.upstream import read_facts
from nemo_rl_ref.upstream.checkout import Checkout

#: Before the name of a section that goes somewhere as a whole.
_WHOLE = "**"

#: Lines that are kept of a key; the first says what the key does.
KEPT = 3


#: What a loss or an estimator is given: classes that are not the class of a section.
SECTIONS_OF_CLASSES = {"DPOLossConfig": "dpo", "MseValueLossConfig": "value_loss_fn"}

#: Names of sections in the code, where they differ.
ALIASES = {"estimator": "adv_estimator", "loss": "loss_fn", "master": ""}


@dataclass(frozen=True, order=True)
class Read:
    """One line that reads a name.

    Attributes:
        file: Its path in the checkout.
        line: From 1.
        sections: What stands before the name, outermost first, without config or cfg at its end.
        is_config: Whether that looks like a configuration at all; `x.step` is no read of a key.
    """

    file: str
    line: int
    sections: tuple[str, ...]
    is_config: bool


def find_reads(programs: Mapping[str, ast.Module]) -> dict[str, list[Read]]:
    """Find every read of a name.

    Args:
        programs: Parsed Python files by path.

    Returns:
        By name: the lines, in the order of files and lines.
    """
    found: dict[str, set[Read]] = defaultdict(set)
    sections_of = _sections_of_classes(programs.values())
    for file, tree in sorted(programs.items()):
        for node, given in _nodes(tree, sections_of):
            handed = [(f"{_WHOLE}{one[-1]}", one[:-1]) for one in _handed_over(node, given)]
            read = [(name, _resolve(before, given)) for name, before in _reads(node)]
            for name, chain in [*read, *handed]:
                is_config = any(_is_config(part) for part in chain)
                sections = tuple(filter(None, (_plain(part) for part in chain)))
                found[name].add(Read(file, getattr(node, "lineno", 1), sections, is_config))
    return {name: sorted(reads) for name, reads in found.items()}


def make_readers(
    reads: dict[str, list[Read]], keys: Iterable[str], is_open: Iterable[str]
) -> dict[str, Any]:
    """Tell for each key which lines read it.

    Args:
        reads: See `find_reads`.
        keys: Dotted keys; sections among them are left out.
        is_open: Sections that take any key: they are handed over as a whole.

    Returns:
        By key one of: ``[[file, line], …]``, the lines that read it in its section; ``"name"``, its
        name is read, in which section is not to be seen; ``"passed on"``, with the section above
        it; ``None``, nothing reads it.
    """
    keys, passed = sorted(keys), set(is_open)
    found: dict[str, Any] = {}
    for key, following in zip(keys, [*keys[1:], ""], strict=True):
        if following.startswith(f"{key}.") or key.rpartition(".")[2] in ("*", "#"):
            continue
        parts = [part for part in key.split(".") if part not in ("*", "#")]
        lines = _lines(parts, reads.get(parts[-1], ()))
        above = [key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1)]
        if lines:
            found[key] = [[read.file, read.line] for read in lines[:KEPT]]
        elif passed.intersection(above) or any(_is_handed_over(one, reads) for one in above):
            found[key] = "passed on"
        else:
            found[key] = "name" if reads.get(parts[-1]) else None
    return found


def _is_handed_over(section: str, reads: dict[str, list[Read]]) -> bool:
    """Whether a section below the top goes somewhere as a whole."""
    parts = [part for part in section.split(".") if part not in ("*", "#")]
    handed = reads.get(f"{_WHOLE}{parts[-1]}", ())
    return len(parts) > 1 and bool(_lines(parts, handed) or any(not r.sections for r in handed))


def _lines(parts: Sequence[str], reads: Iterable[Read]) -> list[Read]:
    """The reads whose sections fit best to those of a key, where the innermost does."""
    wanted = [_plain(part) for part in parts[:-1]]

    def fit(read: Read) -> int:
        count = 0
        for have, want in zip(reversed(read.sections), reversed(wanted), strict=False):
            if have != want:
                break
            count += 1
        if count == len(wanted) or count == len(read.sections):
            return count
        return 0  # another section has a key of the same name

    scored = [(fit(read), read) for read in reads]
    best = max((score for score, _ in scored), default=0)
    return [read for score, read in scored if score == best and best > 0]


def _sections_of_classes(trees: Iterable[ast.AST]) -> dict[str, str]:
    """The section that an object of a configuration class is, by the name of the class."""
    found: dict[str, set[str]] = defaultdict(set)
    for tree in trees:
        for node in ast.walk(tree):
            for item in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    for name in _names_in(item.annotation):
                        found[name].add(item.target.id)
    sections = {name: min(ones) for name, ones in found.items() if len(ones) == 1}
    return sections | SECTIONS_OF_CLASSES


def _names_in(annotation: ast.AST | None) -> list[str]:
    nodes = ast.walk(annotation) if annotation is not None else ()
    return [n.id for n in nodes if isinstance(n, ast.Name) and n.id.endswith("Config")]


def _nodes(
    tree: ast.AST, sections_of: dict[str, str]
) -> Iterator[tuple[ast.AST, dict[str, list[str]]]]:
    """Every node, with the sections that variables hold; those in functions also by annotation."""
    given = dict(_given(tree))
    functions = [
        n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    held: list[tuple[ast.AST, dict[str, list[str]]]] = []
    for function in functions:
        arguments = (*function.args.args, *function.args.kwonlyargs)
        typed = {
            one.arg: [sections_of[name]]
            for one in arguments
            for name in _names_in(one.annotation)
            if name in sections_of
        }
        for node in ast.walk(function) if typed else ():
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
                target = _chain(node.targets[0])
                if node.value.id in typed and target[:1] == ["self"]:
                    given.setdefault(".".join(target), typed[node.value.id])
        held.append((function, typed))
    yield from ((node, given) for node in ast.walk(tree))
    for function, typed in held:
        if typed:
            yield from ((node, given | typed) for node in ast.walk(function))


def _reads(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """The names that a node reads, each with the expression that it is read from."""
    match node:
        case ast.Subscript(value=before, slice=ast.Constant(value=str(name)), ctx=ast.Load()):
            yield name, before
        case ast.Attribute(value=before, attr=name, ctx=ast.Load()):
            yield name, before
        case ast.Call(
            func=ast.Attribute(value=before, attr="get" | "pop" | "setdefault"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            yield name, before
        case ast.Call(
            func=ast.Name(id="getattr" | "hasattr" | "_select" | "select"),
            args=[before, ast.Constant(value=str(name)), *_],
        ):
            yield name, before
        case ast.Compare(left=ast.Constant(value=str(name)), comparators=[before]):
            yield name, before


def _handed_over(node: ast.AST, given: dict[str, list[str]]) -> Iterator[list[str]]:
    """The chains of the sections that go somewhere as a whole: ``f(**x)``, ``x.items()``."""
    wholes: list[ast.expr] = []
    match node:
        case ast.Call(func=ast.Attribute(value=before, attr="items" | "model_dump")):
            wholes = [before]
        case ast.Call(func=ast.Attribute(attr="update"), args=[first, *_]):
            wholes = [first]
        case ast.Dict(keys=keys, values=values):
            wholes = [value for key, value in zip(keys, values, strict=True) if key is None]
    if isinstance(node, ast.Call):
        wholes += [keyword.value for keyword in node.keywords if keyword.arg is None]
    for whole in wholes:
        chain = _resolve(whole, given)
        if len(chain) > 1 or (chain and chain != _chain(whole)):
            yield chain


def _chain(node: ast.AST) -> list[str]:
    """The parts of ``master_config.policy["generation"]``; empty if it does not begin so."""
    match node:
        case ast.Name(id=name):
            return [name]
        case ast.Attribute(value=before, attr=name):
            return [*_chain(before), name]
        case ast.Subscript(value=before, slice=ast.Constant(value=str(name))):
            return [*_chain(before), name]
        case ast.Call(
            func=ast.Attribute(value=before, attr="get"), args=[ast.Constant(value=str(name)), *_]
        ):
            return [*_chain(before), name]
        case ast.BoolOp(values=[first, *_]):  # x.get("section") or {}
            return _chain(first)
        case ast.Call(func=ast.Name(id="cast"), args=[_, inner]):
            return _chain(inner)
    return []


def _given(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """The variables and attributes of a file that are given a section, with the section."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            source, target = _chain(node.value), _chain(targets[0])
            if target and len(source) > 1 and target[-1] != source[-1]:
                yield ".".join(target), source


def _resolve(node: ast.expr, given: dict[str, list[str]]) -> list[str]:
    """The chain of an expression, a variable at its start replaced by what it was given."""
    chain = _chain(node)
    for _ in range(4):  # as deep as a section is handed on in one file
        for length in (2, 1):
            source = given.get(".".join(chain[:length]))
            if len(chain) >= length and source and source != chain[:length]:
                chain = [*source, *chain[length:]]
                break
        else:
            break
    return chain


_WORDS = re.compile(r"_?(config|cfg|configs|settings|args|options)$")


def _plain(part: str) -> str:
    """A section's name as variables have it: ``policy_config`` and ``policy`` are the same."""
    plain = "" if part in ("self", "config", "cfg") else _WORDS.sub("", part)
    return ALIASES.get(plain, plain)


def _is_config(part: str) -> bool:
    return _WORDS.search(part) is not None or part in ("grpo", "ppo", "dpo", "sft", "rm", "policy")


def extract_readers(checkout: Checkout, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Make ``readers.json``: what `make_readers` returns, files by their number in a list.

    Args:
        checkout: The commit.
        keys: The content of its ``keys.json``.
    """
    readers = make_readers(find_reads(checkout.programs), keys["keys"], keys["open"])
    files = sorted({place[0] for one in readers.values() if isinstance(one, list) for place in one})
    number = {file: place for place, file in enumerate(files)}
    numbered = {
        key: [[number[file], line] for file, line in one] if isinstance(one, list) else one
        for key, one in readers.items()
    }
    return {"commit": checkout.commit, "files": files, "readers": numbered}


@cache
def load_readers() -> dict[str, Any]:
    """Read ``readers.json``: what `make_readers` returns for the pinned commit.

    Raises:
        ValueError: If the file describes another commit.
    """
    content = read_facts("readers.json")
    files = content["files"]
    return {
        key: [[files[number], line] for number, line in one] if isinstance(one, list) else one
        for key, one in content["readers"].items()
    }
