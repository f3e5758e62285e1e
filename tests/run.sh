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
# a core to those of another. Files that take minutes begin first: the documents, whose every command runs at a small
# size, and the ranks.
export OMP_NUM_THREADS=1
mypy &
types=$!
python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder tests/docs tests/dist tests/unit tests/golden \
  tests/integrations tests/packaging tests/fuzz || failed=$?
wait "$types"
exit "${failed:-0}"
