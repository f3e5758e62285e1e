#!/usr/bin/env bash
# Set-up, lint, types and the whole test-suite. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh dev
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
