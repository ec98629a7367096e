# SPDX-License-Identifier: Apache-2.0
"""What a notebook shows: figures, tables of tokens."""
