#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The package kvferry under the engines that it is for: installs LMCache and what it needs (some 6 GB) into an environment of
# its own, which is kept, and runs the tests in tests/engines. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/debian_packages.sh
kvferry_ensure_packages python

environment=build/engines-environment
if [[ ! -e $environment/complete ]]; then
  "${PYTHON:-python3}" -m venv --clear "$environment"
  "$environment/bin/pip" install --quiet --disable-pip-version-check 'lmcache==0.5.6' 'pytest>=8'
  touch "$environment/complete"
fi
"$environment/bin/pip" install --quiet --disable-pip-version-check --force-reinstall --no-deps \
  -Cbuild-dir=build/python .

"$environment/bin/python" -m pytest -q -W default tests/engines "$@"

# llama.cpp, in C++. Not where arguments say which tests are wanted.
if (($# == 0)); then
  tests/engines_llama.sh
fi
