# SPDX-License-Identifier: Apache-2.0
"""The facts about NeMo RL at one commit: symbols, signatures, defaults, keys, files and lines.

griffe reads the classes and functions, a safe YAML loader the configurations. Nothing of the
checkout is imported or executed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_ref.upstream.checkout import Checkout
from nemo_rl_ref.upstream.keys import extract_keys
from nemo_rl_ref.upstream.readers import extract_readers

if TYPE_CHECKING:
    import griffe

Facts = dict[str, Any]

_DEFINITION = re.compile(r"\s*(async\s+def|def|class)\b")


def extract(checkout: Checkout) -> dict[str, Facts]:
    """Collect what two commits are compared by.

    Args:
        checkout: The commit to read. What could not be read is in its `notes` afterwards.

    Returns:
        The contents of ``manifest.json``, ``keys.json``, ``places.json`` and ``sources.json``.
    """
    symbols, exports, sources = {}, {}, {}
    for path, tree in checkout.modules.items():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        found, imported = _read_module(module, path, checkout.texts[path])
        symbols |= found
        exports |= imported
        sources |= {f"{module}.{name}": hashes for name, hashes in _hash_module(tree).items()}
    configs = {
        path.removeprefix("examples/configs/"): _flatten(checkout.values(path))
        for path in checkout.yamls
        if re.fullmatch(r"examples/configs/[^/]+", path)
    }
    keys, places = extract_keys(checkout)
    manifest = {
        "commit": checkout.commit,
        "configs": configs,
        "date": checkout.date,
        "exports": exports,
        "files": checkout.files,
        "scripts": [f for f in checkout.files if re.fullmatch(r"examples/run_[^/]*[.]py", f)],
        "symbols": symbols,
        "upstream": "NVIDIA-NeMo/RL",
    }
    sources = {"commit": checkout.commit, "sources": sources}
    return {
        "manifest.json": manifest,
        "keys.json": keys,
        "places.json": places,
        "sources.json": sources,
    }


def extract_all(checkout: Checkout) -> dict[str, Facts]:
    """Collect all that is kept of a commit: what `extract` does, and ``readers.json``."""
    facts = extract(checkout)
    return facts | {"readers.json": extract_readers(checkout, facts["keys.json"])}


def facts_text(name: str, content: Facts) -> str:
    """Write one of the files, sorted and an item a line, so that a later difference can be read."""
    indent = 0 if name in ("manifest.json", "readers.json") else 1
    text = json.dumps(content, indent=indent, sort_keys=True, default=str)
    if name == "places.json":  # file and line of a key on the key's own line
        text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)
    if name == "readers.json":  # the same of the lines that read it
        text = re.sub(r"\n(?=[\d\[\]])", "", text)
    return text + "\n"


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values; an empty section and a list are values."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        deeper = isinstance(value, dict) and value
        flat |= _flatten(value, f"{prefix}{name}.") if deeper else {f"{prefix}{name}": value}
    return flat


def _read_module(module: str, path: str, text: str) -> tuple[Facts, dict[str, str]]:
    """The public symbols that a file defines, and what a package's ``__init__`` hands on."""
    import griffe

    lines, symbols, exports = text.splitlines(), {}, {}
    tree = griffe.visit(module, filepath=Path(path), code=text)

    def line(member: griffe.Object) -> int:
        """The line of ``def`` or ``class``, after the decorators."""
        first, last = member.lineno or 1, member.endlineno or 1
        return next((n for n in range(first, last) if _DEFINITION.match(lines[n - 1])), first)

    for name, member in tree.members.items():
        if name.startswith("_"):
            continue
        entry: Facts = {"file": path, "line": 0}
        match member:
            case griffe.Alias():
                if path.endswith("/__init__.py") and member.target_path.startswith("nemo_rl."):
                    exports[f"{module}.{name}"] = member.target_path
                continue
            case griffe.Function():
                entry |= {"kind": "function", "signature": _signature(member)}
            case griffe.Class():
                entry |= {"kind": "class", **_read_class(member, line)}
            case _:
                continue
        symbols[f"{module}.{name}"] = entry | {"line": line(member)}
    return symbols, exports


def _read_class(node: griffe.Class, line: Any) -> Facts:
    """Bases, fields and public methods. What ``__init__`` sets on ``self`` is no field."""
    import griffe

    fields: Facts = {}
    methods: Facts = {}
    functions = [m for m in node.members.values() if isinstance(m, griffe.Function)]
    for name, member in node.members.items():
        public = not name.startswith("_") or name in ("__init__", "__call__")
        if isinstance(member, griffe.Function) or "property" in member.labels:
            if public:
                signature = _signature(member) if isinstance(member, griffe.Function) else "(self)"
                methods[name] = {"line": line(member), "signature": signature}
        elif isinstance(member, griffe.Attribute):
            at = member.lineno or 0
            if any((f.lineno or 0) <= at <= (f.endlineno or 0) for f in functions):
                continue
            written = {"default": member.value, "type": member.annotation}
            fields[name] = {key: str(part) for key, part in written.items() if part is not None}
    return {"bases": [str(base) for base in node.bases], "fields": fields, "methods": methods}


def _signature(function: griffe.Function) -> str:
    """Names and defaults, without annotations."""
    import griffe

    kinds, parts, before = griffe.ParameterKind, [], None
    stars = {kinds.var_positional: "*", kinds.var_keyword: "**"}
    for parameter in function.parameters:
        kind = parameter.kind or kinds.positional_or_keyword
        if before is kinds.positional_only and kind is not before:
            parts.append("/")
        if kind is kinds.keyword_only and before not in (kind, kinds.var_positional):
            parts.append("*")
        default = "" if kind in stars or parameter.default is None else f"={parameter.default}"
        parts.append(f"{stars.get(kind, '')}{parameter.name}{default}")
        before = kind
    if before is kinds.positional_only:
        parts.append("/")
    return f"({', '.join(parts)})"


def _hash_module(tree: ast.Module) -> dict[str, dict[str, str]]:
    """For each public function and class, hashes of what it computes, by method.

    A hash covers the syntax without comments, docstrings, annotations and the symbol's own name,
    and the private functions and values of the file that the code uses. ``body`` is a function's,
    or what a class has besides methods.
    """
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    private, found = {}, {}
    for node in tree.body:
        if isinstance(node, (*functions, ast.ClassDef)):
            private[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            private[node.targets[0].id] = node
    private = {name: node for name, node in private.items() if name.startswith("_")}

    def digest(*nodes: ast.AST, called: str = "") -> str:
        helpers: dict[str, ast.AST] = {}
        todo = list(nodes)
        while todo:
            names = {n.id for n in ast.walk(todo.pop()) if isinstance(n, ast.Name)}
            new = {name: private[name] for name in names & private.keys() - helpers.keys()}
            helpers |= new
            todo += new.values()
        parts = [_plain(node, called) for node in (*nodes, *(helpers[n] for n in sorted(helpers)))]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    for node in tree.body:
        name = getattr(node, "name", "_")
        if name.startswith("_"):
            continue
        if isinstance(node, functions):
            found[name] = {"body": digest(node, called=name)}
        elif isinstance(node, ast.ClassDef):
            methods = {
                m.name: digest(m, called=name) for m in node.body if isinstance(m, functions)
            }
            rest = [m for m in node.body if not isinstance(m, functions)]
            found[name] = {"body": digest(*rest, called=name), **methods}
    return found


def _plain(node: Any, called: str) -> Any:
    """A node as nested tuples, alike in every version of Python."""
    if isinstance(node, list):
        is_docstring = (
            node and isinstance(node[0], ast.Expr) and isinstance(node[0].value, ast.Constant)
        )
        return [_plain(item, called) for item in (node[1:] if is_docstring else node)]
    if not isinstance(node, ast.AST):
        return "" if node == called else node
    fields = [
        (k, v) for k, v in ast.iter_fields(node) if k not in ("annotation", "returns", "kind")
    ]
    return type(node).__name__, [(k, _plain(v, called)) for k, v in fields if v not in (None, [])]
