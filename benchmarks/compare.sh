#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measures kvferry beside plain sockets, memcpy, iperf3 and other libraries, all in one run: builds what is to be measured,
# installing what is missing on Debian 12, and leaves tables and plots. From any folder; --help lists the options.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$repository/build/benchmarks
python=/usr/bin/python3 # The one that Debian's python3-matplotlib is for.

for option in "$@"; do
  if [[ $option == -h || $option == --help ]]; then
    exec "$python" "$repository/benchmarks/compare/run.py" --help
  fi
done

cd "$repository"
# shellcheck source=scripts/debian_packages.sh
. scripts/debian_packages.sh
kvferry_ensure_packages bench
if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER-ccache}
fi
cmake --preset release -B "$build" -DKVFERRY_BUILD_TESTS=OFF -DKVFERRY_BUILD_EXAMPLES=OFF >/dev/null
cmake --build "$build" --target benchmarks/all --parallel "$(nproc)" >&2
cd - >/dev/null
exec "$python" "$repository/benchmarks/compare/run.py" --programs-in "$build/benchmarks" --results "$build/results" "$@"
