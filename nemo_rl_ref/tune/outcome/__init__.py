# SPDX-License-Identifier: Apache-2.0
"""What a finished study gives: the best configuration, its re-evaluation, a report."""
