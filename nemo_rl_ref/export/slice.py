# SPDX-License-Identifier: Apache-2.0
"""The least part of a program that a class or a listing needs, as a text that runs alone.

A program is a list of statements, those of a file or of the cells of a notebook in order. For each,
Python's own symbol tables say which names it gives a value and which it uses, at once or when what
it defines is called. From there the statements that others need are found backwards:

- A name needs the last statement above that gives it a value, as the caller of a function needs it.
- It needs every statement after that which may change the object: one that assigns to a part of
  it, and a call that stands alone (``optimizer.step()``, ``train(policy)``) for the object whose
  method it is and for all that it is given. A call whose result is given a name is taken to change
  nothing else, and so are ``print``, ``assert_…`` and a class that is only called.
- A function of the program changes what its body changes of the names outside it.
- An ``if`` may not have run, so what it gives a value needs the statements above it, too.

Imports are merged at the top, only the names that are used. Comments directly above a statement
belong to it.
"""

from __future__ import annotations

import ast
import builtins
import re
import symtable
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

WIDTH = 100
COMPREHENSIONS = ("listcomp", "setcomp", "dictcomp", "genexpr")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LICENSE = "# SPDX-License-Identifier: Apache-2.0\n"


class NotAlone(ValueError):
    """A text that cannot be made to run alone; the message says why."""


@dataclass(frozen=True, order=True)
class Import:
    """One name that an import statement brings: ``from module import name as bound``."""

    module: str
    name: str
    bound: str


@dataclass(frozen=True)
class Flow:
    """What a piece of code does with names.

    Attributes:
        binds: those that it gives a value, whatever they had before.
        changes: those whose object it may change, or that it gives a value in some cases only.
        uses: those whose value from before it reads when it is executed.
        later: those that are read when what it defines is called.
        effects: those of `later` whose object such a call may change.
    """

    binds: frozenset[str] = frozenset()
    changes: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()
    later: frozenset[str] = frozenset()
    effects: frozenset[str] = frozenset()

    def then(self, after: Flow) -> Flow:
        """Return what this does and then another piece of code."""
        return Flow(
            self.binds | after.binds,
            self.changes | (after.changes - self.binds),
            self.uses | (after.uses - self.binds),
            self.later | after.later,
            self.effects | after.effects,
        )

    def or_not(self) -> Flow:
        """Return the same for code that may not be executed."""
        return replace(self, binds=frozenset(), changes=self.changes | self.binds)


@dataclass(frozen=True)
class Statement:
    """A statement at the top level of a file or cell, or several on one line.

    Attributes:
        text: its lines, with the comments directly above.
        gap: how many blank lines stand above.
        defines: whether it defines a function or class, which two blank lines are around.
        imports: what it imports, where it does nothing else.
        flow: what it does with names.
    """

    text: str
    gap: int
    defines: bool
    imports: tuple[Import, ...]
    flow: Flow


# ---- one statement ----------------------------------------------------------------------------


def statements(source: str) -> list[Statement]:
    """List the statements of a file or cell.

    Raises:
        SyntaxError: it is not Python.
    """
    lines = source.split("\n")
    found, above = [], 0  # `above`: how many lines are dealt with
    for group in same_line_groups(ast.parse(source).body):
        first, last = first_line(group[0]), max(node.end_lineno or 0 for node in group)
        while first - 1 > above and lines[first - 2].startswith("#"):
            first -= 1
        gap = 0
        while gap < first - 1 - above and not lines[first - 2 - gap].strip():
            gap += 1
        imports = [one for node in group for one in imports_of(node)]
        if not all(isinstance(node, ast.Import | ast.ImportFrom) for node in group):
            imports = []
        defines = isinstance(group[0], (*DEFINITIONS, ast.ClassDef))
        text = "\n".join(lines[first - 1 : last])
        found.append(Statement(text, gap, defines, tuple(imports), flow_of(group)))
        above = last
    return found


def first_line(node: ast.stmt) -> int:
    """Return the line on which a statement begins, its decorators included."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def same_line_groups(body: Sequence[ast.stmt]) -> Iterator[list[ast.stmt]]:
    """Yield statements in order, those that share a line together."""
    group: list[ast.stmt] = []
    for node in body:
        if group and first_line(node) > (group[-1].end_lineno or 0):
            yield group
            group = []
        group.append(node)
    if group:
        yield group


def imports_of(node: ast.stmt) -> list[Import]:
    """List what an import statement brings; nothing for another statement."""
    if isinstance(node, ast.Import):
        return [Import(a.name, "", a.asname or a.name.split(".")[0]) for a in node.names]
    if isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        return [Import(module, a.name, a.asname or a.name) for a in node.names]
    return []


def flow_of(body: Sequence[ast.stmt]) -> Flow:
    """Follow statements that are executed one after the other."""
    flow = Flow()
    for node in body:
        match node:
            case ast.For() | ast.AsyncFor():
                each = ast.Assign([node.target], node.iter)
                flow = flow.then(flow_of([each, *node.body, *node.orelse]))
            case ast.While():
                flow = flow.then(flow_of([ast.Expr(node.test), *node.body, *node.orelse]))
            case ast.With() | ast.AsyncWith():
                entered = [
                    ast.Assign([item.optional_vars], item.context_expr)
                    if item.optional_vars
                    else ast.Expr(item.context_expr)
                    for item in node.items
                ]
                flow = flow.then(flow_of([*entered, *node.body]))
            case ast.If():
                flow = flow.then(flow_of([ast.Expr(node.test)]))
                one, other = flow_of(node.body), flow_of(node.orelse)
                always = Flow(binds=one.binds & other.binds)
                flow = flow.then(one.or_not()).then(other.or_not()).then(always)
            case ast.Try():
                flow = flow.then(flow_of([*node.body, *node.orelse]))
                for handler in node.handlers:
                    flow = flow.then(flow_of(handler.body).or_not())
                flow = flow.then(flow_of(node.finalbody))
            case _:
                flow = flow.then(simple_flow(node))
    return flow


def simple_flow(node: ast.stmt) -> Flow:
    """Ask Python's symbol table about a statement that holds no others, or a definition."""
    text = ast.unparse(ast.fix_missing_locations(node))
    table = symtable.symtable(text, "<listing>", "exec")
    uses, later = names_used(table)
    binds = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    if isinstance(node, DEFINITIONS):
        inner = {name for part in ast.walk(node) for name in names_changed(part)}
        return Flow(frozenset(binds), frozenset(), *map(frozenset, (uses, later, inner & later)))
    changes = {name for part in [node, *walk_executed(node)] for name in names_changed(part)}
    if isinstance(node, ast.AugAssign):
        uses |= changes  # the symbol table has it as assigned
    changes = (changes & uses) - binds  # not what a comprehension binds for itself
    return Flow(frozenset(binds), frozenset(changes), frozenset(uses), frozenset(later))


def names_used(table: symtable.SymbolTable) -> tuple[set[str], set[str]]:
    """Return the global names that a piece of code reads at once, and those that its calls read."""
    uses = {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (table.get_type() == "module" or symbol.is_global())
    }
    later: set[str] = set()
    for child in table.get_children():
        at_once, when_called = names_used(child)
        deferred = str(child.get_type()) == "function" and child.get_name() not in COMPREHENSIONS
        (later if deferred else uses).update(at_once)
        later |= when_called
        if child.get_name() == "lambda":  # mostly called where it stands
            uses |= at_once
    return uses, later


def walk_executed(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that are executed with a statement: not the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (*DEFINITIONS, ast.Lambda)):
            yield child
            yield from walk_executed(child)


def names_changed(node: ast.AST) -> set[str]:
    """Return the names whose objects a node may change."""
    if isinstance(node, ast.AugAssign):
        return names_in(node.target) if isinstance(node.target, ast.Name) else set()
    if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        return names_in(node)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Del):
        return {node.id}
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return set()
    call = node.value
    called = ast.unparse(call.func).split(".")[-1]
    if called in ("print", "display") or called.startswith("assert_") or called[:1].isupper():
        return set()
    of = set() if isinstance(call.func, ast.Name) else names_in(call.func)
    return of.union(*(names_in(part) for part in (*call.args, *call.keywords)))


def names_in(node: ast.AST) -> set[str]:
    """Return every name in a piece of code, but those of the functions that it calls."""
    if isinstance(node, ast.Name):
        return {node.id}
    called = node.func if isinstance(node, ast.Call) else None
    return {n for c in ast.iter_child_nodes(node) if c is not called for n in names_in(c)}


# ---- what others need -------------------------------------------------------------------------


def needed(
    program: Sequence[Statement], wanted: Iterable[int], called_at: int | None = None
) -> tuple[list[int], set[str]]:
    """Find the statements that some statements of a program need, themselves included.

    Args:
        program: the statements in order.
        wanted: places of the statements that are to run.
        called_at: where what is defined is called, a place in the program or its end. If not given,
            as early as can be: after the statements that are to run, or by what uses it.

    Returns:
        The places of all that is needed, in order, and the names that nothing above gives a value.
    """
    wanted = sorted(wanted)
    changed = changes_in(program)
    kept, missing = set(wanted), set()
    to_do = [(name, place) for place in wanted for name in program[place].flow.uses]
    at = wanted[-1] + 1 if called_at is None else called_at
    to_do += [(name, at) for place in wanted for name in program[place].flow.later]
    seen: set[tuple[str, int]] = set()
    while to_do:
        name, below = to_do.pop()
        if (name, below) in seen:
            continue
        seen.add((name, below))
        found = hasattr(builtins, name)
        for place in range(below - 1, -1, -1):
            flow = program[place].flow
            if name in flow.binds | changed[place]:
                found = True
                kept.add(place)
                to_do += [(used, place) for used in flow.uses]
                to_do += [(used, below if called_at is None else at) for used in flow.later]
            if name in flow.binds:
                kept |= submodules(program[:place], name) if program[place].imports else set()
                break
        if not found:
            missing.add(name)
    return sorted(kept), missing


def submodules(program: Sequence[Statement], name: str) -> set[int]:
    """Return the places that import a module inside a package: ``import package`` keeps those."""
    return {
        place
        for place, statement in enumerate(program)
        if any(one.module.startswith(f"{name}.") and not one.name for one in statement.imports)
    }


def changes_in(program: Sequence[Statement]) -> list[frozenset[str]]:
    """Return what each statement changes, the functions included that it uses."""
    effects: dict[str, frozenset[str]] = {}
    found = []
    for flow in (statement.flow for statement in program):
        of_calls = [effects[name] for name in flow.uses if name in effects]
        found.append(flow.changes.union(*of_calls) - flow.binds)
        inner = [effects[name] for name in flow.later if name in effects]
        whole = flow.effects.union(*inner)
        effects |= dict.fromkeys(flow.binds, whole if flow.later else frozenset())
    return found


def whole_class(source: str, name: str, prefix: str = "nemo_rl_ref") -> str:
    """Return a class or function of a file with all that it needs of the file, as a file of its own.

    Args:
        source: the file's text.
        name: of the class or function.
        prefix: what ``nemo_rl_ref`` becomes in the text: ``"nemo_rl"`` for NeMo RL.

    Raises:
        NotAlone: the file does not define the name, imports from its own folder with a dot, or uses
            a name that nothing in it gives a value.
    """
    program = statements(source)
    places = [i for i, s in enumerate(program) if s.defines and name in s.flow.binds]
    if not places:
        defined = sorted(n for s in program if s.defines for n in s.flow.binds)
        raise NotAlone(f"{name}: the file defines {', '.join(defined) or 'no class or function'}")
    future = [i for i, s in enumerate(program) if s.imports and s.imports[0].module == "__future__"]
    kept, missing = needed(program, [*future, *places], called_at=len(program))
    relative = [one.module for i in kept for one in program[i].imports if one.module[0] == "."]
    if missing or relative:
        why = f"uses {', '.join(sorted(missing))}, which is defined nowhere" if missing else ""
        raise NotAlone(
            f"{name}: {why or f'imports from {relative[0]!r}; a file alone has no folder'}"
        )
    text = LICENSE + "\n" + text_of([[program[i] for i in kept]])
    return re.sub(r"\bnemo_rl_ref\b", prefix, text)


# ---- as a text --------------------------------------------------------------------------------


def text_of(parts: Sequence[Sequence[Statement]]) -> str:
    """Write statements as one text: the imports that are used, then each part.

    Args:
        parts: statements in order; a blank line separates the parts.
    """
    every = [statement for part in parts for statement in part]
    used = {name for s in every for name in s.flow.uses | s.flow.later}
    defined = {name for s in every if not s.imports for name in s.flow.binds}
    by_name: dict[str, set[Import]] = {}
    for one in (one for s in every for one in s.imports):
        if one.bound in used or one.module == "__future__":
            by_name.setdefault(one.bound, set()).add(one)
    # A name that stands for two things over time is imported where it was.
    stay = {
        name
        for name, found in by_name.items()
        if name in defined or (len(found) > 1 and any(one.name for one in found))
    }
    top = (one for name, found in by_name.items() if name not in stay for one in found)
    text, gap, before = merged_imports(top), 1, False
    for part in parts:
        for statement in part:
            lines = statement.text
            if statement.imports:
                lines = merged_imports(one for one in statement.imports if one.bound in stay)
            if lines:
                gap = 2 if before or statement.defines else max(gap, statement.gap)
                text += "\n" * (gap + 1) * bool(text) + lines
                gap, before = 0, statement.defines
        gap = 1
    return text + "\n"


def merged_imports(imports: Iterable[Import]) -> str:
    """Write imports in three groups: the standard library, other packages, this project."""
    groups: dict[int, list[str]] = {}
    modules: dict[str, set[Import]] = {}
    for one in imports:
        modules.setdefault(one.module, set()).add(one)
    plain_first = sorted(modules, key=lambda m: (any(i.name for i in modules[m]), m))
    for module in plain_first:
        top = module.split(".")[0]
        group = 0 if module == "__future__" else 1 if top in sys.stdlib_module_names else 2
        lines = groups.setdefault(3 if top in ("nemo_rl_ref", "nemo_rl") else group, [])
        for one in sorted(i for i in modules[module] if not i.name):
            renamed = one.bound != module.split(".")[0]
            lines.append(f"import {module}" + (f" as {one.bound}" if renamed else ""))
        names = [
            one.name if one.name == one.bound else f"{one.name} as {one.bound}"
            for one in sorted(i for i in modules[module] if i.name)
        ]
        if names:
            line = f"from {module} import {', '.join(names)}"
            if len(line) > WIDTH:
                line = "\n".join(
                    [f"from {module} import (", *(f"    {name}," for name in names), ")"]
                )
            lines.append(line)
    return "\n\n".join("\n".join(groups[group]) for group in sorted(groups))
