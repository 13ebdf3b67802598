#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# exchange.sh [--secure KEYGEN] FOLDER DECODE_OPTION... -- PREFILL_OPTION...: starts FOLDER's decode_peer and prefill_peer on this machine
# and connects them. For run-peer-pair.sh, which builds them, and says what the exit code means.
set -euo pipefail
keygen=
if [[ $1 == --secure ]]; then
  keygen=$2
  shift 2
fi
programs=$1
shift
decode_options=()
while [[ $1 != -- ]]; do
  decode_options+=("$1")
  shift
done
shift
prefill_options=("$@")

# Of the loopback address, which decode_peer takes by itself, no RDMA device knows.
if [[ -n ${KVFERRY_RAIL0-} && " ${decode_options[*]} " != *" --listen "* ]]; then
  decode_options+=(--listen "$KVFERRY_RAIL0:0")
fi

decode_pid=
prefill_pid=
keys=

# Whatever ends this script ends both peers: asked first, then made to.
# shellcheck disable=SC2317 # called by the trap
end_peers() {
  local pid
  trap '' INT TERM
  for pid in $prefill_pid $decode_pid; do
    kill -TERM "$pid" 2>/dev/null || true
  done
  for pid in $prefill_pid $decode_pid; do
    timeout 10 tail --pid="$pid" -s 0.1 -f /dev/null || kill -KILL "$pid" 2>/dev/null || true
  done
  [[ -z $keys ]] || rm -rf "$keys"
}
trap end_peers EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [[ -n $keygen ]]; then
  keys=$(mktemp -d)
  "$keygen" "$keys/decode.key" decode >"$keys/for_prefill"
  "$keygen" "$keys/prefill.key" prefill >"$keys/for_decode"
  decode_options+=(--key "$keys/decode.key" --peer-keys "$keys/for_decode")
  prefill_options+=(--key "$keys/prefill.key" --peer-keys "$keys/for_prefill")
fi

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
  echo "exchange.sh: decode_peer ended before it listened" >&2
  exit 1
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
