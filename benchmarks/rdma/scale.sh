#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds scale_bench and prints what 1 to 1,000 peers cost one channel over RDMA, on this machine's device, or else in a
# virtual machine with an emulated one. From any folder.
#
#   benchmarks/rdma/scale.sh [OPTION]...     options of scale_bench; --help lists them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

. benchmarks/common/build.sh
kvferry_build_benchmarks rdma kvferry_scale_bench
# All peers are in one process, with some twenty descriptors each.
exec tests/soft_roce/run.sh -- bash -c 'ulimit -n 65536 && exec build/release/benchmarks/scale_bench --transport rdma "$@"' scale "$@"
