#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds scale_bench and prints its tables: 1 to 1,000 peers of one channel, and batches of 1 to 1,000,000 pages. From any folder.
#
#   benchmarks/scale.sh [OPTION]...     options of scale_bench; --help lists them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/debian_packages.sh
kvferry_ensure_packages test

if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER-ccache}
fi
cmake --preset release -DKVFERRY_BUILD_BENCHMARKS=ON >&2
cmake --build --preset release --target kvferry_scale_bench --parallel "$(nproc)" >&2
exec build/release/benchmarks/scale_bench "$@"
