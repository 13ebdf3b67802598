# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# Builds some of the programs here. To be sourced in the project's folder:
#
#   . benchmarks/common/build.sh
#   kvferry_build_benchmarks PACKAGES TARGET...     PACKAGES: a group of scripts/debian_packages.sh

. scripts/debian_packages.sh

kvferry_build_benchmarks() {
  kvferry_ensure_packages "$1"
  if command -v ccache >/dev/null; then
    export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER-ccache}
  fi
  cmake --preset release -DKVFERRY_BUILD_BENCHMARKS=ON >&2
  cmake --build --preset release --target "${@:2}" --parallel "$(nproc)" >&2
}
