# SPDX-License-Identifier: Apache-2.0
"""Whether the commands in a shell block would be understood, without running them.

A command of this package is given to its own argument parser, which stops before any work; one of
make needs its target; a script its file, here or in NeMo RL. Overrides are read by Hydra's grammar,
their keys and values compared with NeMo RL's. `…` stands for arguments that were given before.

As a program it reads commands as JSON from the standard input and prints the problems of each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from nemo_rl_facts import CONFIGS, FACTS, nearest, read_facts

TOP = Path(__file__).parents[2]
PACKAGE = "nemo_rl_ref."
#: What an ellipsis stands for: arguments that a command before it had.
GIVEN = {
    "nemo_rl_ref.tune": "--config configs/dpo.yaml --space configs/spaces/dpo.yaml "
    "--objective val:a_loss",
}
#: Programs whose arguments are their own.
OTHERS = {"git", "source", "uv"}
SHELL = re.compile(r"(?:for \w+ in [^;]*|do|done)$")

#: Between two commands of a line, not inside quotes.
NEXT = re.compile(r"""(?:&&|;)(?=(?:[^"']|"[^"]*"|'[^']*')*$)""")


class Parsed(Exception):
    """A parser has understood its arguments."""

    def __init__(self, options: argparse.Namespace, rest: list[str]) -> None:
        super().__init__()
        self.options, self.rest = options, rest


class Refused(Exception):
    """A parser has refused its arguments."""


def commands_in(block: str) -> Iterator[str]:
    """The commands of a block, one a line: continued lines joined, comments and loops left out."""
    for line in re.sub(r" *\\\n\s*", " ", block).splitlines():
        for command in NEXT.split(re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ")):
            if command.strip() and not SHELL.match(command.strip()):
                yield re.sub(r"^\s*do ", "", command).strip()


def problems(command: str, overrides_of: str = "") -> Iterator[str]:
    """Say what is wrong with a command.

    Args:
        command: One command in the shell's syntax.
        overrides_of: The configuration that its overrides are for, where no option names one.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        yield f"{command}: {error}"
        return
    if dashes := [word for word in words if re.match(r"[–—]", word)]:
        yield f"{dashes[0]}: an option begins with hyphens"
        return
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    program, arguments = words[0].rpartition("/")[2], words[1:]
    if program in ("python", "python3"):
        yield from python_problems(arguments)
    elif program == "accelerate":
        yield from accelerate_problems(arguments)
    elif program == "make":
        yield from make_problems(arguments)
    elif program == "pip":
        yield from pip_problems(arguments)
    elif program == "uv" and arguments[:1] == ["run"]:
        yield from script_problems(arguments[1:])
    elif program == "source" or program in OTHERS:
        return
    else:
        yield f"{words[0]}: no program that is known here"


def python_problems(arguments: list[str]) -> Iterator[str]:
    """Say what is wrong with `python …`."""
    match arguments:
        case ["-m", "pip", *rest]:
            yield from pip_problems(rest)
        case ["-m", "pytest", *rest]:
            yield from (f"{name}: no such file" for name in rest if missing(name))
        case ["-m", module, *rest] if module.startswith(PACKAGE):
            yield from module_problems(module, rest)
        case ["-c", code]:
            compile(code, "-c", "exec")
        case [script, *_] if not script.startswith("-"):
            if missing(script):
                yield f"{script}: no such file"
        case _:
            yield f"python {shlex.join(arguments)}: it is not known whether this runs"


def missing(name: str) -> bool:
    """Say whether an argument is a path of this project that does not exist."""
    return not name.startswith("-") and not (TOP / name.partition("::")[0]).exists()


def module_problems(module: str, arguments: list[str]) -> Iterator[str]:
    """Say what is wrong with `python -m nemo_rl_ref.…`, as its own parser sees it."""
    if "…" in arguments:
        arguments = [*shlex.split(GIVEN.get(module, "")), *(a for a in arguments if a != "…")]
    try:
        parsed = parse(module, arguments)
    except Refused as error:
        yield f"{module}: {error}"
        return
    except ImportError as error:
        if getattr(error, "name", None) not in (module, f"{module}.__main__"):
            yield f"{module} cannot be imported: {error}"
            return
        files = (
            path.relative_to(TOP).with_suffix("") for path in (TOP / "nemo_rl_ref").rglob("*.py")
        )
        known = [".".join(path.parts).removesuffix(".__main__") for path in files]
        yield f"there is no module {module} to run{nearest(module, known)}"
        return
    if unknown := [word for word in parsed.rest if word.startswith("-")]:
        yield f"{module}: {unknown[0]}: no such option"
        return
    pairs = getattr(parsed.options, "pairs", None) or []  # the checker's, of the loss's own fields
    yield from override_problems(
        [*parsed.rest, *(getattr(parsed.options, "overrides", None) or [])]
    )
    yield from (f"{pair}: expected key=value" for pair in pairs if "=" not in pair)
    for name in ("config", "space"):
        value = str(getattr(parsed.options, name, None) or "")
        if value and not known_file(value):
            yield f"--{name} {value}: no such file here or in NeMo RL"


def parse(module: str, arguments: list[str]) -> Parsed:
    """Run a program as far as its parser has read the arguments.

    Raises:
        Refused: The parser does not understand them.
        ImportError: There is no such program.
    """
    spec = importlib.import_module(module)
    program = importlib.import_module(f"{module}.__main__") if hasattr(spec, "__path__") else spec
    known, mixed = (
        argparse.ArgumentParser.parse_known_args,
        argparse.ArgumentParser.parse_known_intermixed_args,
    )

    def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        with mock.patch.object(argparse.ArgumentParser, "parse_known_args", known):
            options, rest = known(self, arguments, namespace)  # of subcommands, too
        raise Parsed(options, list(rest))

    def stop_mixed(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        with mock.patch.object(argparse.ArgumentParser, "parse_known_args", known):
            options, rest = mixed(self, arguments, namespace)
        raise Parsed(options, list(rest))

    def refuse(self: argparse.ArgumentParser, message: str) -> Any:
        raise Refused(message)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(argparse.ArgumentParser, "parse_known_intermixed_args", stop_mixed),
        mock.patch.object(argparse.ArgumentParser, "error", refuse),
        mock.patch.object(sys, "argv", [module, *arguments]),
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
    ):
        try:
            program.main()
        except Parsed as parsed:
            return parsed
    raise Refused("its arguments were not parsed")


def known_file(value: str) -> bool:
    """Say whether a file is there: of this project, of the page Get Started, or of NeMo RL."""
    facts = read_facts(TOP / FACTS)
    return (
        (TOP / value).is_file()
        or (TOP / "notebooks/get_started" / value).is_file()
        or value.removeprefix(f"{CONFIGS}/") in facts.configs
        or any((TOP / "configs").rglob(value.rpartition("/")[2]))
    )


def override_problems(overrides: list[str]) -> Iterator[str]:
    """Say what is wrong with overrides: Hydra's grammar, the key, the type of the value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from nemo_rl_ref.config.types import fits, key_types, problem_with_key, type_name

    for text in overrides:
        if "=…" in text:
            text = text.replace("…", "x")  # a value of the reader's
        elif "=$" in text:
            text = re.sub(r"\$\w+", "1", text)  # a variable of the shell's, a number in a loop
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            yield f"{text}: not an override in Hydra's grammar: {str(error).splitlines()[0]}"
            continue
        key = str(override.key_or_group)
        if text.startswith(("+", "~")):
            continue
        problem = problem_with_key(key)
        if problem and "it is a section" not in problem:
            yield f"{text}: {key} is not {problem}"
            continue
        value, types = override.value(), key_types(key)
        if not problem and not fits(value, types) and not isinstance(value, dict):
            if type_name(value) == "str" or "str" not in types:
                yield f"{text}: {key} takes {' or '.join(sorted(types))}, got {type_name(value)}"


def accelerate_problems(arguments: list[str]) -> Iterator[str]:
    """Say what is wrong with `accelerate launch … -m MODULE …`."""
    from accelerate.commands.launch import launch_command_parser

    if arguments[:1] != ["launch"] or "-m" not in arguments:
        yield f"accelerate {shlex.join(arguments)}: expected accelerate launch … -m MODULE …"
        return
    at = arguments.index("-m")
    own = [word for word in arguments[1:at] if word != "…"]

    def refuse(self: argparse.ArgumentParser, message: str) -> Any:
        raise Refused(message)

    with mock.patch.object(argparse.ArgumentParser, "error", refuse):
        try:
            launch_command_parser().parse_args([*own, "script"])
        except Refused as error:
            yield f"accelerate launch: {error}"
    yield from module_problems(arguments[at + 1], arguments[at + 2 :])


@cache
def makefile() -> tuple[set[str], set[str]]:
    """Targets and variables of the Makefile."""
    text = (TOP / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", text, re.MULTILINE))
    return targets, set(re.findall(r"^#?\s*([A-Z]+)(?: +\?=|  )", text, re.MULTILINE))


def make_problems(arguments: list[str]) -> Iterator[str]:
    """Say what is wrong with `make …`."""
    targets, variables = makefile()
    for word in arguments:
        name, assigned, _ = word.partition("=")
        known = variables if assigned else targets
        if name not in known and not word.startswith("-"):
            what = "variable" if assigned else "target"
            yield f"make {word}: the Makefile has no such {what}{nearest(name, known)}"


def pip_problems(arguments: list[str]) -> Iterator[str]:
    """Say what is wrong with `pip install '.[extra]'`."""
    extras = tomllib.loads((TOP / "pyproject.toml").read_text("utf-8"))["project"]
    for word in arguments:
        if match := re.search(r"\[([\w,-]+)\]", word):
            for extra in match[1].split(","):
                if extra not in extras["optional-dependencies"]:
                    known = nearest(extra, extras["optional-dependencies"])
                    yield f"pip install {word}: pyproject.toml has no extra {extra!r}{known}"
        elif word.endswith(".txt") and missing(word):
            yield f"{word}: no such file"


def script_problems(arguments: list[str]) -> Iterator[str]:
    """Say what is wrong with `uv run SCRIPT --config FILE overrides`, which NeMo RL runs."""
    script, facts = arguments[0], read_facts(TOP / FACTS)
    ours = any((TOP / "docs").rglob(script.rpartition("/")[2]))
    if script not in facts.scripts and not ours:
        yield f"{script}: NeMo RL has no such script{nearest(script, facts.scripts)}"
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config")  # the one option of NeMo RL's scripts
    options, rest = parser.parse_known_args(arguments[1:])
    if options.config and not known_file(options.config):
        yield f"--config {options.config}: NeMo RL has no such file"
    yield from (f"{script}: {word}: no such option" for word in rest if word.startswith("-"))
    yield from override_problems([word for word in rest if not word.startswith("-")])


def yaml_problems(text: str) -> Iterator[str]:
    """Say what is wrong with a YAML block: its syntax, keys and types as NeMo RL has them."""
    from nemo_rl_ref.config.keys import flatten_keys
    from nemo_rl_ref.config.types import fits, key_types, problem_with_key, type_name

    try:
        content = yaml.load(text, UniqueKeys)
    except yaml.YAMLError as error:
        yield f"not YAML: {' '.join(str(error).split())}"
        return
    facts = read_facts(TOP / FACTS)
    space = isinstance(content, dict) and any("." in str(key) for key in content)
    for key, value in content.items() if space else flatten_keys(content).items():
        key = str(key)
        section = key.partition(".")[0]
        if not any(name.partition(".")[0] == section for name in facts.keys):
            key = f"policy.{key}"  # a part of a configuration, from `policy` on
        if problem := problem_with_key(key):
            yield f"{key} is not {problem}"
        elif not isinstance(value, dict) and not fits(value, key_types(key)):
            yield f"{key} takes {' or '.join(sorted(key_types(key)))}, got {type_name(value)}"


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a second key of the same name."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(
                    f"line {key.start_mark.line + 1}: the key {key.value} stands twice"
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def answer(blocks: list[list[str]]) -> list[list[str]]:
    """The problems of each block: pairs of a kind, `sh` or `yaml`, and its text."""
    found = []
    for kind, text in blocks:
        if kind == "yaml":
            found.append(list(yaml_problems(text)))
        else:
            found.append(
                [problem for command in commands_in(text) for problem in problems(command)]
            )
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(TOP))
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
