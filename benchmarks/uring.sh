#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What plain sockets gain by io_uring, with and without a copy into the kernel, over loopback and, for root, over a pair of virtual
# interfaces. Prints a table. From any folder. Who isn't root needs 256 MiB of memory that may be locked (ulimit -l): the kernel counts the
# region that it sends out of.
#
#   benchmarks/uring.sh [--rounds N] [--seconds S] [--cells CELL...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. benchmarks/common/build.sh
kvferry_build_benchmarks bench kvferry_raw_socket_bench
exec python3 -B benchmarks/compare/uring.py --program build/release/benchmarks/raw_socket_bench "$@"
