#!/usr/bin/env bash
# Exported folders in vLLM on a CPU, in .venv-serving (3 GB, made once). Not part of .ci/run: it takes 20 minutes on two
# cores, and more the first time. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv-serving/bin/python
stamp=.venv-serving/.megaskip-$(cat tests/serving/requirements.txt setup.cfg | cksum | cut -d' ' -f1)
if [ ! -f "$stamp" ]; then
  [ -x "$python" ] || "${PYTHON:-python3}" -m venv .venv-serving
  "$python" -m pip install -q --disable-pip-version-check -r tests/serving/requirements.txt "setuptools>=77" wheel
  # They are built for another torch and do not load beside this one; text models do without.
  "$python" -m pip uninstall -q -y torchvision torchaudio torchcodec
  "$python" -m pip install -q --disable-pip-version-check -c tests/serving/requirements.txt --no-build-isolation -e .
  touch "$stamp"
fi
export OMP_NUM_THREADS=1
if [ $# -gt 0 ]; then
  exec "$python" -m pytest -o timeout=600 "$@"
fi
"$python" -m pytest -o timeout=600 tests/serving/test_*.py
# vLLM's second model runner, which is the default on GPUs, by Triton's interpreter.
VLLM_USE_V2_MODEL_RUNNER=1 exec "$python" -m pytest -o timeout=600 tests/serving/test_routed.py \
  -k "of_which_four_skip or come_and_go or put_off or not_computed"
