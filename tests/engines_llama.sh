#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# examples/llama, between processes with a tiny model. Builds llama.cpp's library (some 15 CPU minutes) the first time, and
# keeps it in build/llama. Arguments go to pytest.
#
#   tests/engines_llama.sh [--installed PREFIX] [PYTEST ARGUMENT...]
#
# --installed: with the kvferry that is installed there, instead of compiling it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/debian_packages.sh
kvferry_ensure_packages python

folder=$PWD/build/llama
kvferry=$folder/kvferry
if [[ ${1-} == --installed ]]; then
  kvferry=$(realpath "$2")
  shift 2
else
  cmake -G Ninja -S . -B "$folder/kvferry-build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX="$kvferry" \
    -DKVFERRY_WITH_RDMA=OFF -DKVFERRY_BUILD_TESTS=OFF -DKVFERRY_BUILD_EXAMPLES=OFF -DKVFERRY_BUILD_TOOLS=OFF \
    -DKVFERRY_BUILD_BENCHMARKS=OFF >/dev/null
  cmake --build "$folder/kvferry-build" --target install >/dev/null
fi

environment=$folder/environment
if [[ ! -e $environment/complete ]]; then
  "${PYTHON:-python3}" -m venv --clear "$environment"
  "$environment/bin/pip" install --quiet --disable-pip-version-check 'gguf==0.17.1' 'numpy>=1.26' 'pytest>=8'
  touch "$environment/complete"
fi

# The source of llama.cpp is in that of its Python binding.
if [[ ! -e $folder/llama.cpp/complete ]]; then
  rm -rf "$folder"/{download,source,llama.cpp-build,llama.cpp}
  "$environment/bin/pip" download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
    --dest "$folder/download" 'llama-cpp-python==0.3.36'
  mkdir "$folder/source"
  tar -xzf "$folder"/download/llama_cpp_python-*.tar.gz -C "$folder/source" --strip-components=3 \
    --wildcards '*/vendor/llama.cpp/*'
  # For any processor of the kind, and each library finds the others beside it.
  # shellcheck disable=SC2016
  cmake -G Ninja -S "$folder/source" -B "$folder/llama.cpp-build" -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_INSTALL_PREFIX="$folder/llama.cpp" '-DCMAKE_INSTALL_RPATH=$ORIGIN' -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF \
    -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF >"$folder/llama.cpp.log" 2>&1
  nice cmake --build "$folder/llama.cpp-build" --target install >>"$folder/llama.cpp.log" 2>&1
  touch "$folder/llama.cpp/complete"
  rm -rf "$folder"/{download,source,llama.cpp-build}
fi

cmake --fresh -G Ninja -S examples/llama -B "$folder/example" -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_PREFIX_PATH="$kvferry;$folder/llama.cpp" >/dev/null
cmake --build "$folder/example"
"$environment/bin/python" tests/engines/llama/make_model.py "$folder/tiny.gguf"

KVFERRY_LLAMA_PROGRAM=$folder/example/kv_handover KVFERRY_LLAMA_MODEL=$folder/tiny.gguf \
  "$environment/bin/python" -m pytest -q tests/engines/llama/handover.py "$@"
