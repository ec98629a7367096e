# SPDX-License-Identifier: Apache-2.0
"""What a run needs besides the algorithm, under NeMo RL's module paths."""
