# SPDX-License-Identifier: Apache-2.0
"""Loss functions. The protocol they follow is in ``algorithms.loss.interfaces``."""

from nemo_rl_ref.algorithms.loss.loss_functions import (
    ClippedPGLossConfig,
    ClippedPGLossDataDict,
    ClippedPGLossFn,
    DistillationLossConfig,
    DistillationLossDataDict,
    DistillationLossFn,
    DPOLossConfig,
    DPOLossDataDict,
    DPOLossFn,
    DraftCrossEntropyLossFn,
    MseValueLossConfig,
    MseValueLossFn,
    NLLLossFn,
    PreferenceLossDataDict,
    PreferenceLossFn,
)

__all__ = [
    "ClippedPGLossConfig",
    "ClippedPGLossDataDict",
    "ClippedPGLossFn",
    "DPOLossConfig",
    "DPOLossDataDict",
    "DPOLossFn",
    "DistillationLossConfig",
    "DistillationLossDataDict",
    "DistillationLossFn",
    "DraftCrossEntropyLossFn",
    "MseValueLossConfig",
    "MseValueLossFn",
    "NLLLossFn",
    "PreferenceLossDataDict",
    "PreferenceLossFn",
]
