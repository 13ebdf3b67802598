#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes kvferry's Conan package and builds and runs a program with it. What kvferry needs comes from the system, as Debian has
# it, and not from a Conan remote: the versions of those packages are named to Conan as the platform's. What it makes is in a
# temporary folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/debian_packages.sh
kvferry_ensure_packages python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export CONAN_HOME=$scratch/home

"${PYTHON:-python3}" -m venv "$scratch/environment"
"$scratch/environment/bin/pip" install --quiet --disable-pip-version-check 'conan>=2.3,<3'
conan=$scratch/environment/bin/conan
"$conan" profile detect --force >/dev/null
profile=$CONAN_HOME/profiles/default
sed -i 's/^compiler.cppstd=.*/compiler.cppstd=20/' "$profile"

# version_of PACKAGE: without epoch, repacking and revision.
version_of() { dpkg-query --showformat '${Version}' --show "$1" | sed -E 's/^[0-9]+://; s/([~+-]).*//'; }
{
  echo '[platform_requires]'
  while read -r reference package; do
    echo "$reference/$(version_of "$package")"
  done <<'PACKAGES'
asio libasio-dev
msgpack-cxx libmsgpack-cxx-dev
cppzmq cppzmq-dev
zeromq libzmq3-dev
xxhash libxxhash-dev
openssl libssl-dev
PACKAGES
} >>"$profile"

for shared in False True; do
  "$conan" create packaging/conan --no-remote --options "kvferry/*:shared=$shared" \
    --conf "tools.cmake.cmake_layout:test_folder=$scratch/test" --conf tools.cmake.cmaketoolchain:user_presets=
done
echo "The Conan package works, static and shared."
