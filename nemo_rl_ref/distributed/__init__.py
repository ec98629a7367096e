# SPDX-License-Identifier: Apache-2.0
"""The batch container and the collectives it uses, under NeMo RL's module paths."""
