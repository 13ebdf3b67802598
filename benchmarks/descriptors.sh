#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What it costs to submit a write of very many descriptors: with kvferry, with UCX and with NIXL, in one table. All go over TCP on
# loopback. Installs UCX, and NIXL into an environment of its own. From any folder.
#
#   benchmarks/descriptors.sh [OPTION]...     options of descriptor_bench; --help lists them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/debian_packages.sh
kvferry_ensure_packages bench python
environment=build/nixl
if [[ ! -x $environment/bin/python ]]; then
  "${PYTHON:-python3}" -m venv "$environment"
fi
# Its other dependency, torch, isn't needed for memory of the host.
"$environment/bin/pip" install --quiet --disable-pip-version-check numpy >&2
"$environment/bin/pip" install --quiet --disable-pip-version-check --no-deps 'nixl-cu12==1.5.1' >&2

benchmarks/common/run.sh ucx_descriptor_bench --rounds 1 --descriptors 1 >/dev/null # builds it, too
benchmarks/common/run.sh descriptor_bench "$@"
build/release/benchmarks/ucx_descriptor_bench "$@"
exec "$environment/bin/python" -B benchmarks/compare/nixl_descriptors.py "$@"
