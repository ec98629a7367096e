# SPDX-License-Identifier: Apache-2.0
"""Where trials run besides this process: a Ray cluster, or a checkout of NeMo RL."""
