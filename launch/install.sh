#!/usr/bin/env bash
# launch/install.sh VENV EXTRAS: make the virtual environment VENV if it is not there, and install this project
# into it with EXTRAS (e.g. "test,lint", or ""). PYTHON chooses the interpreter. Versions are the locked ones where
# requirements/ has a file for this Python, else the newest that pyproject.toml allows.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 extras=$2

# It must run, be new enough and able to make environments; a pyenv shim may do none of these.
usable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

if ! { usable "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
  found=""
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3 python3.13 python3.14; do
    if usable "$candidate"; then
      found=$candidate
      break
    elif [ "$candidate" = "${PYTHON:-}" ]; then
      break
    fi
  done
  if [ -z "$found" ]; then
    echo "error: ${PYTHON:+$PYTHON is }no usable Python >= 3.11 with the venv module." >&2
    echo "Install one (Debian, Ubuntu: apt install python3 python3-venv)," \
      "or name it: make ... PYTHON=/path/to/python3.11" >&2
    exit 1
  fi
  echo "Making $venv with $("$found" --version)"
  rm -rf "$venv"
  "$found" -m venv "$venv"
fi

lock=requirements/py$("$venv/bin/python" -c 'import sys; print(*sys.version_info[:2], sep="")').txt
if [ ! -f "$lock" ]; then
  echo "No $lock: installing the newest versions that pyproject.toml allows"
  lock=""
fi
echo "Installing into $venv; the first time this takes some minutes"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${lock:+-c "$lock"} -e ".${extras:+[$extras]}"
