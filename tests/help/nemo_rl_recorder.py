# SPDX-License-Identifier: Apache-2.0
"""What stands in for NeMo RL's functions: it takes what the manifest says, and nothing else."""

import ast
import inspect

from nemo_rl_ref.upstream import load_manifest

SYMBOLS = load_manifest()["symbols"]


def imported_from_nemo_rl(source):
    return [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemo_rl.")
        for alias in node.names
    ]


def signature(text):
    """The inspect.Signature that a manifest entry's text describes."""
    namespace = {}
    exec(f"def f{text}: ...", namespace)  # text of our own data file
    return inspect.signature(namespace["f"])


class Recorder:
    """Stands in for a function of NeMo RL: takes what the manifest says, and nothing else."""

    def __init__(self, name, returns):
        self.signature = signature(SYMBOLS[name]["signature"])
        self.returns = returns
        self.calls = []

    def __call__(self, *args, **kwargs):
        self.calls.append(self.signature.bind(*args, **kwargs).arguments)
        return self.returns(*args, **kwargs) if callable(self.returns) else self.returns
