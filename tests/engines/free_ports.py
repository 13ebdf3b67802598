# SPDX-License-Identifier: Apache-2.0
"""Ports for what is killed and comes back at the same one."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path


def free_port(count: int = 1) -> int:
    """The first of so many in a row. They are below those that the system gives to whoever asks for any: between a
    process's end and its successor's start no connection takes them."""
    first_of_any = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(1000):
        first = random.randrange(10_000, max(first_of_any, 10_100) - count)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise OSError(f"there are no {count} free ports in a row")


def free_url() -> str:
    return f"127.0.0.1:{free_port()}"
