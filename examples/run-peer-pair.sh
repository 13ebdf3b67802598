#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the peer pair and moves a KV cache from prefill_peer to decode_peer over loopback. From any folder, on a
# Debian 12 that needs nothing but this checkout. --help lists the options.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$repository/build/examples
programs=$build/examples

usage() {
  cat <<'TEXT'
run-peer-pair.sh [OPTION VALUE]...

Builds prefill_peer and decode_peer, starts both on this machine, and moves a KV cache from one to the other. Ends
with 0 once it has arrived and the checksums match, otherwise with the exit code of the peer that failed.

  --transport NAME      what carries the pages; only tcp (default)
  --mode MODE           write (default), read or sendrecv
  --model NAME          llama-3.1-8b (default), llama-3.1-70b, qwen2.5-7b, deepseek-v3
  --tokens N            how many tokens are cached (default 1024)
  --dtype-bytes N       bytes of one number (default 2)
  --file PATH           move this file's bytes instead of generated ones
  --output PATH         write what arrived to this file
  --page-size SIZE      bytes of a page (default: 16 tokens of one layer)
  --pool-size SIZE      bytes of decode's pool of pages (default: what the cache takes)
  --batch N             pages in a batch (default 256)
  --depth N             batches in flight at a time (default 4)
  --lanes N             TCP connections for the pages (default 1)
  --max-rate SIZE       bytes a second at most
  --timeout SECONDS     what each peer may take for a step (default 30)
  --connect-timeout SECONDS  the same before the first batch (default: --timeout)
  --listen HOST:PORT    where decode_peer listens (default 127.0.0.1:0, any free port)
  --corrupt-byte OFFSET fault injection: flips a byte of what arrived

build/examples/examples/prefill_peer --help explains them, and how large KV caches are.
TEXT
}

fail() {
  echo "run-peer-pair.sh: $2" >&2
  exit "$1"
}

prefill_options=()
decode_options=()
file=
pool_size=
while (($#)); do
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    --*=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
  esac
  option=$1
  (($# >= 2)) || fail 2 "$option needs a value (--help lists the options)"
  value=$2
  shift 2
  case "$option" in
    --transport)
      [[ $value == tcp ]] || fail 2 "--transport: '$value' is not available, the peer pair moves pages over tcp only"
      ;;
    --file)
      file=$value
      prefill_options+=("$option" "$value")
      ;;
    --mode | --batch) prefill_options+=("$option" "$value") ;;
    --pool-size) pool_size=$value ;;
    --output | --listen | --corrupt-byte) decode_options+=("$option" "$value") ;;
    --model | --tokens | --dtype-bytes | --page-size | --depth | --lanes | --max-rate | --timeout | --connect-timeout)
      prefill_options+=("$option" "$value")
      decode_options+=("$option" "$value")
      ;;
    *) fail 2 "no option '$option' (--help lists the options)" ;;
  esac
done
if [[ -z $pool_size && -n $file ]]; then
  pool_size=$(stat -L -c %s -- "$file" 2>/dev/null) || fail 7 "cannot read '$file'"
fi
if [[ -n $pool_size ]]; then
  decode_options+=(--pool-size "$pool_size")
fi

build_programs() (
  cd "$repository" || exit
  # shellcheck source=scripts/debian_packages.sh
  . scripts/debian_packages.sh || exit
  kvferry_ensure_packages build || exit
  if command -v ccache >/dev/null; then
    export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER-ccache}
  fi
  # A build folder of its own: the tests, which need more packages, stay out of it.
  cmake --preset release -B "$build" -DKVFERRY_BUILD_TESTS=OFF || exit
  cmake --build "$build" --target kvferry_prefill_peer kvferry_decode_peer --parallel "$(nproc)"
)

decode_pid=
prefill_pid=

# Whatever ends this script ends both peers: asked first, then made to.
end_peers() {
  local pid
  trap '' INT TERM
  for pid in $prefill_pid $decode_pid; do
    kill -TERM "$pid" 2>/dev/null || true
  done
  for pid in $prefill_pid $decode_pid; do
    timeout 10 tail --pid="$pid" -s 0.1 -f /dev/null || kill -KILL "$pid" 2>/dev/null || true
  done
}
trap end_peers EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

mkdir -p "$build"
if [[ ! -x $programs/prefill_peer || ! -x $programs/decode_peer ]]; then
  echo "Building the peers and installing what that needs; later runs start at once" >&2
fi
build_programs >"$build/run-peer-pair.log" 2>&1 || {
  cat "$build/run-peer-pair.log" >&2
  fail 1 "the peers could not be built, see above"
}

# Decode's stderr is no terminal, so that only one of the two draws a progress bar.
exec {decode_output}< <(exec "$programs/decode_peer" "${decode_options[@]}" 2> >(exec cat >&2))
decode_pid=$!
url=
while [[ -z $url ]] && read -r line <&"$decode_output"; do
  echo "$line"
  if [[ $line == *' listening on '* ]]; then
    url=${line##* }
  fi
done
if [[ -z $url ]]; then
  wait "$decode_pid" || exit $?
  fail 1 "decode_peer ended before it listened"
fi
cat <&"$decode_output" &
cat_pid=$!

"$programs/prefill_peer" --connect "$url" "${prefill_options[@]}" &
prefill_pid=$!
prefill_code=0
wait "$prefill_pid" || prefill_code=$?
prefill_pid=

# After these, decode ends by itself, and has something to say. After others it may never have met a peer.
case $prefill_code in
  0 | 5 | 6) ;;
  *) exit "$prefill_code" ;;
esac
decode_code=0
wait "$decode_pid" || decode_code=$?
decode_pid=
wait "$cat_pid"
((prefill_code == 0)) || exit "$prefill_code"
exit "$decode_code"
