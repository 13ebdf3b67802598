#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the Python package into an environment of its own and tests it there, by pytest and mypy. Arguments go to pytest.
#
#   python/test.sh [--installed PREFIX] [PYTEST ARGUMENT...]
#
# --installed: see python/build_options.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. python/build_options.sh

environment=build/python-environment
python=${PYTHON:-python3}
"$python" -m venv --clear "$environment"
"$environment/bin/pip" install --quiet --disable-pip-version-check 'pip>=23.1' # of CPython 3.10 it knows no -C
"$environment/bin/pip" install --quiet --disable-pip-version-check "${options[@]}" \
  -Ccmake.define.KVFERRY_WARNINGS_AS_ERRORS=ON ".[test]"

"$environment/bin/mypy" --config-file pyproject.toml python/kvferry python/tests python/benchmarks
"$environment/bin/python" -X faulthandler -m pytest "$@"
