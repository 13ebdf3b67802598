# SPDX-License-Identifier: Apache-2.0
"""What the processes of tests/soak.sh are joined by."""
import random
import socket
import subprocess
import time


class Loopback:
    """All processes at 127.0.0.1, where the kernel's netem may lose packets."""

    def __init__(self, arguments, what):
        self.what = what
        self.urls = [f"tcp://127.0.0.1:{port}" for port in free_ports(arguments.processes)]

    def at(self, _):
        return []

    def end(self):
        return self.what


class Hosts:
    """Each process on a host of its own, between which kvferry_soak_network loses and delays packets."""

    def __init__(self, arguments):
        self.loss = arguments.loss
        self.program = subprocess.Popen(
            [str(arguments.programs / "kvferry_soak_network"), "--hosts", str(arguments.processes), "--loss", str(arguments.loss),
             "--seed", str(arguments.seed)], stdout=subprocess.PIPE, text=True)
        self.namespaces = self.program.stdout.readline().split()
        self.urls = [f"tcp://10.79.0.{i + 1}:{5555}" for i in range(arguments.processes)]

    def works(self):
        return bool(self.namespaces)

    def at(self, number):
        """What starts a program on a host."""
        return ["nsenter", f"--net=/proc/{self.program.pid}/fd/{self.namespaces[number]}", "--"]

    def end(self):
        self.program.terminate()
        passed, lost, crowded = self.program.stdout.readline().split()
        self.program.wait()
        return (f"this kernel has no netem: packets went through kvferry_soak_network, which passed {passed}, lost {lost} "
                f"({self.loss} %) and had no room for {crowded}")


def make(arguments):
    if arguments.loss == 0:
        return Loopback(arguments, "no packets lost, as was asked for")
    if not arguments.own_network:
        return Loopback(arguments, "NO PACKETS LOST: this may not make a network namespace")
    if netem(arguments.loss):
        return Loopback(arguments, f"netem lost {arguments.loss} % of packets")
    hosts = Hosts(arguments)
    return hosts if hosts.works() else Loopback(arguments, "NO PACKETS LOST: neither netem nor devices of its own work here")


def netem(percent):
    """Whether this network namespace loses packets now; to be called in one of the soak's own."""
    command = ["tc", "qdisc", "replace", "dev", "lo", "root", "netem", "loss", f"{percent}%"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def free_ports(count):
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
    return ports
