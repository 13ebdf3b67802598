#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what the wheel is built with where there are no Debian packages: in a container of manylinux_2_34, before cibuildwheel
# builds anything (pyproject.toml). The versions are those of Debian 12, with which kvferry is tested.
#
#   python/manylinux.sh [ARCHIVES]     ARCHIVES: a folder with archives that are then not fetched, as libzmq-4.3.4.tar.gz
#
# $PREFIX is where to, /usr/local by default.
set -euo pipefail
shopt -s inherit_errexit

archives=${1-}
prefix=${PREFIX-/usr/local}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if command -v dnf >/dev/null; then
  dnf install --quiet --assumeyes epel-release
  dnf install --quiet --assumeyes openssl-devel libsodium-devel rdma-core-devel
fi

# source_of PROJECT TAG FOLDER: prints where the source is, FOLDER of a project's archive.
source_of() {
  if [[ -e $archives/$3.tar.gz ]]; then
    tar -xzf "$archives/$3.tar.gz" -C "$scratch"
  else
    curl --fail --silent --show-error --location "https://github.com/$1/archive/refs/tags/$2.tar.gz" | tar -xz -C "$scratch"
  fi
  echo "$scratch/$3"
}

# installed SOURCE OPTION...: by CMake.
installed() {
  cmake -S "$1" -B "$1/build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX="$prefix" -DCMAKE_PREFIX_PATH="$prefix" \
    -DCMAKE_POLICY_VERSION_MINIMUM=3.5 "${@:2}"
  cmake --build "$1/build" --parallel "$(nproc)" --target install
}

mkdir -p "$prefix/include"
source=$(source_of chriskohlhoff/asio asio-1-22-1 asio-asio-1-22-1)
cp -r "$source"/asio/include/asio* "$prefix/include/"
source=$(source_of msgpack/msgpack-c cpp-4.1.3 msgpack-c-cpp-4.1.3)
cp -r "$source"/include/msgpack* "$prefix/include/"
source=$(source_of Cyan4973/xxHash v0.8.1 xxHash-0.8.1)
cp "$source/xxhash.h" "$prefix/include/"
source=$(source_of zeromq/libzmq v4.3.4 libzmq-4.3.4)
installed "$source" -DWITH_LIBSODIUM=ON -DBUILD_STATIC=OFF -DBUILD_TESTS=OFF -DZMQ_BUILD_TESTS=OFF -DWITH_PERF_TOOL=OFF -DWITH_DOCS=OFF
source=$(source_of zeromq/cppzmq v4.9.0 cppzmq-4.9.0)
installed "$source" -DCPPZMQ_BUILD_TESTS=OFF
