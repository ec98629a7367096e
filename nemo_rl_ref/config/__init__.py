# SPDX-License-Identifier: Apache-2.0
"""A run's YAML: which keys there are, what they mean here, and how they are read."""
