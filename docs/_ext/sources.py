# SPDX-License-Identifier: Apache-2.0
"""The sources of the site's text, and the literals and fenced blocks in them.

Pages, README.md and CONTRIBUTING.md are Markdown, and so are the text cells of notebooks;
docstrings are reStructuredText. Everything found knows its file and line.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.amsmath import amsmath_plugin
from mdit_py_plugins.colon_fence import colon_fence_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.front_matter import front_matter_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin
from mdit_py_plugins.myst_role import myst_role_plugin

#: Directives whose content is Markdown.
NESTED = {"admonition", "glossary", "grid", "grid-item-card", "note", "tip", "warning", "important"}
OPTION = re.compile(r":[\w-]+:|---$")


class Literal(NamedTuple):
    """Text in backquotes: plain, or of a role."""

    file: str
    line: int
    role: str
    text: str


class Block(NamedTuple):
    """A fenced block: its first word, the rest of that line, its content, a mark before it."""

    file: str
    line: int
    kind: str
    argument: str
    text: str
    mark: str = ""


@cache
def parser() -> MarkdownIt:
    """Markdown as MyST reads it, as far as literals and blocks are concerned."""
    markdown = MarkdownIt("commonmark").enable("table")
    for plugin in (front_matter_plugin, myst_role_plugin, myst_block_plugin, colon_fence_plugin):
        markdown.use(plugin)
    return markdown.use(amsmath_plugin).use(dollarmath_plugin, double_inline=True)


def markdown_sources(top: Path) -> dict[str, str]:
    """The Markdown of a project by path; of notebooks the text cells, on their own lines."""
    paths = [
        *sorted((top / "docs").rglob("*.md")),
        *map(top.joinpath, ("README.md", "CONTRIBUTING.md")),
    ]
    found = {path.relative_to(top).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    for path in sorted((top / "notebooks").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        found[path.relative_to(top).as_posix()] = text_cells(text)
    return found


def text_cells(notebook: str) -> str:
    """The Markdown of a py:percent notebook; all other lines are empty."""
    lines, inside = [], False
    for line in notebook.splitlines():
        if line.startswith("# %%"):
            inside = "[markdown]" in line
            line = ""
        lines.append(line.removeprefix("#").removeprefix(" ") if inside and line[:1] == "#" else "")
    return "\n".join(lines)


def docstrings(top: Path) -> Iterator[tuple[str, int, str]]:
    """File, first line and text of each docstring of the package."""
    for path in sorted((top / "nemo_rl_ref").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if isinstance(node, kinds) and (text := ast.get_docstring(node, clean=False)):
                yield path.relative_to(top).as_posix(), node.body[0].lineno, text


def markdown_tokens(text: str, start: int = 0) -> Iterator[tuple[int, Token]]:
    """Tokens of a Markdown text with the line that each begins on, nested directives opened."""
    for token in parser().parse(text):
        line = start + (token.map[0] if token.map else 0) + 1
        yield line, token
        if token.type in ("fence", "colon_fence") and directive_of(token) in NESTED:
            rows = token.content.split("\n")
            rows = ["" if OPTION.match(row) else row for row in rows]
            yield from markdown_tokens("\n".join(rows), line)


def directive_of(token: Token) -> str:
    """The directive of a fence, without braces; empty for a block of code."""
    match = re.match(r"\{([\w:-]+)\}", token.info.strip())
    return match[1] if match else ""


def markdown_literals(file: str, text: str) -> Iterator[Literal]:
    """The literals of a Markdown text."""
    for line, token in markdown_tokens(text):
        at = line
        for child in token.children or ():
            if child.type in ("softbreak", "hardbreak"):
                at += 1
            elif child.type == "code_inline":
                yield Literal(file, at, "", child.content)
            elif child.type == "myst_role":
                yield Literal(file, at, child.meta["name"], child.content)
                at += child.content.count("\n")


def docstring_literals(file: str, line: int, text: str) -> Iterator[Literal]:
    """The literals of a docstring, examples and blocks left out."""
    prose = re.sub(r"(?m)^ *(>>>|\.\.\.).*$", "", text)
    for block in docstring_blocks(file, line, text):
        empty = "\n" * block.text.count("\n")
        prose = prose.replace(block.text, empty, 1)
    for match in re.finditer(r"(?:(:[\w:]+:)`|``?)((?<=``)[^`]+(?=``)|[^`]+)(?:``?)", prose):
        at = line + prose.count("\n", 0, match.start())
        yield Literal(file, at, (match[1] or "").strip(":"), " ".join(match[2].split()))


def docstring_blocks(file: str, line: int, text: str) -> Iterator[Block]:
    """The literal blocks of a docstring: after ``::``, or a directive's content."""
    rows = text.split("\n")
    number = 0
    while number < len(rows):
        row = rows[number]
        directive = re.match(r" *\.\. ([\w-]+):: ?(.*)", row)
        if not directive and not row.rstrip().endswith("::"):
            number += 1
            continue
        indent = len(row) - len(row.lstrip()) if number else 0
        end = number + 1
        while end < len(rows) and (
            not rows[end].strip() or len(rows[end]) - len(rows[end].lstrip()) > indent
        ):
            end += 1
        content = "\n".join(rows[number + 1 : end]).strip("\n")
        kind, argument = (directive[1], directive[2]) if directive else ("::", "")
        if content.strip():
            yield Block(file, line + number, kind, argument.strip(), content)
        number = end


def markdown_blocks(file: str, text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text; a comment before a block is its mark."""
    mark = ""
    for line, token in markdown_tokens(text):
        if token.type == "myst_line_comment":
            mark = token.content.strip()
        elif token.type == "html_block" and token.content.startswith("<!--"):
            mark = token.content.strip().removeprefix("<!--").removesuffix("-->").strip()
        elif token.type in ("fence", "colon_fence", "code_block"):
            info = token.info.strip().split(maxsplit=1)
            kind, argument = [*info, "", ""][:2]
            yield Block(file, line, kind, argument, token.content, mark)
            mark = ""
        elif token.nesting == 0 and token.type != "inline":
            mark = ""
