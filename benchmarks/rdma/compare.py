#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prints how fast kvferry is over RDMA, beside perftest on the same host with the same sizes and depth.

Needs an RDMA device that reaches itself, perftest and a built transfer_bench. run.sh runs it where there is none.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time

MIB = 1 << 20


def perftest(program, device, gid_index, size, iterations, depth, port):
    """MiB/s of one run."""
    command = [program, "-d", device, "-x", str(gid_index), "-s", str(size), "-n", str(iterations), "-t", str(depth),
               "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            # It says when it listens; its output is buffered, so the client tries until it does.
            for _ in range(600):
                client = subprocess.run(command + ["127.0.0.1"], capture_output=True, text=True, timeout=120)
                line = re.search(rf"^\s*{size}\s+\d+\s+[\d.]+\s+([\d.]+)", client.stdout, re.MULTILINE)
                if line:
                    server.communicate(timeout=60)
                    return float(line.group(1))
                if "Couldn't connect" not in client.stdout + client.stderr:
                    sys.exit(f"{' '.join(command)}: {client.stdout}{client.stderr}")
        finally:
            server.kill()
    sys.exit(f"{' '.join(command)}: no server")


def kvferry(program, operation, page, batch, depth, seconds, extra):
    """MiB/s, CPU seconds per GiB of both sides, and what was under way when a list completed (None: no list completed with more to come), of one run."""
    command = [program, "--transport", "rdma", "--operation", operation, "--page", str(page), "--batch", str(batch),
               "--region", "32M", "--seconds", str(seconds), "--warm-up", "0.3", "--json", "-", *extra]
    if depth > 1:
        command += ["--async", "--depth", str(depth)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    result = json.loads(done.stdout)
    result = result[0] if isinstance(result, list) else result["results"][0]
    moved = result["batches"] * result["batch_pages"] * result["page_bytes"]
    cpu = result["initiator"]["cpu_seconds_per_gib"] + result["target"]["cpu_seconds_per_gib"]
    window = result["window"] if result["window"]["lists"] else None
    return moved / MIB / result["seconds"], cpu, window


def under_way(windows):
    """How much of the window was still with the adapter when a list completed and more was to come, and how often nothing was."""
    lists = sum(window["lists"] for window in windows)
    if not lists:
        return "-"
    left = sum(window["left"] * window["lists"] for window in windows) / lists
    return f"{left:.0%}, {sum(window['drained'] for window in windows)} of {lists}"


def spread(speeds):
    return f"{statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", default="build/release/benchmarks/transfer_bench", help="the program transfer_bench")
    parser.add_argument("--device", default="rxe0")
    parser.add_argument("--gid-index", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5, help="the median of so many counts; programs take turns")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each of kvferry's runs")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    options = parser.parse_args()

    # perftest's default. kvferry gets enough batches of large pages to have as many requests with the adapter all the time.
    depth = 128
    cases = [
        ("write, 64 KiB pages", "ib_write_bw", 65536, 700, "write", 65536, 64, 3, []),
        ("write, 1 MiB pages, one batch of 32", "ib_write_bw", 65536, 700, "write", 1048576, 32, 1, []),
        ("write, 1 MiB pages, one batch of 32, four queue pairs", "ib_write_bw", 65536, 700, "write", 1048576, 32, 1,
         ["--queue-pairs", "4"]),
        ("read, 64 KiB pages", "ib_read_bw", 65536, 700, "read", 65536, 64, 3, []),
        ("write, scattered 4 KiB pages, batches of 256", "ib_write_bw", 4096, 5000, "write", 4096, 256, 1, []),
        ("the same, two batches in flight", "ib_write_bw", 4096, 5000, "write", 4096, 256, 2, []),
        ("write, adjacent 4 KiB pages, two batches of 256 in flight", "ib_write_bw", 4096, 5000, "write", 4096, 256, 2,
         ["--adjacent"]),
    ]
    port = 18515
    rows = []
    outside = []
    for page, batch in ((4096, 1), (4096, 16), (65536, 1), (4096, 32), (131072, 1), (1048576, 1)):
        if options.only not in "outside":
            break
        registered, unregistered = [], []
        for _ in range(options.runs):
            for speeds, extra in ((registered, []), (unregistered, ["--unregistered"])):
                speeds.append(kvferry(options.bench, "write", page, batch, 1, options.seconds / 2, extra)[0])
        outside.append((f"{batch} x {page // 1024} KiB", registered, unregistered))
    for name, program, size, iterations, operation, page, batch, batches, extra in cases:
        if options.only not in name:
            continue
        theirs, ours, cpu, windows = [], [], [], []
        for _ in range(options.runs):
            port += 1
            theirs.append(perftest(program, options.device, options.gid_index, size, iterations, depth, port))
            speed, cpu_seconds, window = kvferry(options.bench, operation, page, batch, batches, options.seconds, extra)
            ours.append(speed)
            cpu.append(cpu_seconds)
            windows += [window] if window else []
        rows.append((name, f"{program} -s {size} -t {depth}", theirs, ours, statistics.median(cpu), under_way(windows)))
        print(f"{name}: done", file=sys.stderr, flush=True)

    print("| kvferry | perftest | perftest MiB/s | kvferry MiB/s | ratio | kvferry CPU s/GiB | window, drained |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, program, theirs, ours, cpu, window in rows:
        ratio = statistics.median(ours) / statistics.median(theirs)
        print(f"| {name} | `{program}` | {spread(theirs)} | {spread(ours)} | {ratio:.2f} | {cpu:.2f} | {window} |")
    if outside:
        print("\n| writes of objects | in a region, MiB/s | outside of every region, MiB/s | ratio |")
        print("| --- | ---: | ---: | ---: |")
    for name, registered, unregistered in outside:
        ratio = statistics.median(unregistered) / statistics.median(registered)
        print(f"| {name} | {spread(registered)} | {spread(unregistered)} | {ratio:.2f} |")
    print(f"\nMedians of {options.runs} runs (lowest to highest), {time.strftime('%Y-%m-%d')}.")


if __name__ == "__main__":
    main()
