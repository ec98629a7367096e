# SPDX-License-Identifier: Apache-2.0
"""All losses under the module path they have in NeMo RL. Each family has its own file."""

from nemo_rl_ref.algorithms.loss._nll import NLLLossFn
from nemo_rl_ref.algorithms.loss._preference import (
    DPOLossConfig,
    DPOLossDataDict,
    DPOLossFn,
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
