# SPDX-License-Identifier: Apache-2.0
"""Environments: functions from texts to a reward.

NeMo RL's environments are Ray actors that can hold a conversation. Here one is a function::

    def reward(prompt: str, response: str, ground_truth: str) -> float: ...

that returns the reward, a number of Python, NumPy or PyTorch, or a dict of components by name, for
GDPO. Their sum is then the reward,
and ``reward/<name>`` are logged. A dataset chooses its environment with ``env_name``, as there;
``--env my_file.py:reward`` puts one's own in the place of all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from numbers import Real
from typing import Any

import torch

Environment = Callable[[str, str, str], "float | Mapping[str, float]"]


def final_answer(response: str) -> str:
    r"""The last ``\boxed{…}`` of a response, or else all of it, without surrounding spaces.

    Args:
        response: Text; braces inside the box may nest.
    """
    start = response.rfind(r"\boxed{")
    if start < 0:
        return response.strip()
    depth, begin = 1, start + len(r"\boxed{")
    for place in range(begin, len(response)):
        depth += {"{": 1, "}": -1}.get(response[place], 0)
        if depth == 0:
            return response[begin:place].strip()
    return response[begin:].strip()


def math_reward(prompt: str, response: str, ground_truth: str) -> float:
    """1 if the final answer is the ground truth, else 0.

    Numbers are compared by value (``0.5``, ``1/2`` and ``50%`` are equal, ``1,000`` is 1000),
    everything else as text without spaces and dollar signs. NeMo RL's environment compares with the
    package math-verify, which also knows LaTeX expressions.

    Args:
        prompt: Not used.
        response: The response's text.
        ground_truth: The answer's text.
    """
    given, wanted = _plain(final_answer(response)), _plain(final_answer(ground_truth))
    if given == wanted:
        return 1.0
    number, target = _number(given), _number(wanted)
    return float(number is not None and number == target)


def exact_match(prompt: str, response: str, ground_truth: str) -> float:
    """1 if the response is the ground truth, character by character, else 0. Not in NeMo RL."""
    return float(response == ground_truth)


def math_multi_reward(prompt: str, response: str, ground_truth: str) -> dict[str, float]:
    """NeMo RL's three components: is the answer right, an integer, and in the asked form.

    The answer is what stands between ``<answer>`` and ``</answer>``; the form is
    ``<think>…</think>``, a new line, ``<answer>…</answer>`` and nothing else.

    Args:
        prompt: Not used.
        response: The response's text.
        ground_truth: The answer's text.

    Returns:
        ``correctness``, ``integer`` and ``format``, each 0 or 1.
    """
    given = response.split("<answer>")[-1].split("</answer>")[0].strip()
    form = re.search(r"^<think>.*?</think>\n<answer>.*?</answer>$", response, re.DOTALL)
    once = response.count("<answer>") == response.count("</answer>") == 1
    return {
        "correctness": float(given == ground_truth),
        "integer": float(given.isdigit()),
        "format": float(bool(form) and once),
    }


#: By the names of NeMo RL's environments, and ``exact_match``.
ENVIRONMENTS: dict[str, Environment] = {
    "math": math_reward,
    "math_default": math_reward,
    "math_multi_reward": math_multi_reward,
    "exact_match": exact_match,
}


def score(
    environments: list[Environment], prompts: list[str], responses: list[str], truths: list[str]
) -> dict[str, torch.Tensor]:
    """Rewards of a batch.

    Args:
        environments: The environment of each row.
        prompts: Texts, one a row.
        responses: Texts, one a row.
        truths: Ground truths, one a row.

    Returns:
        ``total_reward`` (B,) float32 and, where environments return components,
        ``reward/<name>`` (B,).

    Raises:
        ValueError: If a reward is not a finite number, or only some rows have components.
    """
    totals: list[float] = []
    components: dict[str, list[float]] = {}
    rows = zip(environments, prompts, responses, truths, strict=True)
    for row, (environment, prompt, response, truth) in enumerate(rows):
        reward = environment(prompt, response, truth)
        named = reward if isinstance(reward, Mapping) else {}
        values = [_finite(value) for value in (named.values() if named else [reward])]
        total = _finite(sum(values))  # NaN if one of them is
        if math.isnan(total):
            raise ValueError(
                f"environment {_name(environment)}: returned {reward!r:.80} for the response "
                f"{response[:80]!r}, expected a finite number or a dict of them"
            )
        totals.append(total)
        if row > 0 and named.keys() != components.keys():
            raise ValueError(
                f"environment {_name(environment)}: returned components {sorted(named)} where "
                f"another row has {sorted(components)}; all rows must have the same"
            )
        for name, value in zip(named, values, strict=False):  # without names there are none
            components.setdefault(name, []).append(value)
    return {
        "total_reward": torch.tensor(totals),
        **{f"reward/{name}": torch.tensor(values) for name, values in components.items()},
    }


def _finite(value: Any) -> float:
    """The value of a number that is finite in float32, which rewards are kept in, else NaN."""
    if getattr(value, "ndim", None) == 0:  # of NumPy or PyTorch
        value = value.item()
    number: Any = value
    if isinstance(value, Real) and abs(number) <= torch.finfo(torch.float32).max:
        return float(number)
    return math.nan


def _name(environment: Environment) -> str:
    return getattr(environment, "__name__", repr(environment))


def _plain(text: str) -> str:
    if text.isalnum():
        return text
    return re.sub(r"[\s$]|\\[,;!]", "", text).rstrip(".")


def _number(text: str) -> Fraction | int | None:
    """The value of a decimal number, a fraction or a percentage; None for any other text."""
    if text.isascii() and text.isdigit() and len(text) <= 100:
        return int(text)
    text = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text)
    percent = text.endswith("%")
    text = text.removesuffix("%").removesuffix("\\")
    fraction = re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", text)
    if fraction:
        text = f"{fraction[1]}{fraction[2]}/{fraction[3]}"
    if not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+|\d+/0*[1-9]\d*)", text) or len(text) > 100:
        return None
    return Fraction(text) / (100 if percent else 1)
