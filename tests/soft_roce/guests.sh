# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2154
#
# The virtual machines of run.sh, which sources this. All guests have one share with the host; in it, guestN/ is of
# guest N: environment (in), stdout, stderr, status and console (out).
#
#   run_guests COUNT SECONDS COMMAND...   its status is that of run.sh
#   clean_up_guests                       whatever has happened before
#
# Expects set -e, and the variables repository, here (this folder), cache, scratch (a temporary folder), share and
# writable (folders).

guests=0
boots=()       # how often each guest was started
qemu=()        # the process of each running guest
switched_off=() # set for the guests that a guest asked to be switched off
passing_on=()  # processes that pass output on,
until_ends=    # until this process ends

make_initramfs() {
  local root=$scratch/initramfs
  mkdir -p "$root"/{bin,modules,proc}
  cp "$(command -v busybox)" "$root/bin/busybox"
  cp "$cache"/kernel/modules/* "$root/modules/"
  cp "$here/init.sh" "$root/init"
  (cd "$root" && find . | cpio --quiet -o -H newc) >"$scratch/initramfs.cpio"
}

# The environment of a guest's command: this one, and what --help lists.
print_environment() (
  local rail name
  export KVFERRY_SHARE=$share KVFERRY_GUEST=$1 KVFERRY_BOOT=${boots[$1]}
  for rail in 0 1; do
    name=KVFERRY_RAIL$rail
    export "$name=10.77.$rail.$(($1 + 1))" "${name}_V6=fd77:$((rail + 1))::$(($1 + 1))"
    if ((guests == 2)); then
      name=KVFERRY_PEER_RAIL$rail
      export "$name=10.77.$rail.$((2 - $1))" "${name}_V6=fd77:$((rail + 1))::$((2 - $1))"
    fi
  done
  export -p
)

# A link is two sockets that know each other's path: either guest may start first, and go and come back.
link_options() {
  local guest=$1 rail local_end remote_end
  for rail in 0 1; do
    local_end=$scratch/link$rail.$guest remote_end=$scratch/link$rail.$((1 - guest))
    printf '%s\n' -netdev \
      "dgram,id=link$rail,local.type=unix,local.path=$local_end,remote.type=unix,remote.path=$remote_end" \
      -device "virtio-net-pci,netdev=link$rail,mac=52:54:00:00:0$rail:0$((guest + 1)),romfile=,speed=10000,duplex=full"
  done
}

boot() {
  local guest=$1 results=$share/guest$1 options number
  boots[guest]=$((${boots[guest]-0} + 1))
  unset "switched_off[guest]"
  print_environment "$guest" >"$results/environment"
  options=(
    # No KVM: where it is nested, guests may hang in it. Without erms the kernel copies words, with it bytes, which when
    # emulated halves the devices' bandwidth. A kernel that checks its timer panics where the host is so busy that too few
    # ticks come meanwhile.
    -accel "tcg,thread=multi" -cpu "max,-erms" -smp 2 -m 4096
    -nodefaults -no-user-config -display none -no-reboot -serial stdio
    -kernel "$cache/kernel/vmlinuz" -initrd "$scratch/initramfs.cpio"
    -append "console=ttyS0 loglevel=4 panic=-1 oops=panic mitigations=off tsc=reliable no_timer_check guest=$guest"
    -device virtio-rng-pci
    -fsdev "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"
    -device "virtio-9p-pci,fsdev=host,mount_tag=host"
    -fsdev "local,id=share,path=${share//,/,,},security_model=none"
    -device "virtio-9p-pci,fsdev=share,mount_tag=share"
  )
  for ((number = 0; number < ${#writable[@]}; ++number)); do
    options+=(
      -fsdev "local,id=writable$number,path=${writable[number]//,/,,},security_model=none"
      -device "virtio-9p-pci,fsdev=writable$number,mount_tag=writable$number"
    )
  done
  if ((guests == 2)); then
    local links
    mapfile -t links < <(link_options "$guest")
    options+=("${links[@]}")
  fi
  qemu-system-x86_64 "${options[@]}" </dev/null >>"$results/console" 2>&1 &
  qemu[guest]=$!
}

# power-off-N in the share is a guest's request to switch guest N off, power-on-N one to start it again. The file goes
# once that has been done.
answer_requests() {
  local guest
  for ((guest = 0; guest < guests; ++guest)); do
    if [[ -e $share/power-off-$guest ]]; then
      switched_off[guest]=yes
      stop_guest "$guest"
      rm -f "$share/power-off-$guest"
    fi
    if [[ -e $share/power-on-$guest ]]; then
      [[ -n ${qemu[guest]-} ]] || boot "$guest"
      rm -f "$share/power-on-$guest"
    fi
  done
}

stop_guest() {
  [[ -n ${qemu[$1]-} ]] || return 0
  kill -KILL "${qemu[$1]}" 2>/dev/null || true
  wait "${qemu[$1]}" 2>/dev/null || true
  unset "qemu[$1]"
}

# Forgets the guests that have ended. Fails if one has not left a status: it crashed or never came up.
collect_guests() {
  local guest
  for guest in "${!qemu[@]}"; do
    if ! kill -0 "${qemu[guest]}" 2>/dev/null; then
      stop_guest "$guest"
      [[ -s $share/guest$guest/status ]] || return 1
    fi
  done
}

# Passes a file on to stdout while it grows, until the process $until_ends is gone.
pass_on() {
  if ((guests == 1)); then
    exec tail --pid="$until_ends" -s 0.1 -n +1 -f "$1"
  fi
  tail --pid="$until_ends" -s 0.1 -n +1 -f "$1" | sed -u "s/^/guest $2: /"
}

pass_output_on() {
  local guest results
  sleep infinity &
  until_ends=$!
  for ((guest = 0; guest < guests; ++guest)); do
    results=$share/guest$guest
    pass_on "$results/stdout" "$guest" &
    passing_on+=("$!")
    pass_on "$results/stderr" "$guest" >&2 &
    passing_on+=("$!")
  done
}

end_passing_on() {
  [[ -n ${until_ends-} ]] || return 0
  kill "$until_ends" 2>/dev/null || true
  wait "$until_ends" "${passing_on[@]}" 2>/dev/null || true
  until_ends=
}

report_trouble() {
  local guest
  echo "run.sh: $1"
  for ((guest = 0; guest < guests; ++guest)); do
    [[ ! -s $share/guest$guest/status ]] || continue
    echo "The last lines of guest $guest's console:"
    tail -n 40 "$share/guest$guest/console" | tr -d '\r'
  done
} >&2

supervise() {
  local deadline=$((SECONDS + $1)) trouble='' status=0
  while ((${#qemu[@]})); do
    answer_requests
    if ! collect_guests; then
      trouble='a virtual machine ended before its command did'
      status=125
      break
    elif ((SECONDS >= deadline)); then
      trouble="not done after $1 s"
      status=124
      break
    fi
    sleep 0.1
  done
  clean_up_guests
  if [[ -n $trouble ]]; then
    report_trouble "$trouble"
  fi
  return "$status"
}

clean_up_guests() {
  local guest
  for guest in "${!qemu[@]}"; do
    stop_guest "$guest"
  done
  end_passing_on
}

run_guests() {
  local guest status
  guests=$1
  make_initramfs
  echo "$share" >"$share/path"
  echo "$repository" >"$share/repository"
  printf '%s\n' "${writable[@]}" >"$share/writable"
  printf '%s\0' "${@:3}" >"$share/command"
  rm -f "$share"/power-*
  for ((guest = 0; guest < guests; ++guest)); do
    rm -rf "$share/guest$guest"
    mkdir "$share/guest$guest"
    : >"$share/guest$guest/stdout"
    : >"$share/guest$guest/stderr"
  done
  for ((guest = 0; guest < guests; ++guest)); do
    boot "$guest"
  done
  pass_output_on
  supervise "$2"
  for ((guest = 0; guest < guests; ++guest)); do
    if [[ -z ${switched_off[guest]-} ]]; then
      status=$(<"$share/guest$guest/status")
      ((status == 0)) || return "$status"
    # One that was switched off has no status. What ctest said until then tells.
    elif grep -qF '***' "$share/guest$guest/stdout"; then
      return 1
    fi
  done
}
