# SPDX-License-Identifier: Apache-2.0
"""Datasets in NeMo RL's formats."""
