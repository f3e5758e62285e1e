#!/usr/bin/env bash
# Folders of --format decilm in llama.cpp on a CPU, in .venv-gguf (2 GB, made once). Not part of .ci/run: ten minutes
# on a busy core, and to build llama.cpp three minutes of CPU time.
# SMOLLM2=FOLDER runs SmolLM2-135M-Instruct too. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD/.venv-gguf
python=$root/bin/python
requirements=tests/serving/gguf-requirements.txt
stamp=$root/.megaskip-$(cat "$requirements" setup.cfg | cksum | cut -d' ' -f1)
pip() { "$python" -m pip "$1" -q --disable-pip-version-check "${@:2}"; }
if [ ! -f "$stamp" ]; then
  [ -x "$python" ] || "${PYTHON:-python3}" -m venv "$root"
  pip install -r <(grep -v ^llama-cpp-python "$requirements") "setuptools>=77" wheel
  rm -rf "$root/source" "$root/build" && mkdir "$root/source"
  pip download --no-deps --no-build-isolation --no-binary llama-cpp-python -d "$root/source" \
    "$(grep ^llama-cpp-python "$requirements")"
  tar -xzf "$root"/source/*.tar.gz -C "$root/source" --strip-components 1
  # The library alone, and few optimisations: others take longer to compile than they save here.
  parts=(COMMON TESTS TOOLS EXAMPLES SERVER APP)
  "$root/bin/cmake" -S "$root/source/vendor/llama.cpp" -B "$root/build" -G Ninja \
    -DCMAKE_MAKE_PROGRAM="$root/bin/ninja" -DCMAKE_BUILD_TYPE=Release \
    $(printf -- "-DLLAMA_BUILD_%s=OFF " "${parts[@]}") \
    -DCMAKE_C_FLAGS_RELEASE="-O1 -DNDEBUG" -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" >"$root/cmake.log"
  "$root/bin/cmake" --build "$root/build" --target llama >>"$root/cmake.log"
  pip install -c "$requirements" --no-build-isolation -e .
  touch "$stamp"
fi
export LLAMA_CPP_SOURCE="$root/source/vendor/llama.cpp" LLAMA_CPP_LIB_PATH="$root/build/bin"
export PYTHONPATH="$root/source" OMP_NUM_THREADS=1
exec "$python" -m pytest -o timeout=600 "${@:-tests/serving/llamacpp}"
