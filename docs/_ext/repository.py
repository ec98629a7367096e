# SPDX-License-Identifier: Apache-2.0
"""Where this repository can be had from: by CI's environment, else by git; nowhere if neither knows."""

from __future__ import annotations

import os
import re
import subprocess
from functools import lru_cache
from pathlib import Path


def web_address(remote: str) -> str | None:
    """Return the https address of a remote on a server, None for a folder.

    Args:
        remote: as git has it, ``git@host:owner/name.git`` or an https or ssh address.
    """
    found = re.fullmatch(
        r"(?:https?://|ssh://)?(?:[^@/]+@)?([\w.-]+\.\w+)(?::\d+)?[:/](.+?)(?:\.git)?/?", remote
    )
    return f"https://{found[1]}/{found[2]}" if found else None


def git(root: Path, *arguments: str) -> str | None:
    """Return what a git command prints, None where it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


@lru_cache
def address(root: Path) -> str | None:
    """Return the repository's https address, None where nothing names it."""
    server, name = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    if server and name:
        return f"{server}/{name}"
    remote = git(root, "remote", "get-url", "origin")
    return web_address(remote) if remote else None


@lru_cache
def commit(root: Path) -> str | None:
    """Return the commit that is checked out, None outside git."""
    return os.environ.get("GITHUB_SHA") or git(root, "rev-parse", "HEAD")
