#!/bin/sh
# Makes .venv with the pinned dependencies; safe to run again. Usage: sh launch/setup.sh [PYTHON]
set -eu
python=${1:-python3}

fail() {
    printf 'set-up failed: %s\n' "$1" >&2
    exit 1
}

[ ! -L .venv ] ||
    fail ".venv is a link to $(readlink .venv), whose packages would now belong to this copy of the project, too. Remove the link (rm .venv) and repeat the command, which then makes an environment of its own"
command -v "$python" >/dev/null ||
    fail "$python not found. Install Python 3.11 or newer (Debian, Ubuntu: apt install python3 python3-venv), or name one: make setup PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old. Install Python 3.11 or newer and name it: make setup PYTHON=python3.12"
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear .venv ||
        fail "$python has no working venv module (Debian, Ubuntu: apt install python3-venv)"
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv ||
    fail "pip could not install uv. Is a package registry reachable (pip's settings, a proxy)?"
# Without uv: .venv/bin/python -m pip install --constraint constraints.txt --editable '.[test]'
# Compiled now, in a minute: where .venv is read-only, each process would otherwise compile all of its imports. uv reads
# this setting; 0 leaves it to the first import of each module, of which a short use needs a fraction.
export UV_COMPILE_BYTECODE="${UV_COMPILE_BYTECODE:-1}"
echo "Installing the pinned packages (7 GB with torch): some minutes"
# A terminal shows uv's progress, a log its errors alone.
if [ -t 2 ]; then set --; else set -- --quiet; fi
.venv/bin/uv pip install "$@" --python .venv/bin/python --constraint constraints.txt --editable '.[test]' ||
    fail "the packages of pyproject.toml could not be installed (they take about 7 GB: is the disk full?)"
