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
  --cache DIR        where the kernel is kept (default build/soft_roce)

Ends with COMMAND's exit status; with 124 at the time-out; with 125 where a virtual machine could not do its part.

In a virtual machine COMMAND finds in its environment:
  KVFERRY_SHARE                             a folder common to the guests and this machine, at the same path
  KVFERRY_GUEST                             0 or 1
  KVFERRY_RAIL0, KVFERRY_RAIL1              IPv4 addresses of rxe0 and rxe1; with _V6 added, IPv6 addresses
  KVFERRY_PEER_RAIL0, KVFERRY_PEER_RAIL1    the same of the other guest, where there are two
TEXT
}

fail() {
  echo "run.sh: $1" >&2
  exit 125
}

guests=
timeout=600
share=
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
      guests=$2
      ;;
    --timeout)
      [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--timeout: a number of seconds, not '$2'"
      timeout=$2
      ;;
    --share) share=$2 ;;
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

if [[ -z $force_vm && $guests != 2 ]] && has_rdma_device; then
  cd "$repository"
  ulimit -l unlimited 2>/dev/null || true
  exec timeout --foreground "$timeout" "$@"
fi

[[ $(uname -m) == x86_64 ]] || fail "the virtual machines are x86-64, as their programs are this machine's: $(uname -m)"
# shellcheck source=scripts/debian_packages.sh
. "$repository/scripts/debian_packages.sh"
kvferry_ensure_packages rdma soft_roce || fail "packages are missing"
"$here/kernel.sh" "$cache/kernel" || fail "no kernel"

guests=${guests:-1}
scratch=$(mktemp -d)
if [[ -z $share ]]; then
  share=$scratch/share
fi
mkdir -p "$share"
share=$(cd "$share" && pwd)

qemu=()   # process of each guest
output=() # processes that pass output on
clean_up() {
  trap '' INT TERM
  local pid
  for pid in "${qemu[@]}" "${output[@]}"; do
    kill -KILL "$pid" 2>/dev/null || true
  done
  wait
  rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

make_initramfs() {
  local root=$scratch/initramfs
  mkdir -p "$root"/{bin,modules,proc}
  cp "$(command -v busybox)" "$root/bin/busybox"
  cp "$cache"/kernel/modules/* "$root/modules/"
  cp "$here/init.sh" "$root/init"
  (cd "$root" && find . | cpio --quiet -o -H newc) >"$scratch/initramfs.cpio"
}

# What a guest finds in the share.
prepare_guest() {
  local guest=$1 peer=$((1 - $1)) rail
  rm -rf "$share/guest$guest"
  mkdir "$share/guest$guest"
  : >"$share/guest$guest/stdout"
  : >"$share/guest$guest/stderr"
  (
    export KVFERRY_SHARE=$share KVFERRY_GUEST=$guest
    for rail in 0 1; do
      export "KVFERRY_RAIL$rail=10.77.$rail.$((guest + 1))" "KVFERRY_RAIL${rail}_V6=fd77:$rail::$((guest + 1))"
      if ((guests == 2)); then
        export "KVFERRY_PEER_RAIL$rail=10.77.$rail.$((peer + 1))" "KVFERRY_PEER_RAIL${rail}_V6=fd77:$rail::$((peer + 1))"
      fi
    done
    export -p
  ) >"$share/guest$guest/environment"
}

boot() {
  local guest=$1 peer=$((1 - $1)) rail options
  options=(
    -accel tcg,thread=multi -cpu max -smp 2 -m 4096 # /dev/kvm may be there, but nested guests hang in it
    -nodefaults -no-user-config -display none -no-reboot -serial "file:$share/guest$guest/console"
    -kernel "$cache/kernel/vmlinuz" -initrd "$scratch/initramfs.cpio"
    -append "console=ttyS0 loglevel=4 panic=-1 oops=panic mitigations=off random.trust_cpu=on guest=$guest"
    -device virtio-rng-pci
    -fsdev "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"
    -device virtio-9p-pci,fsdev=host,mount_tag=host
    -fsdev "local,id=share,path=${share//,/,,},security_model=none"
    -device virtio-9p-pci,fsdev=share,mount_tag=share
  )
  qemu-system-x86_64 "${options[@]}" </dev/null >>"$share/guest$guest/console" 2>&1 &
  qemu[guest]=$!
}

# pass_on FILE: to stdout as it grows, until the process $running ends.
pass_on() {
  tail --pid="$running" -s 0.1 -n +1 -f "$1"
}

last_lines() {
  local guest=$1
  {
    echo "run.sh: $2; the last lines of guest $guest's console:"
    tail -n 40 "$share/guest$guest/console" | tr -d '\r'
  } >&2
}

make_initramfs
echo "$share" >"$share/path"
echo "$repository" >"$share/repository"
echo "$repository" >"$share/folder"
printf '%s\0' "$@" >"$share/command"

sleep infinity &
running=$!
output+=("$running")
for ((guest = 0; guest < guests; ++guest)); do
  prepare_guest "$guest"
  boot "$guest"
  pass_on "$share/guest$guest/stdout" &
  output+=("$!")
  pass_on "$share/guest$guest/stderr" >&2 &
  output+=("$!")
done

timed_out=
deadline=$((SECONDS + timeout))
while kill -0 "${qemu[@]}" 2>/dev/null; do
  if ((SECONDS >= deadline)); then
    timed_out=yes
    kill -KILL "${qemu[@]}"
    break
  fi
  sleep 0.1
done
wait "${qemu[@]}" 2>/dev/null || true
kill "$running"
wait "${output[@]}" 2>/dev/null || true
cat "$share/guest0/boot_seconds" >&2
if [[ -n $timed_out ]]; then last_lines 0 "timeout"; exit 124; fi
if [[ ! -s $share/guest0/status ]]; then last_lines 0 "no status"; exit 125; fi
exit "$(<"$share/guest0/status")"
