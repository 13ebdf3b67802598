# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# Debian packages that kvferry needs. To be sourced by bash scripts:
#
#   . scripts/debian_packages.sh
#   kvferry_ensure_packages build test
#
# Groups:
#   build  compiler, CMake and libraries for the library, the examples and the benchmarks
#   test   build, and what the tests need besides
#   python build, and what the Python package is built and tested with
#   fuzz   build, and Clang with libFuzzer
#   rdma   build, and what RDMA takes: verbs, and the programs that tests and measurements of it use
#   soft_roce  what tests/soft_roce/run.sh needs for a virtual machine with RDMA devices
#   soak   test, and what tests/soak.sh makes a network of its own with
#   bench  build, and what benchmarks/compare.sh compares with and draws with
#   heaptrack  build, and what benchmarks/allocations.sh counts with
#   lint   fuzz, and what scripts/lint.sh reads the sources with
#   packaging  build, and what packaging/try_debian_packages.sh makes packages and a clean system with
#
# Whatever is missing is installed with apt-get, through sudo for users other than root. Where nothing is missing, apt
# is not called at all. On systems without dpkg nothing is checked: install the counterparts of these packages.

_kvferry_packages() {
  local group
  for group in "$@"; do
    case "$group" in
      build)
        echo g++ cmake ninja-build pkg-config libasio-dev cppzmq-dev libzmq3-dev libmsgpack-cxx-dev
        echo libcli11-dev libfmt-dev libspdlog-dev libssl-dev libxxhash-dev nlohmann-json3-dev
        ;;
      test)
        _kvferry_packages build
        echo libgtest-dev doxygen python3 python3-zmq python3-msgpack python3-prometheus-client
        ;;
      python)
        _kvferry_packages build
        echo python3-dev python3-venv libibverbs-dev
        ;;
      fuzz)
        _kvferry_packages build
        echo clang libclang-rt-14-dev llvm
        ;;
      rdma)
        _kvferry_packages build
        echo libibverbs-dev ibverbs-providers ibverbs-utils perftest iproute2
        ;;
      soft_roce)
        echo qemu-system-x86 busybox-static cpio kmod iproute2 ibverbs-providers
        ;;
      soak)
        _kvferry_packages test
        echo iproute2 util-linux
        ;;
      bench)
        _kvferry_packages build
        echo libucx-dev libfabric-dev liburing-dev iperf3 iproute2 openssl python3 python3-matplotlib
        ;;
      heaptrack)
        _kvferry_packages build
        echo heaptrack python3
        ;;
      lint)
        _kvferry_packages fuzz rdma
        echo clang-tidy cppcheck
        ;;
      packaging)
        _kvferry_packages build
        echo libibverbs-dev dpkg-dev file debootstrap binutils python3-venv
        ;;
      *)
        echo "kvferry_ensure_packages: no group '$group'; there are build, test, python, fuzz, rdma, soft_roce, soak, bench, heaptrack, lint and packaging" >&2
        return 1
        ;;
    esac
  done
}

kvferry_ensure_packages() {
  local wanted installed package missing=() as_root=()
  wanted=$(_kvferry_packages "$@") || return
  command -v dpkg-query >/dev/null || return 0

  # shellcheck disable=SC2086 # a list of words
  installed=$(dpkg-query --show --showformat='${db:Status-Status} ${Package}\n' $wanted 2>/dev/null || true)
  for package in $wanted; do
    grep -qxF "installed $package" <<<"$installed" || missing+=("$package")
  done
  ((${#missing[@]})) || return 0

  echo "Installing ${missing[*]}" >&2
  if ((EUID != 0)); then
    as_root=(sudo)
  fi
  "${as_root[@]}" apt-get update -qq &&
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}
