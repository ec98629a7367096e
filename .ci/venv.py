# SPDX-License-Identifier: Apache-2.0
"""Brings `.venv` up to date: run by `.ci/venv.sh`, from the top of the repository.

The environment is made for one Python version, one content of the requirements file and one
folder. These three are its key. The key is written into `.venv` after everything is installed;
a `.venv` with another key, or left without one by an installation cut short, is made afresh.
With the right key nothing is done and no network is needed.

The environment variable REQUIREMENTS names another requirements file (default: requirements.txt).
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

VENV = Path(".venv")
OLD = Path(".venv.old")
KEY_FILE = VENV / "made-by-make.json"

# A user's pip settings that would install elsewhere or not at all. An option overrules pip's
# configuration files and the environment; an empty value counts as not set.
PIP_INSTALL = ["-m", "pip", "install", "--no-input", "--no-user", "--target="]
PIP_ENVIRONMENT = dict.fromkeys(
    ["PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_DRY_RUN", "PIP_NO_DEPS"], ""
)
PIP_ENVIRONMENT |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def wanted_key(requirements: Path) -> dict[str, str]:
    """What the environment has to be made for."""
    return {
        "python": platform.python_version(),
        "requirements": hashlib.sha256(requirements.read_bytes()).hexdigest(),
        "folder": str(Path.cwd()),
    }


def present_key() -> dict[str, str] | None:
    """The key of a working `.venv`; `{}` for a broken one; None if make did not make it."""
    try:
        key = json.loads(KEY_FILE.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:  # empty, or damaged
        return {}
    python = VENV / "bin" / "python"  # may have been removed, or be empty, which a shell runs
    works = os.access(python, os.X_OK) and python.stat().st_size > 0
    return key if works and isinstance(key, dict) else {}


def write_key(key: dict[str, str]) -> None:
    """Writes the key in one step, so that it is never found half written."""
    temporary = KEY_FILE.with_suffix(".tmp")
    temporary.write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, KEY_FILE)


def clear(present: dict[str, str] | None, wanted: dict[str, str]) -> None:
    """Removes a `.venv` that make made, and says why; refuses to remove anything else."""
    if VENV.is_symlink() or not VENV.is_dir() or (present is None and any(VENV.iterdir())):
        sys.exit("error: .venv is here but make did not make it; move it away and try again")
    changed = [name for name in wanted if present and present.get(name) != wanted[name]]
    reason = f"changed: {', '.join(changed)}" if changed else "it is unfinished or broken"
    print(f"Removing .venv ({reason})", flush=True)
    shutil.rmtree(OLD, ignore_errors=True)
    os.replace(VENV, OLD)  # in one step: an interruption leaves no half of a .venv
    shutil.rmtree(OLD)


def make(requirements: Path, lock: int) -> None:
    """Makes `.venv` and installs the requirements into it, holding the lock's descriptor."""
    VENV.mkdir()
    write_key({})
    # The interpreter behind an active environment, and behind the .venv that was just removed.
    base = getattr(sys, "_base_executable", None) or sys.executable
    print(f"Making .venv with Python {platform.python_version()} ({base})", flush=True)
    subprocess.run([base, "-m", "venv", str(VENV)], check=True)

    # pip inherits the lock: should this process be killed, the next make waits until pip ends.
    print(f"Installing {requirements} into .venv", flush=True)
    python = str(VENV / "bin" / "python")
    pip = [python, *PIP_INSTALL, "-r", str(requirements)]
    subprocess.run(pip, check=True, env=os.environ | PIP_ENVIRONMENT, pass_fds=[lock])

    # The repository itself, importable from any working directory: notebooks run in their own.
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    found = subprocess.run(where, check=True, text=True, capture_output=True)
    packages = Path(found.stdout.strip())
    up = os.path.relpath(Path.cwd(), packages.resolve())
    (packages / "nemo_rl_ref.pth").write_text(up + "\n", encoding="utf-8")


def lock_or_wait(lock: int) -> None:
    """Takes the lock, which ends with the processes that hold it, however they end."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Waiting for another make to finish with .venv", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def main() -> None:
    """Returns once `.venv` has the wanted key."""
    requirements = Path(os.environ.get("REQUIREMENTS") or "requirements.txt")
    if not requirements.is_file():
        sys.exit(f"error: REQUIREMENTS={requirements} is not a file")
    wanted = wanted_key(requirements)
    if present_key() == wanted:
        return
    with open(".venv.lock", "a") as lock:
        lock_or_wait(lock.fileno())
        present = present_key()  # another make may have finished while this one waited
        if present == wanted:
            return
        if os.path.lexists(VENV):
            clear(present, wanted)
        make(requirements, lock.fileno())
        write_key(wanted)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        name = error.cmd[2] if error.cmd[1] == "-m" else error.cmd[0]
        sys.exit(f"error: {name} failed, see above; .venv is unfinished, the next make redoes it")
    except OSError as error:
        sys.exit(f"error: .venv cannot be made: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the next make starts again")
