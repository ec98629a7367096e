# SPDX-License-Identifier: Apache-2.0
"""A language model small enough to train while you wait, and a task it can be graded on.

The model is a Qwen3 of about 225,000 parameters with a 16-token vocabulary. The task is the sum
of two numbers below 100, so every answer can be checked. The shipped weights are the result of a
short supervised run that stops while the model is still often wrong: there is something left to
learn. ``python -m nemo_rl_ref.tiny.make`` makes every file in ``assets/`` again.

:func:`load_policy` and :func:`load_tokenizer` take the name or path of any Hugging Face causal
language model instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_rl_ref.training import models

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "addition-qwen3"
TRAIN_PAIRS = ASSETS / "addition-preferences.train.jsonl"
VALIDATION_PAIRS = ASSETS / "addition-preferences.validation.jsonl"
TRAIN_PROBLEMS = ASSETS / "addition-problems.train.jsonl"
VALIDATION_PROBLEMS = ASSETS / "addition-problems.validation.jsonl"
RANKED_VALIDATION_PAIRS = ASSETS / "addition-preferences.validation.ranked.jsonl"


def load_policy(model_name: str | Path | None = None, **kwargs: Any) -> Any:
    """Load a causal language model for training: the shipped one if no name is given.

    Args:
        model_name: Name or path of a Hugging Face model.
        **kwargs: See `nemo_rl_ref.training.models.load_policy`.

    Returns:
        The model, a ``torch.nn.Module`` in training mode.
    """
    return models.load_policy(model_name or MODEL, **kwargs)


def load_tokenizer(model_name: str | Path | None = None) -> Any:
    """Load a tokenizer.

    Args:
        model_name: Name or path of a Hugging Face model; the shipped one if not given.

    Returns:
        The tokenizer. Where it has no pad token, the end token is used.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_name or MODEL))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
