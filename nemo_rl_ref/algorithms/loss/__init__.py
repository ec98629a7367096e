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
from nemo_rl_ref.algorithms.loss.utils import prepare_loss_input
from nemo_rl_ref.algorithms.loss.wrapper import (
    DraftLossWrapper,
    SequencePackingLossWrapper,
    wrap_loss_fn_with_input_preparation,
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
    "DraftLossWrapper",
    "MseValueLossConfig",
    "MseValueLossFn",
    "NLLLossFn",
    "PreferenceLossDataDict",
    "PreferenceLossFn",
    "SequencePackingLossWrapper",
    "prepare_loss_input",
    "wrap_loss_fn_with_input_preparation",
]
