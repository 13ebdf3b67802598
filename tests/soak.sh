#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Several processes move pages between each other at random while they are killed, stopped and restarted, and while packets get lost
# where this may make network namespaces (root): by the kernel's netem, or, where it has none, by a program between hosts that are
# namespaces. Every byte is checked. Options: tests/soak.sh --help
#
#   tests/soak.sh                  # a minute
#   tests/soak.sh --seconds 3600   # an hour
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/debian_packages.sh
kvferry_ensure_packages test soak

if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER-ccache}
fi
cmake --preset release >/dev/null
cmake --build --preset release --parallel "$(nproc)" --target kvferry_soak_peer kvferry_soak_network

soak=(python3 -B tests/soak/soak.py --programs build/release/tests "$@")
if unshare --net true 2>/dev/null; then
  exec unshare --net bash -c 'ip link set lo up && exec "$@" --own-network' soak "${soak[@]}"
fi
exec "${soak[@]}"
