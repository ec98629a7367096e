# SPDX-License-Identifier: Apache-2.0
"""A loss or a reward of one's own, packed as a folder that NeMo RL runs.

.. code-block:: sh

    python -m nemo_rl_ref.export my_loss.py:MyLoss margin=0.5 --algorithm dpo --to my_project
    python -m nemo_rl_ref.export --env my_reward.py:reward --algorithm grpo --to my_project

The folder holds the code with NeMo RL's import prefix, a launcher that puts it into NeMo RL's own
``examples/run_dpo.py``, a YAML file on top of NeMo RL's with the keys of the loss, a test that runs
`nemo_rl_ref.contract`, and a README with the command. What cannot be carried is refused, with file
and line, before anything is written.
"""

from pathlib import Path

#: A folder to append to ``sys.path``: where NeMo RL is not installed, ``nemo_rl`` is this package.
STAND_IN = str(Path(__file__).parent / "stand_in")
