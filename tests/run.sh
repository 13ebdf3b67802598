#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds kvferry and runs all of its tests, from any folder, on a Debian 12 that needs nothing but this checkout.
# Options go to ctest: tests/run.sh -R handshake, tests/run.sh --repeat until-fail:20
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/debian_packages.sh
kvferry_ensure_packages test

if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER-ccache}
fi

cmake --preset release
cmake --build --preset release --parallel "$(nproc)"
ctest --preset release --parallel "$(nproc)" "$@"
