#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=dash
#
# A guest's first process, in the initramfs: loads the modules and goes on, in guest.sh, in the host's file system. What
# is written there stays in the guest's memory; only the share is the host's as well.
set -e
/bin/busybox --install -s /bin
dmesg -n 7 # from here on all that the kernel says, for the last lines that are shown when something goes wrong

mount -t proc proc /proc
# However this ends: the kernel would panic when its first process is gone.
trap 'echo b >/proc/sysrq-trigger' EXIT
for module in /modules/*.ko; do
  insmod "$module" || echo "init.sh: $module could not be loaded"
done

over_9p=trans=virtio,version=9p2000.L,msize=512000
mkdir -p /host /share /memory /root
mount -t 9p -o "$over_9p,ro,cache=loose" host /host
mount -t 9p -o "$over_9p,cache=none" share /share
mount -t tmpfs memory /memory
mkdir /memory/changed /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/changed,workdir=/memory/work root /root

mount -t proc proc /root/proc
mount -t sysfs sys /root/sys
mount -t devtmpfs dev /root/dev
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts -o ptmxmode=0666 devpts /root/dev/pts
mount -t tmpfs -o mode=1777 shm /root/dev/shm
ln -sf /proc/self/fd /root/dev/fd
ln -sf fd/0 /root/dev/stdin
ln -sf fd/1 /root/dev/stdout
ln -sf fd/2 /root/dev/stderr

# What is the host's as well lies at the same path as there.
number=0
while read -r folder; do
  [ -n "$folder" ] || break
  mount -t 9p -o "$over_9p,cache=mmap" "writable$number" "/root$folder"
  number=$((number + 1))
done </share/writable
share=$(cat /share/path)
mkdir -p "/root$share"
mount --move /share "/root$share"

# The kernel hands guest= of its command line on as a variable.
# shellcheck disable=SC2154
exec chroot /root /bin/bash "$(cat "/root$share/repository")/tests/soft_roce/guest.sh" "$share" "$guest"
