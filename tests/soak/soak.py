# SPDX-License-Identifier: Apache-2.0
"""Runs tests/soak: several processes that move pages between each other at random, while this kills, stops and restarts them and the
network loses packets. The first process is only stopped now and then: what it uses at the end is compared with what it used when it
had begun. Prints what was done and what came of it; exits 1 if a byte was wrong, a process hung or ended by itself, or memory,
descriptors or threads grew."""
import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import network

LEAST_SAMPLES = 4


class Usage(collections.namedtuple("Usage", "memory descriptors threads")):
    """What a process holds: resident bytes, open descriptors, threads."""

    @classmethod
    def of(cls, pid):
        """None if it is gone."""
        folder = pathlib.Path("/proc") / str(pid)
        try:
            pages = int((folder / "statm").read_text().split()[1])
            return cls(pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(folder / "fd")), len(os.listdir(folder / "task")))
        except (OSError, IndexError):
            return None


class Peer:
    """One place among the processes, and whoever has it now."""

    def __init__(self, number, net, arguments, folder):
        self.number, self.net, self.arguments, self.folder = number, net, arguments, folder
        self.starts = 0
        self.process = None
        self.reports = []
        self.samples = []  # of the process that has the place now
        self.most = Usage(0, 0, 0)  # of all that had it
        self.start()

    def start(self):
        self.starts += 1
        self.samples = []
        self.report = self.folder / f"{self.number}-{self.starts}.json"
        self.reports.append(self.report)
        self.process = subprocess.Popen(
            self.net.at(self.number) +
            [self.arguments.program, "--self", str(self.number), "--urls", *self.net.urls, "--seconds", "86400", "--seed",
             str(self.arguments.seed * 7919 + self.starts), "--lanes", str(self.arguments.lanes), "--report", str(self.report)],
            # From its first moment on: it may be asked to end before it has come to say that it waits for that.
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}))

    def sample(self):
        if (usage := Usage.of(self.process.pid)) is not None and self.process.poll() is None:
            self.samples.append(usage)
            self.most = Usage(*map(max, self.most, usage))

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


class Disturbances:
    def __init__(self, peers, chance, problems):
        self.peers, self.chance, self.problems = peers, chance, problems
        self.counts = collections.Counter()
        self.stopped = []  # (when to continue, process)

    def one(self):
        peer = self.chance.choice(self.peers)
        if peer.process.poll() is not None:
            self.problems.append(f"process {peer.number} ended by itself with {peer.process.returncode}")
            peer.start()
            return
        kind = "stopped for a while"
        if peer.number != 0:
            kind = self.chance.choice(["killed", "killed", kind, "ended and restarted"])
        self.counts[kind] += 1
        if kind == "stopped for a while":
            peer.process.send_signal(signal.SIGSTOP)
            self.stopped.append((time.monotonic() + self.chance.uniform(0.2, 3), peer.process))
            return
        if kind == "killed":
            peer.process.kill()
            peer.process.wait()
        else:
            peer.end(self.problems)
        peer.start()

    def undo(self, until):
        for when, process in [entry for entry in self.stopped if entry[0] <= until]:
            process.send_signal(signal.SIGCONT)
            self.stopped.remove((when, process))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=pathlib.Path, required=True, help="folder of kvferry_soak_peer and kvferry_soak_network")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--loss", type=float, default=0.2, help="per cent of packets; 0 for none")
    parser.add_argument("--pause", type=float, default=2, help="seconds between two disturbances")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--own-network", action="store_true", help="this is a network namespace of the soak's own")
    arguments = parser.parse_args()
    arguments.program = str(arguments.programs / "kvferry_soak_peer")
    return arguments


def main():
    arguments = parse_arguments()
    chance = random.Random(arguments.seed)
    problems = []
    net = network.make(arguments)
    with tempfile.TemporaryDirectory() as folder:
        peers = [Peer(i, net, arguments, pathlib.Path(folder)) for i in range(arguments.processes)]
        disturbances = Disturbances(peers, chance, problems)
        begin = time.monotonic()
        next_one, next_sample = begin + arguments.pause, begin + 1
        while (now := time.monotonic()) < begin + arguments.seconds:
            disturbances.undo(now)
            if now >= next_sample:
                for peer in peers:
                    peer.sample()
                next_sample = now + max(1, arguments.seconds / 600)
            if now >= next_one:
                disturbances.one()
                next_one = now + arguments.pause
            time.sleep(0.05)
        disturbances.undo(float("inf"))
        for peer in peers:
            peer.sample()
        for peer in peers:
            peer.end(problems)
        reports = [json.loads(path.read_text()) for peer in peers for path in peer.reports if path.exists()]
    print(f"{arguments.processes} processes, {arguments.lanes} lanes, {arguments.seconds:.0f} s; {net.end()}")
    print(f"disturbances: {', '.join(f'{n} {kind}' for kind, n in disturbances.counts.items()) or 'none'}; "
          f"{sum(peer.starts for peer in peers)} processes started")
    tell_operations(reports, problems)
    tell_usage(peers, arguments, problems)
    for problem in problems:
        print(f"WRONG: {problem}")
    return 1 if problems else 0


def tell_operations(reports, problems):
    succeeded, failed, logged = collections.Counter(), collections.Counter(), collections.Counter()
    for report in reports:
        succeeded.update(report["succeeded"])
        failed.update(report["failed"])
        logged.update(report["logged"])
    total = lambda field: sum(report[field] for report in reports)
    print(f"operations: {sum(succeeded.values())} succeeded ({', '.join(f'{n} {kind}' for kind, n in sorted(succeeded.items()))})")
    print(f"            {sum(failed.values())} failed")
    for cause, n in sorted(failed.items()):
        print(f"              {n:8} {cause}")
    print(f"warnings logged: {', '.join(f'{n} {event}' for event, n in sorted(logged.items())) or 'none'}")
    print(f"bytes: {total('bytes')} moved, {total('checked_bytes')} checked, {total('corrupt_bytes')} wrong")
    if total("corrupt_bytes"):
        problems.append(f"{total('corrupt_bytes')} wrong bytes")
    if total("unexpected_errors"):
        problems.append(f"{total('unexpected_errors')} errors that no disturbance explains")
    if not total("checked_bytes"):
        problems.append("nothing was checked")


def tell_usage(peers, arguments, problems):
    # The program's own threads, two for each other process and three, and the channel's; each peer's lanes and a handshake
    # that may be under way, listeners, ZeroMQ. Memory: what the pages take, and a bound for all the rest.
    others = arguments.processes - 1
    most = Usage((256 << 20) + arguments.processes * (64 << 20), 64 + arguments.processes * (arguments.lanes * 4 + 16), 32 + 3 * others)
    for field, unit in (("memory", 1 << 20), ("descriptors", 1), ("threads", 1)):
        name = f"{field}{' (MiB)' if unit != 1 else ''}"
        values = [getattr(usage, field) for usage in peers[0].samples]
        # A start is uneven, and each value may be any moment's: the highest of a part is compared with that of a later one.
        part = max(1, len(values) // 4)
        early, late = max(values[part:2 * part], default=0), max(values[-part:], default=0)
        of_others = ", ".join(str(getattr(peer.most, field) // unit) for peer in peers[1:])
        print(f"{name}: process 0: {early // unit} at most early on, {late // unit} at the end; the others {of_others} at most; "
              f"{getattr(most, field) // unit} are allowed")
        if len(values) >= LEAST_SAMPLES and late > early + early // 4 + getattr(Usage(32 << 20, 16, 4), field):
            problems.append(f"{field} of process 0 grew from {early} to {late}")
        for peer in peers:
            if getattr(peer.most, field) > getattr(most, field):
                problems.append(f"{field} of process {peer.number}: {getattr(peer.most, field)}, more than {getattr(most, field)}")


if __name__ == "__main__":
    sys.exit(main())
