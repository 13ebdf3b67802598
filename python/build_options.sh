# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# To be sourced in the root of the checkout, by scripts that build the package: takes `--installed PREFIX` off their arguments,
# and leaves in `options` what pip is told. With --installed the extension is built on the kvferry that is installed there,
# instead of compiling the library again.

. scripts/debian_packages.sh
kvferry_ensure_packages python

options=("-Cbuild-dir=build/python/{cache_tag}")
if [[ ${1-} == --installed ]]; then
  options=("-Cbuild-dir=build/python-on-installed/{cache_tag}" "-Ccmake.define.kvferry_ROOT=$(realpath "$2")"
    -Ccmake.define.KVFERRY_PYTHON_USE_INSTALLED=ON)
  shift 2
fi
