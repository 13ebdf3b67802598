# SPDX-License-Identifier: Apache-2.0
"""What is measured: programs (rows) and sizes (columns)."""

import dataclasses
import re

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A page size and a batch size, written "64Kx16"."""

    page: int
    batch: int

    @staticmethod
    def parse(text):
        match = re.fullmatch(r"(\d+)([KM]?)x(\d+)", text)
        if not match:
            raise ValueError(f"'{text}' is not a cell like 64Kx16")
        return Cell(int(match[1]) * UNITS[match[2]], int(match[3]))

    def __str__(self):
        return f"{readable_size(self.page)}x{self.batch}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A program with options."""

    name: str
    command: tuple
    kind: str  # kvferry, socket, peer, or memory
    operation: str = "write"
    smallest_batch: int = 1
    region: str = ""  # memory on each side; empty: what compare.sh was told


def readable_size(size):
    for unit in ("M", "K"):
        if size % UNITS[unit] == 0:
            return f"{size // UNITS[unit]}{unit}"
    return str(size)


THROUGHPUT_CELLS = "4Kx256 16Kx64 64Kx64 256Kx64 1Mx16 4Mx16".split()
LATENCY_CELLS = "4Kx1 64Kx1 1Mx1".split()

POLL_PROFILES = ("never", "adaptive", "always")


def rows():
    """All rows, in the order of the tables."""

    def kvferry(name, *options, operation="write"):
        return Row(name, ("transfer_bench", "--operation", operation, *options), "kvferry", operation)

    def socket(name, *options, operation="write", streams=1):
        command = ("raw_socket_bench", "--operation", operation, "--lanes", str(streams), *options)
        return Row(name, command, "socket", operation, smallest_batch=streams)

    def peer(name, program, operation="write"):
        return Row(name, (program, "--operation", operation), "peer", operation)

    result = [
        kvferry("kvferry write"),
        kvferry("kvferry read", operation="read"),
        kvferry("kvferry sendrecv", operation="sendrecv"),
    ]
    result += [
        kvferry("kvferry shm write", "--transport", "shm"),
        kvferry("kvferry shm read", "--transport", "shm", operation="read"),
        kvferry("kvferry shm sendrecv", "--transport", "shm", operation="sendrecv"),
    ]
    result += [
        kvferry("kvferry write, cubic", "--congestion", "cubic"),
        kvferry("kvferry read, cubic", "--congestion", "cubic", operation="read"),
        kvferry("kvferry sendrecv, cubic", "--congestion", "cubic", operation="sendrecv"),
    ]
    result += [kvferry(f"kvferry write, poll {profile}", "--poll", profile) for profile in POLL_PROFILES]
    result += [
        socket("socket polling write", "--mode", "polling", "--congestion", "reno"),
        socket("socket polling read", "--mode", "polling", "--congestion", "reno", operation="read"),
        socket("socket polling write, cubic", "--mode", "polling", "--congestion", "cubic"),
        socket("socket polling read, cubic", "--mode", "polling", "--congestion", "cubic", operation="read"),
        socket("socket polling write, 2 streams", "--mode", "polling", "--congestion", "reno", streams=2),
        socket("socket blocking write", "--mode", "blocking", "--congestion", "reno"),
        socket("socket blocking read", "--mode", "blocking", "--congestion", "reno", operation="read"),
        socket("socket blocking write, cubic", "--mode", "blocking", "--congestion", "cubic"),
        socket("socket blocking read, cubic", "--mode", "blocking", "--congestion", "cubic", operation="read"),
        peer("ucx write", "ucx_bench"),
        peer("ucx read", "ucx_bench", operation="read"),
        peer("libfabric write", "libfabric_bench"),
        peer("libfabric read", "libfabric_bench", operation="read"),
        peer("zeromq write", "zeromq_bench"),
        Row("memcpy", ("memcpy_bench",), "memory"),
        Row("memcpy, handed over", ("memcpy_bench", "--hand-over"), "memory"),
    ]
    return result
