# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# A run of several parts, each with its time, and tests that were skipped, counted by reason. To be sourced:
#
#   . scripts/parts.sh
#   kvferry_part NAME COMMAND...    runs a part; its status is the command's
#   kvferry_queue NAME COMMAND...   runs it beside what follows, after all that was queued before, and shows its output
#                                   when it is done
#   kvferry_parts_end               waits for what was queued, and reports; its status says whether all parts succeeded
#
# The report begins with what failed, and its last lines are those of the part with the most tests, as ctest printed them.

kvferry_parts=$(mktemp -d)
trap 'rm -rf "$kvferry_parts"' EXIT
trap 'trap - TERM; kill 0' INT TERM # what was queued, too
kvferry_part_count=0
kvferry_started=$SECONDS
kvferry_queued=()
# Test programs note there what they skip (kvferry/testing/run_main.hpp).
export KVFERRY_SKIP_REPORT=$kvferry_parts/skipped
: >"$KVFERRY_SKIP_REPORT"

# NUMBER NAME COMMAND...
_kvferry_run_part() {
  local number=$1 name=$2 start=$SECONDS status=0 TIMEFORMAT='%3U %3S' user system
  shift 2
  printf '\n== %s\n' "$name"
  { time { "$@" 2>&1 | tee "$kvferry_parts/$number.log"; }; } 2>"$kvferry_parts/$number.cpu" || status=$?
  read -r user system < <(tail -n 1 "$kvferry_parts/$number.cpu")
  printf '%s\t%s\t%s\t%s\n' "$((SECONDS - start))" \
    "$(((10#${user//[.,]/} + 10#${system//[.,]/} + 500) / 1000))" "$status" "$name" >"$kvferry_parts/$number.part"
  return "$status"
}

# In a shell of its own: the time of this one's children has that of what was queued as well.
kvferry_part() {
  ((++kvferry_part_count))
  (
    trap - EXIT
    _kvferry_run_part "$(printf %02d "$kvferry_part_count")" "$@"
  )
}

kvferry_queue() {
  ((++kvferry_part_count))
  local number before=
  if ((${#kvferry_queued[@]})); then
    before=${kvferry_queued[-1]}
  fi
  number=$(printf %02d "$kvferry_part_count")
  (
    trap - EXIT
    if [[ -n $before ]]; then
      tail --pid="$before" -f /dev/null
    fi
    status=0
    _kvferry_run_part "$number" "$@" >"$kvferry_parts/$number.output" || status=$?
    cat "$kvferry_parts/$number.output"
    exit "$status"
  ) &
  kvferry_queued+=("$!")
}

# Of each part that failed, the lines that say how, out of a log that may be long.
_kvferry_failures() {
  local file seconds cpu status name
  for file in "$kvferry_parts"/*.part; do
    IFS=$'\t' read -r seconds cpu status name <"$file"
    if ((status != 0)); then
      printf '\n== Failed: %s\n' "$name"
      grep -E -A 12 "$kvferry_failure_lines" "${file%.part}.log" | cut -c 1-300 | head -n 80 || true
    fi
  done
}
# GoogleTest's, the sanitizers', a test program that threw or died, pytest's, a compiler's.
kvferry_failure_lines=': Failure$|unknown file: Failure|^==[0-9]+==ERROR|WARNING: ThreadSanitizer|: runtime error: '
kvferry_failure_lines+='|terminate called|\*\*\*(Timeout|Exception)|^E  |: (fatal )?error: '

_kvferry_report() {
  local file seconds cpu status name most=0 tests closing=
  _kvferry_failures
  printf '\n== Times: passed, and of processors\n'
  for file in "$kvferry_parts"/*.part; do
    IFS=$'\t' read -r seconds cpu status name <"$file"
    printf '%6d s %6d s  %s%s\n' "$seconds" "$cpu" "$name" "$( ((status == 0)) || echo ": FAILED")"
    tests=$(sed -n 's/.* tests failed out of \([0-9]*\)$/\1/p' "${file%.part}.log" | tail -n 1)
    if ((${tests:-0} > most)); then
      most=$tests closing=${file%.part}.log
    fi
  done
  printf '%6d s           in all%s\n' "$((SECONDS - kvferry_started))" \
    "$( ((${#kvferry_queued[@]} == 0)) || echo "; some parts ran at the same time")"

  printf '\n== Skipped tests: %d\n' "$(wc -l <"$KVFERRY_SKIP_REPORT")"
  if [[ -s $KVFERRY_SKIP_REPORT ]]; then
    cut -f 1 "$KVFERRY_SKIP_REPORT" | sort | uniq -c | sort -rn
  fi
  if [[ -n $closing ]]; then
    printf '\n'
    sed -n '/ tests passed, .* tests failed out of /,$p' "$closing"
  fi
}

kvferry_parts_end() {
  local process failed=0
  for process in "${kvferry_queued[@]}"; do
    wait "$process" || failed=1
  done
  _kvferry_report
  ! grep -qvP '^\d+\t\d+\t0\t' "$kvferry_parts"/*.part && ((!failed))
}
