# SPDX-License-Identifier: Apache-2.0
"""The task: ``12+34=`` is answered by ``46``. Problems, their split, and the grading."""

from __future__ import annotations

import random

LARGEST = 99
HELD_OUT = 1000


def problems() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All pairs of numbers from 0 to 99, split once and for all.

    Returns:
        9,000 problems for training and 1,000 that no training script here ever sees.
    """
    every = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    random.Random(0).shuffle(every)
    return every[HELD_OUT:], every[:HELD_OUT]


def prompt(problem: tuple[int, int]) -> str:
    """The text of a problem, ``12+34=``."""
    return f"{problem[0]}+{problem[1]}="


def answer(problem: tuple[int, int]) -> str:
    """The text of the right answer, ``46``."""
    return str(problem[0] + problem[1])


def is_correct(prompt_text: str, answer_text: str) -> bool:
    """Whether an answer is exactly right.

    Args:
        prompt_text: A problem as :func:`prompt` writes it.
        answer_text: An answer; leading zeros, signs and spaces are wrong.

    Returns:
        True if ``answer_text`` is the sum, in plain decimal digits.

    Raises:
        ValueError: If ``prompt_text`` is not a problem.
    """
    parts = prompt_text.removesuffix("=").split("+")
    if not prompt_text.endswith("=") or len(parts) != 2 or not all(p.isdecimal() for p in parts):
        raise ValueError(f"prompt_text: got {prompt_text!r}, expected a problem such as '12+34='")
    return answer_text == str(int(parts[0]) + int(parts[1]))
