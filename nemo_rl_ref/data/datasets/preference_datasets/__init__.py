# SPDX-License-Identifier: Apache-2.0
"""Preference data: a context and completions ranked by preference."""

from __future__ import annotations

from typing import Any

from nemo_rl_ref.data.datasets.preference_datasets.binary_preference_dataset import (
    BinaryPreferenceDataset,
)
from nemo_rl_ref.data.datasets.preference_datasets.preference_dataset import PreferenceDataset
from nemo_rl_ref.data.datasets.utils import build_dataset

#: The names that ``dataset_name`` can have.
DATASET_REGISTRY = {
    "BinaryPreferenceDataset": BinaryPreferenceDataset,
    "PreferenceDataset": PreferenceDataset,
}


def load_preference_dataset(data_config: dict[str, Any]) -> Any:
    """Load the dataset of an entry such as ``data.train``.

    NeMo RL also has classes for HelpSteer3 and Tülu 3 and imports any other by its dotted name;
    neither is done here.

    Args:
        data_config: ``dataset_name`` and the arguments of its class; ``prompt_file``.

    Returns:
        The dataset, with the attribute ``task_spec``.

    Raises:
        ValueError: If there is no such dataset here. The message lists those there are.
    """
    return build_dataset(data_config, DATASET_REGISTRY)


__all__ = [
    "DATASET_REGISTRY",
    "BinaryPreferenceDataset",
    "PreferenceDataset",
    "load_preference_dataset",
]
