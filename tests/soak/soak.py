# SPDX-License-Identifier: Apache-2.0
"""Runs tests/soak: several processes that move pages between each other at random, while this kills, stops and restarts them and the
network drops packets. Prints what was done and what came of it; exits 1 if a byte was wrong, a process hung or ended by itself, or
descriptors or threads were left over."""
import argparse
import collections
import json
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time


class Peer:
    """One place among the processes, and whoever has it now."""

    def __init__(self, number, urls, arguments, folder):
        self.number, self.urls, self.arguments, self.folder = number, urls, arguments, folder
        self.starts = 0
        self.process = None
        self.reports = []
        self.start()

    def start(self):
        self.starts += 1
        self.report = self.folder / f"{self.number}-{self.starts}.json"
        self.reports.append(self.report)
        self.process = subprocess.Popen(
            [self.arguments.program, "--self", str(self.number), "--urls", *self.urls, "--seconds", "86400", "--seed",
             str(self.arguments.seed * 7919 + self.starts), "--lanes", str(self.arguments.lanes), "--report", str(self.report)])

    def end(self, problems):
        """As a service manager does it."""
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(30)
            if code != 0:
                problems.append(f"process {self.number} ended with {code}")
        except subprocess.TimeoutExpired:
            problems.append(f"process {self.number} did not end within 30 s of SIGTERM")
            self.process.kill()
            self.process.wait()


def free_urls(count):
    """Ports that nobody has, below those that the system hands out: a process that is down must find its own free again."""
    ports, sockets = [], []
    port = random.Random(time.time()).randrange(12000, 24000)
    while len(ports) < count:
        port += 1
        one = socket.socket()
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            one.close()
            continue
        ports.append(port)
        sockets.append(one)
    for one in sockets:
        one.close()
    return [f"tcp://127.0.0.1:{port}" for port in ports]


def lose_packets(percent):
    """Whether this network namespace loses packets now; to be called in one of the soak's own."""
    command = ["tc", "qdisc", "replace", "dev", "lo", "root", "netem", "loss", f"{percent}%"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def disturb(peers, chance, counts, problems):
    """One disturbance. Returns what is to be undone and when."""
    peer = chance.choice(peers)
    if peer.process.poll() is not None:
        problems.append(f"process {peer.number} ended by itself with {peer.process.returncode}")
        peer.start()
        return None
    kind = chance.choice(["killed", "killed", "stopped for a while", "ended and restarted"])
    counts[kind] += 1
    if kind == "killed":
        peer.process.kill()
        peer.process.wait()
        peer.start()
    elif kind == "ended and restarted":
        peer.end(problems)
        peer.start()
    else:
        stopped = peer.process
        stopped.send_signal(signal.SIGSTOP)
        return time.monotonic() + chance.uniform(0.2, 3), stopped
    return None


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", required=True, help="kvferry_soak_peer")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--loss", type=float, default=0.2, help="per cent of packets; 0 for none")
    parser.add_argument("--pause", type=float, default=2, help="seconds between two disturbances")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--own-network", action="store_true", help="this is a network namespace of the soak's own")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    chance = random.Random(arguments.seed)
    loses = arguments.own_network and arguments.loss > 0 and lose_packets(arguments.loss)
    counts, problems, undo = collections.Counter(), [], []
    with tempfile.TemporaryDirectory() as folder:
        urls = free_urls(arguments.processes)
        peers = [Peer(i, urls, arguments, pathlib.Path(folder)) for i in range(arguments.processes)]
        end = time.monotonic() + arguments.seconds
        next_one = time.monotonic() + arguments.pause
        while (now := time.monotonic()) < end:
            for when, process in [entry for entry in undo if entry[0] <= now]:
                process.send_signal(signal.SIGCONT)
                undo.remove((when, process))
            if now >= next_one:
                if (later := disturb(peers, chance, counts, problems)) is not None:
                    undo.append(later)
                next_one = now + arguments.pause
            time.sleep(0.05)
        for _, process in undo:
            process.send_signal(signal.SIGCONT)
        for peer in peers:
            peer.end(problems)

        reports = [json.loads(path.read_text()) for peer in peers for path in peer.reports if path.exists()]
        last = [json.loads(peer.report.read_text()) for peer in peers if peer.report.exists()]
    return tell(arguments, loses, counts, problems, reports, last)


def tell(arguments, loses, counts, problems, reports, last):
    succeeded, failed = collections.Counter(), collections.Counter()
    for report in reports:
        succeeded.update(report["succeeded"])
        failed.update(report["failed"])
    total = lambda field: sum(report[field] for report in reports)
    network = f"{arguments.loss} % of packets lost" if loses else "no packets lost" + (": no network namespace with netem here" if arguments.loss else "")
    print(f"{arguments.processes} processes, {arguments.lanes} lanes, {arguments.seconds:.0f} s, {network}")
    print(f"disturbances: {', '.join(f'{n} {kind}' for kind, n in counts.items()) or 'none'}")
    print(f"operations: {sum(succeeded.values())} succeeded ({', '.join(f'{n} {kind}' for kind, n in sorted(succeeded.items()))})")
    print(f"            {sum(failed.values())} failed")
    for cause, n in sorted(failed.items()):
        print(f"              {n:8} {cause}")
    print(f"bytes: {total('bytes')} moved, {total('checked_bytes')} checked, {total('corrupt_bytes')} wrong")
    for field in ("resident_bytes", "descriptors", "threads"):
        print(f"{field.replace('_', ' ')} at the end: {', '.join(str(report[field]) for report in last)}")

    if total("corrupt_bytes"):
        problems.append(f"{total('corrupt_bytes')} wrong bytes")
    if total("unexpected_errors"):
        problems.append(f"{total('unexpected_errors')} errors that no disturbance explains")
    if not total("checked_bytes"):
        problems.append("nothing was checked")
    # Listeners, ZeroMQ, and for each peer its lanes and a handshake that may be under way.
    descriptors = 64 + arguments.processes * (arguments.lanes * 4 + 16)
    for report in last:
        if report["descriptors"] > descriptors:
            problems.append(f"{report['descriptors']} descriptors open, at most {descriptors} expected")
    for problem in problems:
        print(f"WRONG: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
