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

from nemo_rl_ref.algorithms.utils import get_tokenizer
from nemo_rl_ref.config.sections import TokenizerConfig
from nemo_rl_ref.distributed.batched_data_dict import BatchedDataDict


def load_tokenizer(section: TokenizerConfig) -> Any:
    """Load the tokenizer of ``policy.tokenizer``.

    Raises:
        ValueError: If there is none. The message names the key.
    """
    try:
        return get_tokenizer(section.given())
    except Exception as error:  # of transformers, tokenizers or the hub
        if str(error).startswith("policy.tokenizer"):
            raise
        raise ValueError(f"policy.tokenizer.name: {_why(section.name, error)}") from error


def load_policy(
    model_name: str | Path,
    *,
    key: str = "policy.model_name",
    tokenizer: Any = None,
    **kwargs: Any,
) -> Any:
    """Load a causal language model for training.

    Args:
        model_name: Name or path of a Hugging Face model.
        key: What the name comes from, for messages.
        tokenizer: If given, the model must have an embedding for each of its tokens.
        **kwargs: Passed to ``AutoModelForCausalLM.from_pretrained``. ``dtype`` is float32 if
            not given. ``use_safetensors`` is always true: weights in pickle files are refused.

    Returns:
        The model, a ``torch.nn.Module`` in training mode, on the CPU unless ``kwargs`` say
        otherwise.

    Raises:
        ValueError: If there is no such model, a weight is missing or of another shape, or the
            tokenizer does not fit.
    """
    from transformers import AutoModelForCausalLM

    kwargs.setdefault("dtype", torch.float32)
    return _load(AutoModelForCausalLM, model_name, key, tokenizer, **kwargs)


def load_reward_model(model_name: str | Path, pad_token_id: int, tokenizer: Any = None) -> Any:
    """Load a model with one output a sequence, in float32 and training mode.

    Args:
        model_name: Name or path of a Hugging Face model. The output of one that has none is drawn
            with PyTorch's global generator.
        pad_token_id: The reward is read at the last token that is not this one. Where padding is
            done with the end token, that is the token before it, as in NeMo RL.
        tokenizer: As for `load_policy`.

    Raises:
        ValueError: As `load_policy`.
    """
    from transformers import AutoModelForSequenceClassification

    model = _load(
        AutoModelForSequenceClassification,
        model_name,
        "policy.model_name",
        tokenizer,
        num_labels=1,
        dtype=torch.float32,
    )
    model.config.pad_token_id = pad_token_id
    return model


def load_value_model(model_name: str | Path, tokenizer: Any = None) -> Any:
    """Load a value model for training.

    Args:
        model_name: Name or path of a Hugging Face model. The head of one that has none is drawn
            with PyTorch's global generator.
        tokenizer: As for `load_policy`.

    Returns:
        A ``…ForTokenClassification`` with one label, float32, without dropout before the head,
        in training mode.

    Raises:
        ValueError: As `load_policy`.
    """
    from transformers import AutoConfig, AutoModelForTokenClassification

    key = "value.model_name"
    try:
        config = AutoConfig.from_pretrained(str(model_name), num_labels=1)
    except Exception as error:  # of transformers or the hub
        raise ValueError(f"{key}: {_why(model_name, error)}") from error
    config.classifier_dropout = 0.0
    kind, kwargs = AutoModelForTokenClassification, {"config": config, "dtype": torch.float32}
    return _load(kind, model_name, key, tokenizer, **kwargs)


def _load(kind: Any, name: str | Path, key: str, tokenizer: Any, **kwargs: Any) -> Any:
    """``from_pretrained``, with one error for whatever is wrong with the folder."""
    kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True}
    try:
        model, found = kind.from_pretrained(str(name), output_loading_info=True, **kwargs)
    except Exception as error:  # of transformers, safetensors or the hub
        raise ValueError(f"{key}: {_why(name, error)}") from error
    body, head = f"{model.base_model_prefix}.", kind.__name__.removeprefix("AutoModel")
    has_head = any(text.endswith(head) for text in model.config.architectures or ())
    missing = [weight for weight in found["missing_keys"] if has_head or weight.startswith(body)]
    shapes = [f"{weight} {tuple(a)} for {tuple(b)}" for weight, a, b in found["mismatched_keys"]]
    for what, names in (("has no", missing), ("has weights of other shapes:", shapes)):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (
                f" and {len(names) - 5} more" * (len(names) > 5)
            )
            raise ValueError(
                f"{key}: {name} {what} {shown}. They would be random: it is not a whole "
                f"{type(model).__name__}"
            )
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and (last := max(tokenizer.get_vocab().values())) >= rows:
        raise ValueError(
            f"policy.tokenizer.name: its tokens go up to {last} "
            f"({tokenizer.convert_ids_to_tokens(last)!r}), and {key} {name} has embeddings for "
            f"{rows}; take the model's own tokenizer, or save the model after "
            f"resize_token_embeddings({last + 1})"
        )
    return model.train()


def _why(name: str | Path, error: Exception) -> str:
    """What is wrong with a folder that cannot be loaded, or with a name that is none."""
    from safetensors import SafetensorError, safe_open

    folder, text = Path(name), " ".join(str(error).split())[:400]
    if not folder.exists():
        local = folder.is_absolute() or str(name).startswith((".", "~"))
        from_hub = "" if local else f", and from the hub it cannot be loaded: {text}"
        return f"there is no folder {name}{from_hub}"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as problem:
            return f"{file}: cannot be read: {problem}"
    return f"{name}: cannot be loaded: {text}"


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
