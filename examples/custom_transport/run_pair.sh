#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Starts both sides of unix_pair, at a port that the system chooses: run_pair.sh PROGRAM
set -euo pipefail
exec {said}< <("$1" decode tcp://127.0.0.1:0)
pid=$!
read -r url <&"$said"
"$1" prefill "$url"
wait "$pid"
