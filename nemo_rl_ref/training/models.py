# SPDX-License-Identifier: Apache-2.0
"""Policies, reward models and value models: loaded from a Hugging Face name or path for training.

Weights in pickle files are refused. A value model is one number a token on top of a language
model's body; in NeMo RL it is a worker around such a model, and the shift by one token is its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


def load_policy(model_name: str | Path, **kwargs: Any) -> Any:
    """Load a causal language model for training.

    Args:
        model_name: Name or path of a Hugging Face model.
        **kwargs: Passed to ``AutoModelForCausalLM.from_pretrained``. ``dtype`` is float32 if
            not given. ``use_safetensors`` is always true: weights in pickle files are refused.

    Returns:
        The model, a ``torch.nn.Module`` in training mode, on the CPU unless ``kwargs`` say
        otherwise.
    """
    from transformers import AutoModelForCausalLM

    kwargs.setdefault("dtype", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(str(model_name), use_safetensors=True, **kwargs)
    return model.train()


def load_reward_model(model_name: str | Path, pad_token_id: int) -> Any:
    """Load a model with one output a sequence, in float32 and training mode.

    Args:
        model_name: Name or path of a Hugging Face model.
        pad_token_id: The reward is read at the last token that is not this one. Where padding is
            done with the end token, that is the token before it, as in NeMo RL.
    """
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        str(model_name), num_labels=1, dtype=torch.float32, use_safetensors=True
    )
    model.config.pad_token_id = pad_token_id
    return model.train()


def load_value_model(model_name: str | Path) -> Any:
    """Load a value model for training.

    Args:
        model_name: Name or path of a Hugging Face model. The head of one that has none is drawn
            with PyTorch's global generator.

    Returns:
        A ``…ForTokenClassification`` with one label, float32, without dropout before the head,
        in training mode.
    """
    from transformers import AutoConfig, AutoModelForTokenClassification

    config = AutoConfig.from_pretrained(str(model_name), num_labels=1)
    config.classifier_dropout = 0.0
    model = AutoModelForTokenClassification.from_pretrained(
        str(model_name), config=config, use_safetensors=True, dtype=torch.float32
    )
    return model.train()


def token_values(model: Any, data: BatchedDataDict[Any]) -> Tensor:
    """The value of the state before each token.

    Args:
        model: From :func:`load_value_model`.
        data: ``input_ids`` int64 (B, S), padded on the right.

    Returns:
        Float32 (B, S), in units of reward: column t comes from the tokens before t, and column 0,
        before which there are none, is 0.
    """
    values = model(input_ids=data["input_ids"], use_cache=False).logits.squeeze(-1).float()
    return torch.nn.functional.pad(values[:, :-1], (1, 0))
