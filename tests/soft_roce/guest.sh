#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# guest.sh SHARE GUEST: in a guest, brings up two RDMA devices, runs the command that run.sh was given and leaves its
# exit status in the share. Called by init.sh, as process 1.
set -euo pipefail
share=$1
guest=$2
results=$share/guest$guest

# However this ends: the kernel would panic when its first process is gone.
trap 'echo b >/proc/sysrq-trigger' EXIT

# shellcheck source=/dev/null # the environment of run.sh
. "$results/environment"
export PATH=$PATH:/usr/sbin:/sbin

rail_is_usable() {
  [[ $(<"/sys/class/infiniband/rxe$1/ports/1/state") == *ACTIVE ]] &&
    grep -q ':ffff:' "/sys/class/infiniband/rxe$1/ports/1/gids/1" # the IPv4 address
}

bring_up_rails() {
  local rail attempts
  hostname "kvferry-guest$guest"
  ip link set lo up
  # Nobody else could have these addresses: no waiting for their duplicates.
  echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
  # Two guests have links to each other; one alone gets a cable from one of its ports to the other.
  if [[ ! -e /sys/class/net/eth0 ]]; then
    ip link add eth0 mtu 9000 type veth peer name eth1 mtu 9000
  fi
  for rail in 0 1; do
    echo 0 >"/proc/sys/net/ipv6/conf/eth$rail/accept_dad"
    echo 1 >"/proc/sys/net/ipv6/conf/eth$rail/keep_addr_on_down" # as it is for IPv4
    ip link set "eth$rail" mtu 9000 up
  done
  for rail in 0 1; do
    ip address add "10.77.$rail.$((guest + 1))/24" dev "eth$rail"
    ip address add "fd77:$((rail + 1))::$((guest + 1))/64" dev "eth$rail" nodad
    rdma link add "rxe$rail" type rxe netdev "eth$rail"
  done
  for rail in 0 1; do
    for ((attempts = 100; attempts; --attempts)); do
      if rail_is_usable "$rail"; then break; fi
      sleep 0.1
    done
    ((attempts)) || { rdma link show; ip address show; return 1; }
  done
}

# How much slower than usual for an emulated machine this one is, 1 to 8: on an idle host the loop takes a second.
time_factor() {
  local start=${EPOCHREALTIME/[.,]/} i tenths
  for ((i = 0; i < 50000; ++i)); do :; done
  tenths=$(((${EPOCHREALTIME/[.,]/} - start) / 100000))
  tenths=$((tenths < 10 ? 10 : tenths > 80 ? 80 : tenths))
  echo "$((tenths / 10)).$((tenths % 10))"
}

run_command() (
  mapfile -d '' -t command <"$share/command"
  cd "$(<"$share/repository")"
  ulimit -l unlimited
  ulimit -n 4096 # both sides of some hundreds of handshakes at once are in one process here
  exec "${command[@]}" </dev/null >>"$results/stdout" 2>>"$results/stderr"
)

bring_up_rails
KVFERRY_TEST_TIME_FACTOR=$(time_factor)
export KVFERRY_TEST_TIME_FACTOR
echo "guest $guest: time factor $KVFERRY_TEST_TIME_FACTOR" >>"$results/stderr"
status=0
run_command || status=$?
echo "$status" >"$results/status"
