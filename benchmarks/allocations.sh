#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds transfer_bench and prints what kvferry allocates, as heaptrack counts it: for an operation, for a page of it, and for a
# peer. Then how often a blocking operation of one page calls some functions, as a preloaded library counts them. From any
# folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. benchmarks/common/build.sh
kvferry_build_benchmarks heaptrack kvferry_transfer_bench kvferry_call_counter
exec python3 -B benchmarks/compare/allocations.py build/release/benchmarks/transfer_bench \
  "$PWD/build/release/benchmarks/call_counter.so"
