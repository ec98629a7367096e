# SPDX-License-Identifier: Apache-2.0
"""Advantage estimators: from rewards to one number a token, before the loss is computed.

An estimator is built from its configuration and the loss's, and has one method,
``compute_advantage``. It sees the whole batch at once: group means and normalization do not
commute with micro-batches. Here all tensors are (B, S) with entry t belonging to token t.
"""

from nemo_rl_ref.algorithms._gae import GeneralizedAdvantageEstimator
from nemo_rl_ref.algorithms._group_advantages import (
    AdvEstimatorConfig,
    GDPOAdvantageEstimator,
    GRPOAdvantageEstimator,
)
from nemo_rl_ref.algorithms._token_advantages import (
    OPDAdvantageEstimator,
    RawRewardAdvantageEstimator,
    ReinforcePlusPlusAdvantageEstimator,
)

__all__ = [
    "AdvEstimatorConfig",
    "GDPOAdvantageEstimator",
    "GRPOAdvantageEstimator",
    "GeneralizedAdvantageEstimator",
    "OPDAdvantageEstimator",
    "RawRewardAdvantageEstimator",
    "ReinforcePlusPlusAdvantageEstimator",
]
