# SPDX-License-Identifier: Apache-2.0
"""Runs texts of losses where little can be imported: torch, pydantic, what they need, one package.

Started as a script with the package's name and its folder, it reads a JSON object of texts by class
from its input, executes each text in a namespace of its own and runs the class's example. It prints a
JSON object of what went wrong.
"""

import doctest
import importlib.abc
import importlib.metadata
import json
import sys
from importlib.metadata import distribution, packages_distributions

from packaging.requirements import Requirement

#: Folders of the package that have no counterpart in NeMo RL; what is behind the mirror is let in.
OURS = {"compare", "contract", "config", "custom", "equations", "export", "rl", "tiny", "training"}


def with_needs(names: set[str]) -> set[str]:
    """The distributions that some need, themselves included."""
    found, to_do = set(), list(names)
    while to_do:
        name = to_do.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            needs = distribution(name).requires or []
        except importlib.metadata.PackageNotFoundError:
            continue
        to_do += [r.name for r in map(Requirement, needs) if not r.marker or r.marker.evaluate()]
    return found


class Refuse(importlib.abc.MetaPathFinder):
    """Refuses every other package."""

    def __init__(self, package: str) -> None:
        self.package = package
        allowed = with_needs({"torch", "pydantic"})
        self.modules = {
            module
            for module, names in packages_distributions().items()
            if {name.lower().replace("_", "-") for name in names} & allowed
        }

    def find_spec(self, name, path=None, target=None):
        """Let a module be found by the others, or refuse it."""
        top, *inner = name.split(".")
        known = {*sys.stdlib_module_names, *self.modules, self.package}
        refused = top not in known and not top.startswith("_")  # generated parts of the library
        if self.package == "nemo_rl":  # imports what it likes
            refused = top == "nemo_rl_ref"
        if refused or (inner and top == "nemo_rl_ref" and inner[0] in OURS):
            raise ModuleNotFoundError(f"{name} is out of reach here", name=name)


def main() -> None:
    """Run the texts."""
    package, folder = sys.argv[1:]
    texts = json.load(sys.stdin)
    import torch

    sys.path.insert(0, folder)
    sys.meta_path.insert(0, Refuse(package))
    losses = vars(importlib.import_module(f"{package}.algorithms.loss"))
    in_examples = {"torch": torch} | {k: v for k, v in losses.items() if k[0] != "_"}
    wrong = {}
    for name, text in texts.items():
        space = {"__name__": "block"}
        said: list[str] = []
        try:
            exec(compile(text, f"{name}.py", "exec"), space)
            shared = in_examples | space
            for test in doctest.DocTestFinder(recurse=False).find(space[name], name, globs=shared):
                doctest.DocTestRunner(verbose=False).run(test, out=said.append)
                assert test.examples, "it has no example"
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        if said:
            wrong[name] = "".join(said)
    print(json.dumps(wrong))


if __name__ == "__main__":
    main()
