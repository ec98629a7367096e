# SPDX-License-Identifier: Apache-2.0
"""Data of prompts and answers, for supervised training and rollouts."""

from __future__ import annotations

from typing import Any

from nemo_rl_ref.data.datasets.response_datasets.oai_format_dataset import OpenAIFormatDataset
from nemo_rl_ref.data.datasets.response_datasets.response_dataset import ResponseDataset
from nemo_rl_ref.data.datasets.utils import build_dataset

#: The names that ``dataset_name`` can have.
DATASET_REGISTRY = {"ResponseDataset": ResponseDataset, "openai_format": OpenAIFormatDataset}


def load_response_dataset(data_config: dict[str, Any]) -> Any:
    """Load the dataset of an entry such as ``data.train``.

    NeMo RL also has a class for each of some thirty published datasets and imports any other by
    its dotted name; neither is done here.

    Args:
        data_config: ``dataset_name`` and the arguments of its class; ``prompt_file`` and
            ``system_prompt_file``.

    Returns:
        The dataset, with the attribute ``task_spec``.

    Raises:
        ValueError: If there is no such dataset here. The message lists those there are.
    """
    return build_dataset(data_config, DATASET_REGISTRY)


__all__ = ["DATASET_REGISTRY", "OpenAIFormatDataset", "ResponseDataset", "load_response_dataset"]
