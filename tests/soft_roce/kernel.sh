#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# kernel.sh FOLDER: makes sure that FOLDER has Debian's stock kernel (FOLDER/vmlinuz) and the modules that a guest
# needs (FOLDER/modules/NNN-name.ko, in the order in which they can be loaded). The kernel package is downloaded and
# unpacked, not installed.
set -euo pipefail

modules=(
  virtio_pci virtio_rng 9pnet_virtio 9p overlay # the guest's view of the host
  veth virtio_net sch_netem                     # links, and what goes wrong on them
  crc32_generic                                 # rxe asks for a CRC by name; crc32_pclmul is slower when emulated
  ib_uverbs ib_umad rdma_ucm rdma_rxe
)

PATH=$PATH:/usr/sbin:/sbin # depmod, modprobe

fail() {
  echo "kernel.sh: $1" >&2
  exit 1
}

kernel_package() {
  apt-cache show linux-image-amd64 2>/dev/null | sed -nE 's/^Depends:.*\b(linux-image-[0-9][^ ,]*).*/\1/p' | head -n 1
}

as_root() {
  if ((EUID == 0)); then "$@"; else sudo "$@"; fi
}

# What apt knows about packages may be missing, or so old that the file is gone from the archive: then it is updated.
download() {
  local package
  package=$(kernel_package)
  if [[ -z $package ]] || ! apt-get download -qq "$package" 2>/dev/null; then
    as_root apt-get update -qq
    package=$(kernel_package)
    [[ -n $package ]] || fail "apt knows no package linux-image-amd64"
    apt-get download -qq "$package"
  fi
}

load_order() {
  local version=$1 module
  for module in "${modules[@]}"; do
    modprobe -d . -S "$version" --show-depends "$module"
  done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'
}

prepare() {
  local version files file number=100
  download
  dpkg -x ./*.deb .
  version=$(ls lib/modules)
  depmod -b . "$version"
  mkdir ready ready/modules
  files=$(load_order "$version")
  for file in $files; do
    cp "$file" "ready/modules/$((++number))-${file##*/}"
  done
  cp "boot/vmlinuz-$version" ready/vmlinuz
  cp "$self" ready/made_by
}

(($# == 1)) || fail "usage: kernel.sh FOLDER"
folder=$1
self=$(realpath "${BASH_SOURCE[0]}")
mkdir -p "$(dirname "$folder")"
exec {lock}>"$folder.lock"
flock "$lock" # two runs at a time
if ! cmp -s "$self" "$folder/made_by"; then
  echo "Fetching Debian's kernel package; it is unpacked into $folder, not installed" >&2
  scratch=$(mktemp -d "$folder.XXXXXX")
  trap 'rm -rf "$scratch"' EXIT
  (cd "$scratch" && prepare)
  rm -rf "$folder"
  mv "$scratch/ready" "$folder"
fi
