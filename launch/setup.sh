#!/usr/bin/env bash
# Makes .venv with pinned packages, once; later calls return at once. Source it:
# . launch/setup.sh [EXTRAS]   a list of the extras in setup.cfg, train,eval without it
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:-train,eval}
stamp="$root/.venv/.megaskip-$(cat "$root/constraints.txt" "$root/setup.cfg" | cksum | cut -d' ' -f1)-$extras"
if [ ! -f "$stamp" ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "megaskip needs Python 3.11 or newer, $python is $("$python" -V)" >&2; exit 1; }
  echo "installing into $root/.venv (a few minutes, once)"
  [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
  # The pinned torch comes first: an unpinned one would pull packages for another platform.
  "$root/.venv/bin/python" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" torch setuptools wheel
  "$root/.venv/bin/python" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" \
    --no-build-isolation -e "$root[$extras]"
  touch "$stamp"
fi
export PATH="$root/.venv/bin:$PATH" VIRTUAL_ENV="$root/.venv"
