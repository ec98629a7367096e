# SPDX-License-Identifier: Apache-2.0
"""Does a loss keep the promises that distributed training needs?

In Python, ``print(check_loss(loss_fn))``. On the command line, the pairs building the loss's
configuration::

    python -m nemo_rl_ref.contract my_loss.py:MyLoss sft_loss_weight=0.1
    python -m nemo_rl_ref.contract nemo_rl_ref.algorithms.loss:DPOLossFn sft_loss_weight=0.1
"""

from nemo_rl_ref.contract._batches import Batch
from nemo_rl_ref.contract._causes import Cause
from nemo_rl_ref.contract._check import PROMISES, BatchMaker, check_loss, check_losses
from nemo_rl_ref.contract._report import Entry, Failure, Report

__all__ = [
    "PROMISES",
    "Batch",
    "BatchMaker",
    "Cause",
    "Entry",
    "Failure",
    "Report",
    "check_loss",
    "check_losses",
]
