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
run-peer-pair.sh [OPTION VALUE]... [--secure]

Builds prefill_peer and decode_peer, starts both on this machine, and moves a KV cache from one to the other. Ends
with 0 once it has arrived and the checksums match, otherwise with the exit code of the peer that failed.

  --transport NAME      what carries the pages: tcp (default), rdma, or auto, the best that there is; without an RDMA device, rdma runs in a virtual
                        machine (see tests/soft_roce/run.sh --help)
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
  --secure              encrypts all that goes over TCP, with keys that are made for this run and thrown away
  --corrupt-byte OFFSET fault injection: flips a byte of what arrived
  --log LEVEL           what kvferry logs: debug, info, warning (default), error, off

build/examples/examples/prefill_peer --help explains them, and how large KV caches are.
TEXT
}

fail() {
  echo "run-peer-pair.sh: $2" >&2
  exit "$1"
}

prefill_options=()
decode_options=()
transport=tcp
secure=()
file=
output=
pool_size=
while (($#)); do
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    --secure)
      secure=(--secure "$build/tools/kvferry-keygen")
      shift
      continue
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
      [[ $value == tcp || $value == rdma || $value == auto ]] || fail 2 "--transport: tcp, rdma or auto, not '$value'"
      transport=$value
      ;;
    --file) file=$(realpath -ms -- "$value") ;;
    --output) output=$(realpath -ms -- "$value") ;;
    --mode | --batch) prefill_options+=("$option" "$value") ;;
    --pool-size) pool_size=$value ;;
    --listen | --corrupt-byte) decode_options+=("$option" "$value") ;;
    --model | --tokens | --dtype-bytes | --page-size | --depth | --lanes | --max-rate | --timeout | --connect-timeout | --log)
      prefill_options+=("$option" "$value")
      decode_options+=("$option" "$value")
      ;;
    *) fail 2 "no option '$option' (--help lists the options)" ;;
  esac
done
prefill_options+=(--transport "$transport")
decode_options+=(--transport "$transport")
if [[ -n $file ]]; then
  prefill_options+=(--file "$file")
  pool_size=${pool_size:-$(stat -L -c %s -- "$file" 2>/dev/null)} || fail 7 "cannot read '$file'"
fi
if [[ -n $output ]]; then
  decode_options+=(--output "$output")
fi
if [[ -n $pool_size ]]; then
  decode_options+=(--pool-size "$pool_size")
fi

build_programs() (
  cd "$repository" || exit
  # shellcheck source=scripts/debian_packages.sh
  . scripts/debian_packages.sh || exit
  local with_rdma=AUTO
  if [[ $transport == rdma ]]; then
    kvferry_ensure_packages build rdma || exit
    with_rdma=ON
  else
    kvferry_ensure_packages build || exit
  fi
  if command -v ccache >/dev/null; then
    export CMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER-ccache}
  fi
  # A build folder of its own: the tests, which need more packages, stay out of it.
  cmake --preset release -B "$build" -DKVFERRY_BUILD_TESTS=OFF -DKVFERRY_WITH_RDMA="$with_rdma" || exit
  cmake --build "$build" --target kvferry_prefill_peer kvferry_decode_peer kvferry_keygen --parallel "$(nproc)"
)

mkdir -p "$build"
if [[ ! -x $programs/prefill_peer || ! -x $programs/decode_peer ]]; then
  echo "Building the peers and installing what that needs; later runs start at once" >&2
fi
build_programs >"$build/run-peer-pair.log" 2>&1 || {
  cat "$build/run-peer-pair.log" >&2
  fail 1 "the peers could not be built, see above"
}

exchange=("$repository/examples/peer_pair/exchange.sh" "${secure[@]}" "$programs" "${decode_options[@]}" -- "${prefill_options[@]}")
if [[ $transport != rdma ]]; then
  exec "${exchange[@]}"
fi
writable=()
if [[ -n $output ]]; then
  [[ -d $(dirname "$output") ]] || fail 7 "cannot write '$output'"
  writable=(--writable "$(dirname "$output")")
fi
exec "$repository/tests/soft_roce/run.sh" --timeout 86400 "${writable[@]}" -- "${exchange[@]}"
