#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds one of the programs here and runs it. From any folder.
#
#   benchmarks/common/run.sh PROGRAM [OPTION]...     options of the program; --help lists them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
program=$1
shift

. benchmarks/common/build.sh
kvferry_build_benchmarks test "kvferry_$program"
exec "build/release/benchmarks/$program" "$@"
