# SPDX-License-Identifier: Apache-2.0
"""What touches a disk: atomic writes, checksums, records of data files, metrics files."""
