# SPDX-License-Identifier: Apache-2.0
"""A folder for ``sys.path``: in it, ``nemo_rl`` is this package."""
