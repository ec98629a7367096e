# SPDX-License-Identifier: Apache-2.0
"""What a statement needs of a program, and how it is written as a text of its own."""

import contextlib
import io

import pytest

from nemo_rl_ref.export.slice import needed, statements, text_of, whole_class


def sliced(*cells):
    """The last cell with what it needs, and the names that nothing gives a value."""
    program, places = [], []
    for number, cell in enumerate(cells):
        found = statements(cell)
        program += found
        places += [number] * len(found)
    kept, missing = needed(program, [i for i, n in enumerate(places) if n == len(cells) - 1])
    parts = [[program[i] for i in kept if places[i] == n] for n in sorted(set(places))]
    return text_of(parts), missing


def printed(text):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(text, {"__name__": "alone"})
    return out.getvalue()


@pytest.mark.parametrize(
    ("before", "last"),
    [
        ("x = [1]\nx.append(2)", "print(x)"),  # a method that stands alone
        ("def grow(a):\n    a += [2]\n\nx = [1]\ngrow(x)", "print(x)"),  # what is given to a call
        (
            "x = [1]\n\ndef grow():\n    x.append(2)\n\ngrow()",
            "print(x)",
        ),  # what a function reaches
        ("x = [1]\ndef one():\n    x.append(2)\n\ndef two():\n    one()\n\ny = two()", "print(x)"),
        ("x = {}\nx['a'] = 1\nx['a'] += 1", "print(x)"),
        ("x = 1\nif x > 0:\n    y = 2\nelse:\n    y = 3", "print(y)"),
        ("y = 1\nif 1 > 5:\n    y = 2", "print(y)"),  # it may not have run
        ("t = 0\nfor i in range(4):\n    t = t + i", "print(t, i)"),
        (
            "def a():\n    return b()\n\ndef b():\n    return c\n\nc = 7",
            "print(a())",
        ),  # called later
        ("import random\nrandom.seed(3)", "print(random.random())"),
        ("c = 1\ndef f():\n    return c\nr = f()\nc = 2", "print(r, f())"),
        ("x = 1\nwith open('/dev/null') as f:\n    y = f.read() + str(x)", "print(y)"),
        ("try:\n    import json\nexcept ImportError:\n    json = None", "print(json.dumps(1))"),
        ("a, (b, *c) = 1, (2, 3)\ndel c[0]", "print([a + i for i in (b, *c)])"),
    ],
)
def test_a_cell_with_what_it_needs_prints_what_it_prints_after_all_before(before, last):
    text, missing = sliced(before, "unneeded = 1", last)
    assert missing == set()
    assert printed(text) == printed(f"{before}\n{last}")
    assert "unneeded" not in text


def test_what_is_not_needed_is_left_out():
    text, _ = sliced(
        "import math, os\nfrom sys import path, argv\n# of a circle\nr = 2.0\nname = 'x'",
        "print(name)\nassert r > 0\n[1].append(len(name))",
        "area = math.pi * r**2",
    )
    assert text == "import math\n\n# of a circle\nr = 2.0\n\narea = math.pi * r**2\n"


def test_a_later_value_replaces_an_earlier_one():
    text, _ = sliced("x = 1", "x = 2", "print(x)")
    assert text == "x = 2\n\nprint(x)\n"


def test_a_name_that_nothing_binds_is_told():
    assert sliced("x = 1", "print(x, y, [z for z in ()])")[1] == {"y"}


def test_imports_are_merged_in_three_groups():
    text, _ = sliced(
        "import torch\nfrom nemo_rl_ref.custom import pairwise",
        "from nemo_rl_ref.custom import batch\nimport os.path\nimport os",
        "print(torch, os, batch, pairwise)",
    )
    assert text.startswith(
        "import os\nimport os.path\n\nimport torch\n\n"
        "from nemo_rl_ref.custom import batch, pairwise\n\nprint("
    )


def test_a_name_of_two_things_is_imported_where_it_was():
    text, _ = sliced("from math import pi as x\ny = x", "from math import e as x", "print(x, y)")
    assert printed(text) == printed("from math import pi, e\nprint(e, pi)")


def test_a_class_takes_its_bases_and_what_its_methods_call():
    source = """from __future__ import annotations
import math, json
class A: pass
class B(A):
    def f(self): return helper(math.pi)
class C: pass
@staticmethod
def helper(x): return LIMIT * x
LIMIT = 2
"""
    text = whole_class(source, "B", "nemo_rl")
    assert "class C" not in text and "json" not in text
    space = {"__name__": "alone"}
    exec(text, space)
    assert space["B"]().f() == pytest.approx(6.283, abs=1e-3)
    assert text.split("\n")[2] == "from __future__ import annotations"


def test_the_prefix_is_changed_everywhere():
    source = 'from nemo_rl_ref.a import X\nclass A(X):\n    """Of nemo_rl_ref.a."""\n'
    assert "nemo_rl_ref" not in whole_class(source, "A", "nemo_rl")
