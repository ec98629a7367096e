# SPDX-License-Identifier: Apache-2.0
"""PPO's value model: one number a token on top of a language model's body.

NeMo RL's value model is a worker around such a model; the shift by one token is its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


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
