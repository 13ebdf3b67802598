#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds scale_bench and prints its tables: 1 to 1,000 peers of one channel, and batches of 1 to 1,000,000 pages. From any folder.
#
#   benchmarks/scale.sh [OPTION]...     options of scale_bench; --help lists them
exec "$(dirname "${BASH_SOURCE[0]}")/common/run.sh" scale_bench "$@"
