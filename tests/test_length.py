# SPDX-License-Identifier: Apache-2.0
"""The trainers can be read in an afternoon: how long they are, together with what they share."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "nemo_rl_ref"
TRAINERS = ("trainer", "run_sft", "run_dpo", "run_rm", "run_grpo")
MOST = 900


def lines_of_code(text):
    """Number of lines that are neither blank nor part of a docstring; comments count."""
    left_out = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                left_out.update(range(first.lineno, first.end_lineno + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(bool(line.strip()) and number not in left_out for number, line in lines)


def test_what_counts():
    text = '"""One\n\nof three."""\n\nx = """a\n\nb"""  # a string, no docstring\n\n\ndef f():\n'
    text += '    """Nothing."""\n    # a comment\n    return x\n'
    assert lines_of_code(text) == 2 + 3


def test_the_trainers_are_short():
    counts = {name: lines_of_code((PACKAGE / f"{name}.py").read_text()) for name in TRAINERS}
    assert sum(counts.values()) <= MOST, counts
