#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds kvferry and runs all of its tests, from any folder, on a Debian 12 that needs nothing but this checkout.
# Options go to ctest: tests/run.sh -R handshake, tests/run.sh --repeat until-fail:20
#
# Tests with the label rdma take RDMA devices, those with rdma_two_hosts a pair of hosts that have some: where this
# machine is not one, soft_roce/run.sh boots it, once for each label. $KVFERRY_RDMA_TIMEOUT is what each may take,
# in seconds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/debian_packages.sh
kvferry_ensure_packages test rdma

if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER-ccache}
fi

cmake --preset release
cmake --build --preset release --parallel "$(nproc)"

# ctest excludes a test only if all of several -LE match.
not_here='^rdma'
here_options=()
for ((i = 1; i <= $#; ++i)); do
  case "${!i}" in
    -LE | --label-exclude)
      ((++i))
      not_here+="|${!i-}"
      ;;
    *) here_options+=("${!i}") ;;
  esac
done

count() {
  ctest --preset release --no-tests=ignore -N "$@" | sed -n 's/^Total Tests: //p'
}

ran=
failed=
# run COMMAND... -- OPTION...: has COMMAND run ctest with these options, if there are tests for them.
run() {
  local command=()
  while [[ $1 != -- ]]; do
    command+=("$1")
    shift
  done
  shift
  if (($(count "$@"))); then
    ran=yes
    "${command[@]}" ctest --preset release "$@" || failed+=" '$*'"
  fi
}

with_rdma=(tests/soft_roce/run.sh --timeout "${KVFERRY_RDMA_TIMEOUT:-1200}")

# An emulated machine that shares its processors stands still now and then, for as long as a deadline: what fails there is
# tried once more. ctest shows both tries.
second_try=(--repeat until-pass:2)
[[ " $* " != *" --repeat"* ]] || second_try=()

if (($(count -L '^rdma') == 0)); then
  echo "RDMA is not tested: kvferry::rdma was not built"
fi
run "${with_rdma[@]}" -- --parallel 2 "${second_try[@]}" -L '^rdma$' "$@"
run "${with_rdma[@]}" --guests 2 -- -L '^rdma_two_hosts$' "$@"
# Last, so that the last lines are of the most tests.
run -- --parallel "$(nproc)" -LE "$not_here" "${here_options[@]}"

if [[ -z $ran ]]; then
  echo "tests/run.sh: no tests for these options: $*" >&2
  exit 1
fi
if [[ -n $failed ]]; then
  echo "tests/run.sh: tests failed among those of$failed" >&2
  exit 1
fi
