#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes kvferry's Debian packages, hardened; installs them in a clean Debian of the same release, and builds and runs a program
# there: with CMake's find_package and with pkg-config. Checks that a build in another folder makes the same packages, byte by byte, and the list of what they were made with (SPDX). From any folder, as root; what it makes is in a temporary folder.
#
#   packaging/try_debian_packages.sh [FOLDER]     FOLDER: where the packages are to be kept
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
keep=${1-}

. scripts/debian_packages.sh
kvferry_ensure_packages packaging
scratch=$(mktemp -d)
system=$scratch/system
clean_up() {
  umount "$system/proc" 2>/dev/null || true
  rm -rf "$scratch"
}
trap clean_up EXIT

# The date of everything in the packages: that of the latest commit, or of the changelog where there is no repository.
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || stat --format %Y CHANGELOG.md)
export SOURCE_DATE_EPOCH
hardening="-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3 -fstack-clash-protection"
[[ $(uname -m) != x86_64 ]] || hardening+=" -fcf-protection"
export DEB_BUILD_MAINT_OPTIONS=hardening=+all
# make_packages BUILD_FOLDER PACKAGE_FOLDER. No name of the build's folder may be in what is linked: not as its run path either,
# of which the build id would be another one.
make_packages() {
  CXXFLAGS="$(dpkg-buildflags --get CXXFLAGS) $hardening -g0 -ffile-prefix-map=$1=/build" LDFLAGS=$(dpkg-buildflags --get LDFLAGS) \
    cmake -S . -B "$1" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX=/usr -DBUILD_SHARED_LIBS=ON \
    -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON -DKVFERRY_UNITY_BUILD=ON -DKVFERRY_BUILD_TESTS=OFF -DKVFERRY_BUILD_EXAMPLES=OFF \
    -DKVFERRY_BUILD_BENCHMARKS=OFF
  CCACHE_DISABLE=1 cmake --build "$1" --parallel "$(nproc)"
  (cd "$1" && cpack -B "$2")
}
make_packages "$scratch/build" "$scratch/packages"
make_packages "$scratch/another_build" "$scratch/the_same_packages"
for package in "$scratch"/packages/*.deb; do
  cmp "$package" "$scratch/the_same_packages/${package##*/}"
done

mkdir "$scratch/unpacked"
for package in "$scratch"/packages/*.deb; do
  dpkg-deb --extract "$package" "$scratch/unpacked"
done
all_facts=
while read -r binary; do
  facts=$(readelf --wide --program-headers --dynamic --dyn-syms "$binary")
  for hardened in 'GNU_RELRO' 'NOW' '__stack_chk_fail'; do
    grep -q "$hardened" <<<"$facts" || { echo "$binary has no $hardened" >&2; exit 1; }
  done
  all_facts+=$facts
done < <(find "$scratch/unpacked/usr" -type f \( -name 'libkvferry*.so*' -o -path '*/bin/*' \))
# Not each of them calls a function that has a checked form.
grep -q '[a-z]_chk@' <<<"$all_facts" || { echo "nothing is fortified" >&2; exit 1; }

"${PYTHON:-python3}" -m venv "$scratch/environment"
"$scratch/environment/bin/pip" install --quiet --disable-pip-version-check 'spdx-tools>=0.8,<0.9'
"$scratch/environment/bin/pyspdxtools" --infile "$scratch/unpacked/usr/share/kvferry/kvferry.spdx.json"
[[ -z $keep ]] || cp "$scratch"/packages/*.deb "$keep"

# The mirror and the release that this machine uses.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
debootstrap --variant=minbase "$release" "$system" "$mirror"
mount -t proc proc "$system/proc"
mkdir "$system/packages" "$system/program"
cp "$scratch"/packages/*.deb "$system/packages"
cp tests/consumer/quick_start.cpp "$system/program/"
cat >"$system/program/CMakeLists.txt" <<'CMAKE'
cmake_minimum_required(VERSION 3.25)
project(quick_start LANGUAGES CXX)
find_package(kvferry 0.1 REQUIRED COMPONENTS tcp)
add_executable(quick_start quick_start.cpp)
target_link_libraries(quick_start PRIVATE kvferry::tcp)
CMAKE
in_system() { env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive chroot "$system" "$@"; }
in_system sh -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends /packages/*.deb g++ cmake make pkg-config'
in_system sh -ec '
  cd /program
  cmake -S . -B build >/dev/null && cmake --build build && build/quick_start
  g++ -std=c++20 quick_start.cpp -o with_pkg_config $(pkg-config --cflags --libs kvferry) && ./with_pkg_config
  kvferry-keygen --help >/dev/null
  apt-get purge -y -qq libkvferry-dev >/dev/null
  build/quick_start # with the libraries alone'
echo "The packages work in a clean $release:"
ls "$scratch"/packages/*.deb
