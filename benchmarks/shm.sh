#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds shm_bench and prints its tables: batches of pages between two processes of this host, beside one copy of them. From any folder.
#
#   benchmarks/shm.sh [OPTION]...     options of shm_bench; --help lists them
exec "$(dirname "${BASH_SOURCE[0]}")/common/run.sh" shm_bench "$@"
