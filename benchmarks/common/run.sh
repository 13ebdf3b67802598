#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds one of the programs here and runs it. From any folder.
#
#   benchmarks/common/run.sh PROGRAM [OPTION]...     options of the program; --help lists them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
program=$1
shift

. scripts/debian_packages.sh
kvferry_ensure_packages test

if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER-ccache}
fi
cmake --preset release -DKVFERRY_BUILD_BENCHMARKS=ON >&2
cmake --build --preset release --target "kvferry_$program" --parallel "$(nproc)" >&2
exec "build/release/benchmarks/$program" "$@"
