# SPDX-License-Identifier: Apache-2.0
"""Preference data: a context and completions ranked by preference."""

from nemo_rl_ref.data.datasets.preference_datasets.binary_preference_dataset import (
    BinaryPreferenceDataset,
)
from nemo_rl_ref.data.datasets.preference_datasets.preference_dataset import PreferenceDataset

__all__ = ["BinaryPreferenceDataset", "PreferenceDataset"]
