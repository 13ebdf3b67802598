#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# How long a program's file takes to compile that includes kvferry: the README's program, with the library linked and with
# all of kvferry in the file, beside a file that includes only Asio. Medians of user seconds, unoptimised and at -O2.
# With --parts: where the seconds go header-only and unoptimised. Without generating code, with it, and to which namespaces the
# functions belong that are generated.
#
#   benchmarks/compile_times.sh [--parts] [ROUNDS [COMPILER]...]     3 if not given, g++ and clang++; needs a configured build in
#                                                                    build/release
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
parts=
if [[ ${1-} == --parts ]]; then
  parts=1
  shift
fi
rounds=${1:-3}
compilers=("${@:2}")
((${#compilers[@]})) || compilers=(g++ clang++)
generated=build/release/include
[[ -f $generated/kvferry/version.hpp ]] || {
  echo "compile_times.sh: no $generated: run cmake --preset release first" >&2
  exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
printf '#include <asio.hpp>\nint main() {}\n' >"$folder/asio.cpp"
program=tests/consumer/quick_start.cpp

# seconds COMMAND...: user seconds that it took
seconds() {
  local TIMEFORMAT=%U
  { time "$@" >/dev/null; } 2>&1 | tail -1
}

median() { sort -n | sed -n "$(((rounds + 1) / 2))p"; }

# Each function has a section, named after it. A function's mangled name begins with its namespace.
namespaces() {
  readelf -SW "$1" | grep -oE '\.text\.(unlikely\.)?_Z\S+' | sed 's/\.unlikely//' | sort -u | sed -E '
    s/^\.text\._ZT.*/another/; s/^\.text\._Z+(N?K?R?)//
    s/^(St|S[absiod]|9__gnu_cxx|nw|dl).*/std/; s/^[0-9]+asio.*/asio/; s/^(7msgpack|3zmq).*/msgpack and zmq/; s/^7kvferry.*/kvferry/
    /^(std|asio|msgpack and zmq|kvferry|another)$/!s/.*/another/'
}

if [[ $parts ]]; then
  for compiler in "${compilers[@]}"; do
    command -v "$compiler" >/dev/null || continue
    base=("$compiler" -std=c++20 -O0 -Iinclude "-I$generated" -DASIO_STANDALONE -DASIO_HAS_STD_ALIGNED_ALLOC=1
      -DMSGPACK_NO_BOOST -DKVFERRY_HEADER_ONLY=1 -ffunction-sections)
    for ((round = 0; round < rounds; ++round)); do
      seconds "${base[@]}" -fsyntax-only "$program" >>"$folder/parsed"
      seconds "${base[@]}" -c -o "$folder/out.o" "$program" >>"$folder/compiled"
    done
    namespaces "$folder/out.o" >"$folder/functions"
    printf '%s -O0, header-only: %s s, without generating code %s s; %d functions\n' "$compiler" "$(median <"$folder/compiled")" \
      "$(median <"$folder/parsed")" "$(wc -l <"$folder/functions")"
    sort "$folder/functions" | uniq -c | sort -rn
    rm -f "$folder"/{parsed,compiled}
  done
  exit
fi

printf '%-10s %-4s %10s %10s %12s\n' compiler flag asio.hpp linked header-only
for compiler in "${compilers[@]}"; do
  command -v "$compiler" >/dev/null || continue
  for flag in -O0 -O2; do
    base=("$compiler" -std=c++20 "$flag" -Iinclude "-I$generated" -DASIO_STANDALONE -DASIO_HAS_STD_ALIGNED_ALLOC=1
      -DMSGPACK_NO_BOOST -c -o "$folder/out.o")
    for ((round = 0; round < rounds; ++round)); do
      seconds "${base[@]}" "$folder/asio.cpp" >>"$folder/asio"
      seconds "${base[@]}" "$program" >>"$folder/linked"
      seconds "${base[@]}" -DKVFERRY_HEADER_ONLY=1 "$program" >>"$folder/header_only"
    done
    printf '%-10s %-4s %10s %10s %12s\n' "$compiler" "$flag" "$(median <"$folder/asio")" "$(median <"$folder/linked")" \
      "$(median <"$folder/header_only")"
    rm -f "$folder"/{asio,linked,header_only}
  done
done
