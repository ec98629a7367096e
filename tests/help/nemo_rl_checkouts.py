# SPDX-License-Identifier: Apache-2.0
"""Small checkouts of something that looks like NeMo RL, with one commit or several."""

import subprocess
import textwrap


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder, files, gone=()):
    """Write files, dedented, remove others, commit all; returns the commit's hash."""
    if not (folder / ".git").exists():
        folder.mkdir(parents=True, exist_ok=True)
        git(folder, "init", "-q")
    for name in gone:
        (folder / name).unlink()
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text), encoding="utf-8")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "a", "--allow-empty")
    return git(folder, "rev-parse", "HEAD")
