# SPDX-License-Identifier: Apache-2.0
"""Loss functions. The protocol they follow is in ``algorithms.loss.interfaces``."""

from nemo_rl_ref.algorithms.loss.loss_functions import (
    DPOLossConfig,
    DPOLossDataDict,
    DPOLossFn,
    NLLLossFn,
    PreferenceLossDataDict,
    PreferenceLossFn,
)

__all__ = [
    "DPOLossConfig",
    "DPOLossDataDict",
    "DPOLossFn",
    "NLLLossFn",
    "PreferenceLossDataDict",
    "PreferenceLossFn",
]
