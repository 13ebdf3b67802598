# SPDX-License-Identifier: Apache-2.0
"""Plain sockets by system calls and by io_uring, over loopback and over a pair of virtual network interfaces; see uring.sh."""

import argparse
import ipaddress
import json
import os
import statistics
import subprocess

IO = ("calls", "ring", "ring-zero-copy")
NAMESPACE = f"kvferry-uring-{os.getpid()}"
NEAR, FAR = f"kvf{os.getpid()}a", f"kvf{os.getpid()}b"
# Of a network of this run's own, out of those for measurements (RFC 2544).
NETWORK = ipaddress.ip_network("198.18.0.0/15")
HERE, THERE = list(list(NETWORK.subnets(new_prefix=30))[os.getpid() % 2**15].hosts())
PORT = 7000


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


def make_pair():
    """A namespace with one of two interfaces, and the other one here."""
    ip("netns", "add", NAMESPACE)
    ip("link", "add", NEAR, "type", "veth", "peer", "name", FAR, "netns", NAMESPACE)
    ip("address", "add", f"{HERE}/30", "dev", NEAR)
    ip("link", "set", NEAR, "up")
    ip("-n", NAMESPACE, "address", "add", f"{THERE}/30", "dev", FAR)
    ip("-n", NAMESPACE, "link", "set", FAR, "up")


def run(program, place, cell, operation, io, seconds):
    page, batch = cell.split("x")
    options = ["--operation", operation, "--page", page, "--batch", batch, "--seconds", str(seconds), "--mode", "blocking"]
    # kvferry's choice on one host; the system's may pace, which hides what is looked for.
    options += ["--congestion", "reno", "--io", io, "--region", "256M", "--json", "-"]
    if place == "loopback":
        done = subprocess.run([program, *options], capture_output=True, text=True, check=True, timeout=60)
    else:
        listen = ["ip", "netns", "exec", NAMESPACE, program, "--listen", f"{THERE}:{PORT}"]
        with subprocess.Popen(listen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as target:
            try:
                target.stdout.readline()  # that it listens
                done = subprocess.run(
                    [program, "--connect", f"{THERE}:{PORT}", *options], capture_output=True, text=True, check=True, timeout=60
                )
            except BaseException:
                target.kill()
                raise
    result = json.loads(done.stdout)[0]
    if not result["verified"]:
        raise RuntimeError(f"{cell} {operation} by {io} over {place}: pages are wrong")
    return result["gigabytes_per_second"], sum(result[side]["cpu_seconds_per_gib"] for side in ("initiator", "target"))


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--cells", nargs="+", default=["4Kx256", "64Kx64", "256Kx64", "1Mx16"])
    arguments = parser.parse_args()

    places = ["loopback"]
    if os.geteuid() == 0:
        places.append("veth")
    else:
        print("Over loopback alone: a pair of interfaces takes root.")
    keys = [(p, c, o) for p in places for c in arguments.cells for o in ("write", "read")]
    seen = {}
    try:
        if "veth" in places:
            make_pair()
        for _ in range(arguments.rounds):
            for key in keys:
                for io in IO:
                    seen.setdefault((*key, io), []).append(run(arguments.program, *key, io, arguments.seconds))
    finally:
        if "veth" in places:
            subprocess.run(["ip", "netns", "del", NAMESPACE], check=False)

    print(f"Medians of {arguments.rounds} interleaved rounds (least to most). Ratios are of medians, to system calls.\n")
    print("| over | cell | operation | by | GB/s | ratio | CPU-seconds a GiB, both sides | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for key in keys:
        speed, cpu = ([statistics.median(one[i] for one in seen[(*key, "calls")]) for i in (0, 1)])
        for io in IO:
            speeds, cpus = zip(*seen[(*key, io)])
            ratios = [f"{statistics.median(speeds) / speed:.2f}", f"{statistics.median(cpus) / cpu:.2f}"]
            print("|", " | ".join([*key, io, spread(speeds), ratios[0], spread(cpus), ratios[1]]), "|")


main()
