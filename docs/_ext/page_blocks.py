# SPDX-License-Identifier: Apache-2.0
"""What becomes of each fenced block: nothing is shown that no check has reached.

A block is embedded, an equation, included, a directive of the site, a formula, commands, YAML or
Python; or it is marked, with a reason, on the line before it:

    % pseudo-code: `plot` and `history` are the reader's

In README.md and CONTRIBUTING.md the mark is a comment of HTML. Docstrings are marked in `MARKED`.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sources import (
    Block,
    docstring_blocks,
    docstrings,
    markdown_blocks,
    markdown_sources,
)

MARK = re.compile(r"(output|pseudo-code): \S.{9,}")
#: Blocks of docstrings that are neither commands, YAML, JSON nor Python, with what they are.
MARKED = {
    "nemo_rl_ref/training/checkpoints.py": "output: the files that a checkpoint has, with comments",
}
DIRECTIVES = {
    "embed": "embedded from a notebook that is executed",
    "equation": "an equation that is checked against the code",
    "equation-table": "an equation that is checked against the code",
    "key-table": "drawn from what is known of NeMo RL",
    "notation-table": "an equation that is checked against the code",
    "csv-table": "included from a file that is tested",
    "literalinclude": "included from a file that is tested",
}
SITE = {
    "admonition", "bibliography", "block-counts", "eval-rst", "figure", "glossary", "grid",
    "grid-item-card", "image", "note", "tip", "toctree", "warning",
}  # fmt: skip
COMMANDS = "commands that their own parsers understand"
YAML = "YAML with NeMo RL's keys and types"
PYTHON = "Python: executed where it stands alone, else its calls fit the signatures"
LAYOUT = "layout, contents and API of the site"
FORMULA = "a formula of a docstring"
DATA = "JSON that parses"


class Checked(NamedTuple):
    """A block, what it was taken for, and what is wrong with it."""

    block: Block
    treatment: str
    problems: tuple[str, ...] = ()


def all_blocks(top: Path) -> list[Block]:
    """Every fenced block of the pages, README.md, CONTRIBUTING.md, notebooks and docstrings."""
    found = [b for file, text in markdown_sources(top).items() for b in markdown_blocks(file, text)]
    for file, line, text in docstrings(top):
        found += [
            block._replace(mark=MARKED.get(file, ""))
            for block in docstring_blocks(file, line, text)
        ]
    return found


def treat(block: Block, signatures: dict[str, list[ast.arguments]]) -> Checked:
    """Decide what a block is, and check it as far as that needs no import of the package."""
    if block.mark and MARK.fullmatch(block.mark):
        return Checked(block, block.mark.partition(":")[0])
    directive = re.fullmatch(r"\{([\w:-]+)\}", block.kind)
    if directive:
        name = directive[1]
        if name in DIRECTIVES:
            return Checked(block, DIRECTIVES[name])
        return Checked(block, LAYOUT) if name in SITE else escaped(block)
    match block.kind, block.argument:
        case "math", _:
            return Checked(block, FORMULA)
        case ("sh", _) | ("code-block", "sh"):
            return Checked(block, COMMANDS)
        case ("yaml", _) | ("code-block", "yaml"):
            return Checked(block, YAML)
        case "python", _:
            return Checked(block, PYTHON, tuple(python_problems(block.text, signatures)))
        case "::", _:
            return treat_plain(block, signatures)
    return escaped(block)


def treat_plain(block: Block, signatures: dict[str, list[ast.arguments]]) -> Checked:
    """Find out what a docstring's literal block is."""
    text = dedented(block.text)
    if all(re.match(r"(python|make|pip|accelerate) ", line) for line in text.splitlines()):
        return Checked(block, COMMANDS)
    if re.match(r"\{\"", text):
        try:
            json.loads(text)
        except ValueError as error:
            return Checked(block, DATA, (str(error),))
        return Checked(block, DATA)
    if re.match(r"[\w.]+:\s", text):
        return Checked(block, YAML)
    return Checked(block, PYTHON, tuple(python_problems(text, signatures)))


def escaped(block: Block) -> Checked:
    """Refuse a block that no check is for."""
    kind = block.kind or "(none)"
    return Checked(
        block,
        "escaped",
        (
            f"a block of kind {kind!r} is checked by nothing: make it sh, yaml, python or an embedded "
            "cell, or mark it on the line before with '% output: why' or '% pseudo-code: why'",
        ),
    )


def dedented(text: str) -> str:
    """A block without the indent of its docstring."""
    rows = text.split("\n")
    indent = min((len(row) - len(row.lstrip()) for row in rows if row.strip()), default=0)
    return "\n".join(row[indent:] for row in rows)


def our_signatures(top: Path) -> dict[str, list[ast.arguments]]:
    """The parameters of each public function, by its name; of all that have this name."""
    found: dict[str, list[ast.arguments]] = {}
    for path in sorted((top / "nemo_rl_ref").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(node.args)
    return found


def python_problems(text: str, signatures: dict[str, list[ast.arguments]]) -> Iterator[str]:
    """Say what is wrong with Python: its syntax, and calls of ours with arguments that do not fit."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        yield f"not Python: {error.msg} in line {error.lineno}"
        return
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        name = node.func.id
        if name in signatures:
            found = [list(call_problems(name, node, one)) for one in signatures[name]]
            yield from min(found, key=len)
        elif not hasattr(builtins, name) and not name[0].isupper() and name != "launcher":
            yield f"{name}() is no function of this package"


def call_problems(name: str, call: ast.Call, parameters: ast.arguments) -> Iterator[str]:
    """Say which arguments of a call a function does not take."""
    positional = [arg.arg for arg in (*parameters.posonlyargs, *parameters.args)]
    known = {*positional, *(arg.arg for arg in parameters.kwonlyargs)}
    for keyword in call.keywords:
        if keyword.arg and keyword.arg not in known and not parameters.kwarg:
            yield f"{name}() has no parameter {keyword.arg!r}"
    if len(call.args) > len(positional) and not parameters.vararg:
        yield f"{name}() takes {len(positional)} arguments, got {len(call.args)}"
