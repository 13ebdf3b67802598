#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the Python package into an environment of its own and tests it there, by pytest and mypy. Arguments go to pytest.
#
#   python/test.sh [--installed PREFIX] [PYTEST ARGUMENT...]
#
# --installed: the extension is built on the kvferry that is installed there, instead of compiling the library again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/debian_packages.sh
kvferry_ensure_packages python

options=("-Cbuild-dir=build/python")
if [[ ${1-} == --installed ]]; then
  options=("-Cbuild-dir=build/python-on-installed" "-Ccmake.define.kvferry_ROOT=$(realpath "$2")"
    -Ccmake.define.KVFERRY_PYTHON_USE_INSTALLED=ON)
  shift 2
fi

environment=build/python-environment
python=${PYTHON:-python3}
"$python" -m venv --clear "$environment"
"$environment/bin/pip" install --quiet --disable-pip-version-check "${options[@]}" \
  -Ccmake.define.KVFERRY_WARNINGS_AS_ERRORS=ON ".[test]"

"$environment/bin/mypy" --config-file pyproject.toml python/kvferry python/tests python/benchmarks
"$environment/bin/python" -X faulthandler -m pytest "$@"
