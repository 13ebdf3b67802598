#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a command where there are RDMA devices; --help says how.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)

usage() {
  cat <<'TEXT'
tests/soft_roce/run.sh [OPTION]... -- COMMAND [ARGUMENT]...

Runs COMMAND in the repository's root, on a host with RDMA devices. That is this machine where it has such a device;
elsewhere it is a virtual machine with two Soft-RoCE devices, which sees this machine's files and this environment.
It needs neither privileges nor a network. What COMMAND writes is lost, but for the folder $KVFERRY_SHARE.

  --vm               a virtual machine even where there is a device
  --guests N         N virtual machines, 1 or 2; each runs COMMAND, and two are joined by two links, one a rail
  --timeout SECONDS  what all of it may take (default 600)
  --share DIR        the folder for $KVFERRY_SHARE, which is kept; by default it is a temporary one
  --writable DIR     a folder of this machine in which COMMAND can write as well; may be given more than once
  --cache DIR        where the kernel is kept (default build/soft_roce)

Ends with COMMAND's exit status; with 124 at the time-out; with 125 where a virtual machine could not do its part.

In a virtual machine COMMAND finds in its environment:
  KVFERRY_SHARE                             a folder common to the guests and this machine, at the same path
  KVFERRY_GUEST                             0 or 1; KVFERRY_BOOT says how often it has been started, 1 at first
  KVFERRY_TEST_TIME_FACTOR                  how much slower it was at its boot than on an idle host; tests wait longer
  KVFERRY_RAIL0, KVFERRY_RAIL1              IPv4 addresses of rxe0 and rxe1; with _V6 added, IPv6 addresses
  KVFERRY_PEER_RAIL0, KVFERRY_PEER_RAIL1    the same of the other guest, where there are two
Of two, one can switch the other, N, off by making a file power-off-N in $KVFERRY_SHARE, and on again by power-on-N. The
file is gone once that is done. What is off counts as a success.
TEXT
}

fail() {
  echo "run.sh: $1" >&2
  exit 125
}

count=
timeout=600
share=
writable=()
cache=$repository/build/soft_roce
force_vm=
while (($#)); do
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    --vm)
      force_vm=yes
      shift
      continue
      ;;
    --)
      shift
      break
      ;;
    --*) (($# >= 2)) || fail "$1 needs a value (--help lists the options)" ;;
    *) break ;;
  esac
  case "$1" in
    --guests)
      [[ $2 == [12] ]] || fail "--guests: 1 or 2, not '$2'"
      count=$2
      ;;
    --timeout)
      [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--timeout: a number of seconds, not '$2'"
      timeout=$2
      ;;
    --share) share=$2 ;;
    --writable) writable+=("$(realpath -e -- "$2")") || fail "--writable: there is no '$2'" ;;
    --cache) cache=$2 ;;
    *) fail "no option '$1' (--help lists the options)" ;;
  esac
  shift 2
done
(($#)) || fail "no command (--help explains)"

has_rdma_device() {
  local state
  for state in /sys/class/infiniband/*/ports/*/state; do
    if [[ -r $state && $(<"$state") == *ACTIVE ]]; then return 0; fi
  done
  return 1
}

if [[ -z $force_vm && $count != 2 ]] && has_rdma_device; then
  cd "$repository"
  ulimit -l unlimited 2>/dev/null || true
  exec timeout --foreground "$timeout" "$@"
fi

[[ $(uname -m) == x86_64 ]] || fail "the virtual machines are x86-64, as their programs are this machine's: $(uname -m)"
# shellcheck source=scripts/debian_packages.sh
. "$repository/scripts/debian_packages.sh"
kvferry_ensure_packages rdma soft_roce || fail "packages are missing"
"$here/kernel.sh" "$cache/kernel" || fail "no kernel"

scratch=$(mktemp -d)
if [[ -z $share ]]; then
  share=$scratch/share
fi
mkdir -p "$share"
share=$(cd "$share" && pwd)

# shellcheck source=tests/soft_roce/guests.sh
. "$here/guests.sh"
clean_up() {
  trap '' INT TERM
  clean_up_guests
  rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

run_guests "${count:-1}" "$timeout" "$@"
