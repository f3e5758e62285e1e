#!/usr/bin/env bash
# Set-up, lint, types and the whole test-suite. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh dev
ruff check .
ruff format --check .
if [ $# -gt 0 ]; then
  mypy
  exec python -m pytest "$@"
fi
# Small tensors gain nothing from threads, so files share the cores; ranks of one file wait for each other, and leave
# a core to those of another.
export OMP_NUM_THREADS=1
python -m pytest -n auto --dist loadfile tests/unit tests/golden tests/integrations tests/packaging tests/fuzz
mypy &  # beside ranks, which wait for each other a lot
types=$!
python -m pytest -n 2 --dist loadfile tests/dist
wait "$types"
exec python -m pytest -n 2 tests/docs  # every command of the documents, at a small size
