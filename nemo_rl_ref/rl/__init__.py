# SPDX-License-Identifier: Apache-2.0
"""Prompts, responses, rewards, advantages: the trainer of GRPO and PPO."""
