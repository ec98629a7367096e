#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Finds a Python that this project runs on and lets it bring .venv up to date (.ci/venv.py).
#
# PYTHON names the interpreter. Without it, the one that made .venv is kept; without a .venv the
# first of python3, python3.13, python3.12, python3.11 and python that fits is taken.
# Prints one line and exits with 1 when none fits. Run from the top of the repository.

needs="this project needs Python 3.11, 3.12 or 3.13"

# Runs on every Python since 2.7. Exit status: 0 fits, 3 wrong version, 4 cannot make environments.
probe='
import sys
v = sys.version_info
sys.stdout.write("%d.%d.%d" % v[:3])
if not (3, 11) <= v[:2] <= (3, 13):
    sys.exit(3)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(4)
'

# Sets `problem` to what is wrong with the interpreter "$1"; empty means that it fits.
examine() {
    problem=
    version=$("$1" -c "$probe" 2>/dev/null)
    case $? in
    0) [ -n "$version" ] || problem="$1 is no Python" ;;
    3) problem="$1 is Python $version" ;;
    4) problem="$1 (Python $version) has no ensurepip module, which a virtual environment needs; \
on Debian or Ubuntu: apt install python3-venv (or python${version%.*}-venv)" ;;
    *)
        why=$("$1" -c "" 2>&1 | sed -n 1p)
        problem="$1 does not run${why:+ ($why)}"
        ;;
    esac
}

if [ -n "$PYTHON" ]; then
    examine "$PYTHON"
    if [ -n "$problem" ]; then
        echo "error: PYTHON=$problem; $needs" >&2
        exit 1
    fi
    exec "$PYTHON" .ci/venv.py
fi

problems=
for candidate in .venv/bin/python python3 python3.13 python3.12 python3.11 python; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    examine "$candidate"
    [ -n "$problem" ] || exec "$candidate" .ci/venv.py
    problems="${problems:+$problems; }$problem"
done
echo "error: ${problems:-no Python found}; $needs: install one, or name it with PYTHON=/path/to/python" >&2
exit 1
