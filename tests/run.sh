#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds kvferry and runs its tests, from any folder, on a Debian 12 that needs nothing but this checkout; says at the end
# how long each part took, and what was skipped.
#
#   tests/run.sh [--rdma] [--packages] [CTEST OPTION]...
#                                             e.g. tests/run.sh -R handshake, tests/run.sh --repeat until-fail:20
#   tests/run.sh --filter PATTERN             single tests, by GoogleTest's names: tests/run.sh --filter '*Line08*';
#                                             those that take RDMA devices only where this machine has one
#
# Tests with the label rdma take RDMA devices, those with rdma_two_hosts a pair of hosts that have some. The former run
# where this machine has one. With --rdma, both run in virtual machines that soft_roce/run.sh boots, once for each label,
# which takes longer than all else. $KVFERRY_RDMA_TIMEOUT is what each boot may take, in seconds.
#
# Tests with the label package build kvferry and other projects anew, as users do. They take as long as all others, so only
# --packages runs them here. .ci/run always does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/debian_packages.sh
. scripts/parts.sh

rdma=
packages=
filter=
while [[ ${1-} == --rdma || ${1-} == --packages ]]; do
  [[ $1 != --rdma ]] || rdma=yes
  [[ $1 != --packages ]] || packages=yes
  shift
done
if [[ ${1-} == --filter ]]; then
  filter=${2:?"--filter needs a pattern"}
  shift 2
fi

if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER-ccache}
fi

install_packages() { kvferry_ensure_packages test rdma; }
build() { cmake --preset release && cmake --build --preset release --parallel "$(nproc)"; }

stop() {
  kvferry_parts_end || true
  echo "tests/run.sh: $1" >&2
  exit 1
}

kvferry_part "packages" install_packages || stop "packages are missing"
kvferry_part "build" build || stop "the build failed"

has_rdma_device() { grep -qs ACTIVE /sys/class/infiniband/*/ports/*/state; }

if [[ -n $filter ]]; then
  ran=
  without_device=
  for program in build/release/tests/kvferry_*_tests; do
    if [[ $("$program" --gtest_list_tests --gtest_filter="$filter") != *.* ]]; then
      continue
    fi
    # Those of these names have the label rdma or rdma_two_hosts.
    if [[ $program == *_two_hosts_tests ]] || { [[ $program == */kvferry_rdma_*_tests ]] && ! has_rdma_device; }; then
      without_device+=" ${program##*/}"
      continue
    fi
    ran=yes
    kvferry_part "${program##*/}" "$program" --gtest_filter="$filter" || true
  done
  if [[ -n $without_device ]]; then
    echo "Tests that match do not run, for they take RDMA devices that are not here:$without_device"
  fi
  [[ -n $ran ]] || stop "no tests match $filter${without_device:+ that can run here}"
  kvferry_parts_end
  exit
fi

# ctest excludes a test only if all of several -LE match.
excluded=
here_options=()
for ((i = 1; i <= $#; ++i)); do
  case "${!i}" in
    -LE | --label-exclude)
      ((++i))
      excluded+="|${!i-}"
      ;;
    *) here_options+=("${!i}") ;;
  esac
done

count() {
  ctest --preset release --no-tests=ignore -N "$@" | sed -n 's/^Total Tests: //p'
}

ran=
# run NAME COMMAND... -- OPTION...: has COMMAND run ctest with these options, if there are tests for them.
run() {
  local name=$1 command=()
  shift
  while [[ $1 != -- ]]; do
    command+=("$1")
    shift
  done
  shift
  local tests
  tests=$(count "$@") || stop "ctest can't list the tests"
  if ((tests)); then
    ran=yes
    kvferry_part "$name" "${command[@]}" ctest --preset release "$@" || true
  fi
}

if (($(count -L '^rdma') == 0)); then
  echo "RDMA is not tested: kvferry::rdma was not built"
fi
not_here='^rdma'
if [[ -n $rdma ]]; then
  with_rdma=(tests/soft_roce/run.sh --writable "$kvferry_parts" --timeout "${KVFERRY_RDMA_TIMEOUT:-1200}")
  # An emulated machine that shares its processors stands still now and then, for as long as a deadline: what fails there
  # is tried once more. ctest shows both tries.
  second_try=(--repeat until-pass:2)
  [[ " $* " != *" --repeat"* ]] || second_try=()
  run "RDMA tests" "${with_rdma[@]}" -- --parallel 2 "${second_try[@]}" -L '^rdma$' "$@"
  run "tests on two hosts" "${with_rdma[@]}" --guests 2 -- -L '^rdma_two_hosts$' "$@"
elif has_rdma_device; then
  not_here='^rdma_two_hosts'
else
  echo "What takes an RDMA device does not run: there is none here, and no --rdma"
fi
if [[ -z $packages ]]; then
  not_here+='|^package$'
  echo "What builds other projects with kvferry does not run: $(count -L '^package$' "${here_options[@]}") tests, without --packages"
fi
# Last, so that the last lines are of the most tests.
run "tests" -- --parallel "$((2 * $(nproc)))" -LE "$not_here$excluded" "${here_options[@]}"

if [[ -z $ran ]]; then
  stop "no tests for these options: $*"
fi
kvferry_parts_end
