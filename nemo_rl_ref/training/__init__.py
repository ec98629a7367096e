# SPDX-License-Identifier: Apache-2.0
"""One update, the loop around it, and what a run needs to go on."""
