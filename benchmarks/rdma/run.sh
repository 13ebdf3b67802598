#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds transfer_bench and prints kvferry's speed over RDMA beside perftest's, on this machine's device, or else in a
# virtual machine with an emulated one, where only the ratios mean anything. Options go to compare.py (--help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

. scripts/debian_packages.sh
kvferry_ensure_packages test rdma

if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER-ccache}
fi
cmake --preset release -DKVFERRY_WITH_RDMA=ON >&2
cmake --build --preset release --target kvferry_transfer_bench --parallel "$(nproc)" >&2
exec tests/soft_roce/run.sh -- benchmarks/rdma/compare.py "$@"
