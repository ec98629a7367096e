# SPDX-License-Identifier: Apache-2.0
"""The source files of NeMo RL at one commit, read through git and never imported."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tarfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

#: The folders whose Python and YAML files are read.
FOLDERS = ("nemo_rl", "examples", "research")

#: The configurations of NeMo RL's entry points among them.
YAML_FILES = re.compile(
    r"examples/(configs/.*|modelopt/[^/]*|nemo_gym/.*|swe_bench/[^/]*)[.]yaml"
    r"|research/[^/]*/configs/.*[.]yaml"
)

#: The scripts among them that read configurations.
SCRIPTS = re.compile(r"examples/([^/]*/)?[^/]*[.]py|research/[^/]*/[^/]*[.]py")


class CheckoutError(ValueError):
    """A folder is no checkout of NeMo RL, or does not have the commit."""


class Checkout:
    """One commit of a checkout; what is not committed is not seen.

    Args:
        path: The root of a checkout of NVIDIA-NeMo/RL, or a bare repository.
        revision: What to read: a commit, branch or tag.

    Attributes:
        commit: The full hash.
        date: The day of the commit, ``YYYY-MM-DD``.
        files: The paths of all files, sorted.
        notes: What could not be read: file, line and reason.
        unread: The files that the notes are about.

    Raises:
        CheckoutError: `path` is no root of a checkout of NeMo RL, or has no such revision.
    """

    def __init__(self, path: Path, revision: str = "HEAD") -> None:
        self.path = path
        self.notes: list[str] = []
        self.unread: set[str] = set()
        if not path.is_dir():
            raise CheckoutError(f"checkout: got {path}, which is no folder")
        inside = self.git("rev-parse", "--show-prefix").strip()
        if inside:
            raise CheckoutError(
                f"checkout: got {path}, the folder {inside} inside a checkout; expected its root"
            )
        try:
            line = self.git("log", "-1", "--format=%H %cs", f"{revision}^{{commit}}", "--")
        except CheckoutError as error:
            shallow = self.git("rev-parse", "--is-shallow-repository").strip() == "true"
            hint = f"; it is shallow: git -C {path} fetch --unshallow" if shallow else ""
            raise CheckoutError(f"checkout {path}: it has no commit {revision}{hint}") from error
        self.commit, self.date = line.split()
        names = self.git("ls-tree", "-r", "-z", "--name-only", self.commit)
        self.files = tuple(sorted(filter(None, names.split("\0"))))
        if "nemo_rl/__init__.py" not in self.files:
            raise CheckoutError(
                f"checkout {path}: commit {self.commit[:9]} has no nemo_rl/__init__.py; "
                "expected a checkout of NVIDIA-NeMo/RL"
            )

    def git(self, *arguments: str) -> str:
        """Return what git prints; `CheckoutError` with its own words if it fails."""
        return self._git(*arguments).decode("utf-8", "replace")

    def _git(self, *arguments: str) -> bytes:
        command = ["git", "-C", str(self.path), *arguments]
        done = subprocess.run(command, capture_output=True)
        if done.returncode:
            reason = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["git failed"]
            raise CheckoutError(f"checkout {self.path}: {reason[-1]}")
        return done.stdout

    @cached_property
    def texts(self) -> dict[str, str]:
        """The Python and YAML files of `FOLDERS` by path."""
        folders = [name for name in FOLDERS if any(f.startswith(f"{name}/") for f in self.files)]
        archive = io.BytesIO(self._git("archive", "--format=tar", self.commit, *folders))
        texts = {}
        with tarfile.open(fileobj=archive) as tar:
            for member in sorted(tar, key=lambda member: member.name):
                if member.name.endswith((".py", ".yaml")) and (file := tar.extractfile(member)):
                    texts[member.name] = file.read().decode("utf-8", "replace")
        return texts

    @cached_property
    def modules(self) -> dict[str, ast.Module]:
        """The parsed Python files below ``nemo_rl`` by path; a note for each that is no Python."""
        return self._parse(path for path in self.texts if path.startswith("nemo_rl/"))

    @cached_property
    def programs(self) -> dict[str, ast.Module]:
        """`modules`, and the scripts of the examples and of research."""
        return self.modules | self._parse(path for path in self.texts if SCRIPTS.fullmatch(path))

    def _parse(self, paths: Iterable[str]) -> dict[str, ast.Module]:
        found = {}
        for path in paths:
            if path.endswith(".py"):
                try:
                    found[path] = ast.parse(self.texts[path], filename=path)
                except (SyntaxError, ValueError) as error:
                    line = getattr(error, "lineno", None) or 1
                    self._note(path, line, getattr(error, "msg", None) or str(error))
        return found

    @cached_property
    def yamls(self) -> dict[str, Any]:
        """The YAML files of `YAML_FILES` by path, as nodes; a note for each that is no YAML.

        No object is made of them, so that no tag does anything.
        """
        import yaml

        found = {}
        for path in (path for path in self.texts if YAML_FILES.fullmatch(path)):
            try:
                node = yaml.compose(self.texts[path], Loader=yaml.SafeLoader)
            except yaml.MarkedYAMLError as error:
                mark = error.problem_mark or error.context_mark
                self._note(path, mark.line + 1 if mark else 1, str(error.problem))
            else:
                found[path] = node
        return found

    def values(self, path: str) -> dict[str, Any]:
        """Read the mapping in a YAML file of `yamls`; empty, with a note, if it is none."""
        import yaml

        node = self.yamls.get(path)
        if not isinstance(node, yaml.MappingNode):
            return {}
        try:
            return yaml.SafeLoader("").construct_document(node)
        except yaml.MarkedYAMLError as error:  # a tag that a safe loader does not make
            mark = error.problem_mark
            self._note(path, mark.line + 1 if mark else 1, str(error.problem))
            return {}

    def renamed_since(self, commit: str) -> dict[str, str]:
        """The files that git sees renamed since a commit; none where it is not in the checkout."""
        arguments = ("-M", "-z", "--diff-filter=R", "--name-status", commit, self.commit)
        try:
            fields = self.git("diff", *arguments, "--", *FOLDERS).split("\0")
        except CheckoutError:
            self.notes.append(
                f"commit {commit[:9]} is not in {self.path}: renamed files are guessed"
            )
            return {}
        return dict(zip(fields[1::3], fields[2::3], strict=False))

    def _note(self, path: str, line: int, problem: str) -> None:
        self.notes.append(f"{path}:{line}: not read: {problem}")
        self.unread.add(path)
