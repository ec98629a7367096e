# SPDX-License-Identifier: Apache-2.0
"""The page Get Started shows the commands that its notebook runs, in the same order."""

import ast
import re

from small_site import TOP


def commands_of_page():
    page = (TOP / "docs/get-started.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    return [" ".join(block.replace("\\\n", " ").split()) for block in blocks]


def commands_of_notebook():
    tree = ast.parse((TOP / "notebooks/get_started.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = [node for node in calls if getattr(node.func, "id", "") == "run"]
    calls.sort(key=lambda node: node.lineno)
    return [" ".join(ast.literal_eval(node.args[0]).split()) for node in calls]


def test_the_page_shows_what_the_notebook_runs():
    shown = [command for command in commands_of_page() if command.startswith("python")]
    assert shown == commands_of_notebook()
    assert len(shown) == 7
