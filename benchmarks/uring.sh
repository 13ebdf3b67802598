#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What plain sockets gain by io_uring, with and without a copy into the kernel, over loopback and, for root, over a pair of virtual
# interfaces. Prints a table. From any folder. Who isn't root needs 256 MiB of memory that may be locked (ulimit -l): the kernel counts the
# region that it sends out of.
#
#   benchmarks/uring.sh [--rounds N] [--seconds S] [--cells CELL...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/debian_packages.sh
kvferry_ensure_packages bench

if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER-ccache}
fi
cmake --preset release -DKVFERRY_BUILD_BENCHMARKS=ON >&2
cmake --build --preset release --target kvferry_raw_socket_bench --parallel "$(nproc)" >&2
exec python3 -B benchmarks/compare/uring.py --program build/release/benchmarks/raw_socket_bench "$@"
