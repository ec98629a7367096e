# SPDX-License-Identifier: Apache-2.0
"""All losses under the module path they have in NeMo RL. Each family has its own file."""

from nemo_rl_ref.algorithms.loss._clipped_pg import (
    ClippedPGLossConfig,
    ClippedPGLossDataDict,
    ClippedPGLossFn,
)
from nemo_rl_ref.algorithms.loss._distillation import (
    DistillationLossConfig,
    DistillationLossDataDict,
    DistillationLossFn,
    DraftCrossEntropyLossConfig,
    DraftCrossEntropyLossDataDict,
    DraftCrossEntropyLossFn,
)
from nemo_rl_ref.algorithms.loss._nll import NLLLossFn
from nemo_rl_ref.algorithms.loss._preference import (
    DPOLossConfig,
    DPOLossDataDict,
    DPOLossFn,
    PreferenceLossDataDict,
    PreferenceLossFn,
)
from nemo_rl_ref.algorithms.loss._value import MseValueLossConfig, MseValueLossFn

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
    "DraftCrossEntropyLossConfig",
    "DraftCrossEntropyLossDataDict",
    "DraftCrossEntropyLossFn",
    "MseValueLossConfig",
    "MseValueLossFn",
    "NLLLossFn",
    "PreferenceLossDataDict",
    "PreferenceLossFn",
]
