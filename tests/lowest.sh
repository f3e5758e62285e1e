#!/usr/bin/env bash
# The unit tests with the lowest versions that setup.cfg promises, in .venv-lowest. Not part of .ci/run: the lowest torch
# comes with CUDA (4 GB), and the tests take 9 minutes. Arguments go to pytest.
# Tests skip there what these versions cannot do, and say why: mixtures of experts (transformers before 5.13 calls an
# operation that torch 2.8 has for Hopper GPUs only), reset() of a cache of token routers (transformers before 5.18).
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv-lowest/bin/python
[ -x "$python" ] || "${PYTHON:-python3}" -m venv .venv-lowest
"$python" -m pip install -q --disable-pip-version-check uv
# Of the tools that only the tests need, recent versions; numpy 2 for the pyarrow that datasets brings.
"$python" -m uv pip install -q --python "$python" --resolution lowest-direct \
  -e ".[train,eval,report,bench,4bit,wandb,mlflow,trackio]" "numpy>=2" \
  "pytest>=9" "pytest-timeout>=2.3" "pytest-xdist>=3.6" "hypothesis>=6.130" "packaging>=24"
"$python" -m uv pip list --python "$python" | grep -E '^(torch|transformers|deepspeed|datasets|huggingface-hub|numpy) '
export OMP_NUM_THREADS=1
exec "$python" -m pytest -n auto --dist loadfile "${@:-tests/unit}"
