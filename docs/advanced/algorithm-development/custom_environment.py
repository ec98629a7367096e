# SPDX-License-Identifier: Apache-2.0
"""A function from texts to a reward, as an environment of NeMo RL.

Stands beside run_custom_grpo.py in the examples/ folder of a NeMo RL checkout.
"""

import ray
import torch
from custom_grpo import partial_credit
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn


@ray.remote
class CustomEnvironment(EnvironmentInterface):
    """Scores every response with `custom_grpo.partial_credit`; a response ends the episode.

    Args:
        cfg: The section `env.partial_credit` of the configuration.
    """

    def __init__(self, cfg):
        self.cfg = cfg

    def step(self, message_log_batch, metadata):
        """Score a batch: messages in, rewards out."""
        rewards = []
        for messages, info in zip(message_log_batch, metadata, strict=True):
            text = {message["role"]: message["content"] for message in messages}
            rewards.append(partial_credit(text["user"], text["assistant"], info["ground_truth"]))
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": ""} for _ in rewards],
            metadata=metadata,
            next_stop_strings=[None] * len(rewards),
            rewards=torch.tensor(rewards),
            terminateds=torch.ones(len(rewards)),
            answers=None,
        )

    def global_post_process_and_metrics(self, batch):
        """Metrics of a whole batch, for callers that want them."""
        return batch, {"mean_reward": batch["rewards"].float().mean().item()}

    def shutdown(self):
        """Nothing to release."""
