# SPDX-License-Identifier: Apache-2.0
"""Losses and the tensor functions they are made of, under NeMo RL's module paths."""
