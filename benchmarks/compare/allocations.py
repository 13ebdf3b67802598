# SPDX-License-Identifier: Apache-2.0
"""What transfer_bench allocates, and which calls it makes; see allocations.sh."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time

ITERATIONS = 1000
PEERS = 33
PATIENCE = 60  # seconds until the other half listens
UNITS = {"B": 1, "K": 1000, "M": 1000**2, "G": 1000**3}  # heaptrack's


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def heaptrack(folder, command):
    return ["heaptrack", "--output", str(folder / "heap"), *command]


def run(program, tracked, *options):
    """Runs both halves, one of them under heaptrack. Returns its calls of allocation functions and its peak, in bytes."""
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        target = [program, "--listen", address]
        initiator = [program, "--connect", address, "--region", "64M", "--warm-up", "0", *options]
        if tracked == "target":
            target = heaptrack(folder, target)
        else:
            initiator = heaptrack(folder, initiator)
        with subprocess.Popen(target, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as other:
            until = time.monotonic() + PATIENCE
            while True:
                done = subprocess.run(initiator, capture_output=True, text=True, timeout=120)
                if "refused" not in done.stdout + done.stderr or time.monotonic() > until:
                    break
            if done.returncode != 0:
                other.kill()
                sys.exit(f"{' '.join(initiator)}: {done.stdout}{done.stderr}")
            other.communicate(timeout=60)
        (recorded,) = folder.glob("heap*")
        printed = subprocess.run(["heaptrack_print", str(recorded)], capture_output=True, text=True, check=True).stdout
    calls = int(re.search(r"calls to allocation functions: (\d+)", printed)[1])
    peak = re.search(r"peak heap memory consumption: ([\d.]+)([BKMG])", printed)
    return calls, float(peak[1]) * UNITS[peak[2]]


def allocations_of_a_batch(program, tracked, *options):
    """Those of a long run less those of a short one."""
    few, _ = run(program, tracked, "--iterations", "100", *options)
    many, _ = run(program, tracked, "--iterations", str(100 + ITERATIONS), *options)
    return (many - few) / ITERATIONS


def counted(program, counter, operation, iterations):
    """Runs both halves, each on a CPU of its own, with their calls counted. Returns the counts of the initiator and the target."""
    environment = dict(os.environ, LD_PRELOAD=counter)
    cpus = sorted(os.sched_getaffinity(0))
    address = f"127.0.0.1:{free_port()}"
    target = ["taskset", "--cpu-list", str(cpus[0]), program, "--listen", address]
    initiator = ["taskset", "--cpu-list", str(cpus[-1]), program, "--connect", address, "--operation", operation]
    initiator += ["--page", "4096", "--batch", "1", "--poll", "always", "--region", "64M", "--warm-up", "0"]
    with subprocess.Popen(target, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment) as other:
        until = time.monotonic() + PATIENCE
        while True:
            command = [*initiator, "--iterations", str(iterations)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
            if "refused" not in done.stdout + done.stderr or time.monotonic() > until:
                break
        if done.returncode != 0:
            other.kill()
            sys.exit(f"{' '.join(initiator)}: {done.stdout}{done.stderr}")
        _, said = other.communicate(timeout=60)
    return [{name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", text)} for text in (done.stderr, said)]


def print_calls(program, counter):
    print("\n| calls of a blocking operation of 4 KiB, always polling | epoll_ctl | mutexes locked | tried | clock read | allocations |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for operation in ("write", "read"):
        few, many = (counted(program, counter, operation, iterations) for iterations in (ITERATIONS, 21 * ITERATIONS))
        for side, less, more in zip(("initiator", "target"), few, many):
            names = ("epoll_ctls", "mutex_locks", "mutex_tries", "clock_reads", "allocations")
            calls = ((more[name] - less[name]) / (20 * ITERATIONS) for name in names)
            print(f"| {operation}, {side} | " + " | ".join(f"{number:.2f}" for number in calls) + " |", flush=True)


def main():
    program, counter = sys.argv[1:]
    print("| calls of allocation functions | of a batch of 16 pages | of a batch of 256 | of a page more |")
    print("| --- | ---: | ---: | ---: |")
    for operation in ("write", "read", "sendrecv"):
        for tracked in ("initiator", "target"):
            options = ("--operation", operation, "--page", "4096", "--batch")
            small, large = (allocations_of_a_batch(program, tracked, *options, batch) for batch in ("16", "256"))
            print(f"| {operation}, {tracked} | {small:.2f} | {large:.2f} | {(large - small) / 240:.4f} |", flush=True)
    peaks = [
        run(program, "initiator", "--async", "--page", "64K", "--batch", "16", "--iterations", "50", "--peers", peers)[1]
        for peers in ("1", str(PEERS))
    ]
    print(f"\nThe initiator's heap at its largest: {peaks[0] / 1024:.0f} KiB with one peer, {peaks[1] / 1024:.0f} KiB with {PEERS}: "
          f"{(peaks[1] - peaks[0]) / (PEERS - 1) / 1024:.1f} KiB a peer, what the benchmark keeps for it included.")  # fmt: skip
    print_calls(program, counter)


if __name__ == "__main__":
    main()
