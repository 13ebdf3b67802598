# SPDX-License-Identifier: Apache-2.0
"""LMCache's own benchmark of transfer channels, in two processes: 32 objects of 1 MiB, whose bytes are compared.

    python lmcache_benchmark.py [--rounds N]

prints kvferry's channels and others beside each other; tests/engines.sh --times --only lmcache installs the others.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys

from free_ports import free_url

CHANNELS = ("kvferry", "kvferry_shm", "kvferry_auto", "mooncake_te", "nixl")


def launch(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvferry.lmcache", "lmcache.tools.transfer_channel_benchmark", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "LMCACHE_LOG_LEVEL": "INFO", **environment},
    )  # fmt: skip


def benchmark(channel: str, iterations: int = 5, **environment: str) -> tuple[int, str]:
    """The client's exit status, and what it said."""
    url, control, listen = free_url(), free_url(), free_url()
    common = ["--transfer-channel-type", channel, "--url", url, "--control-url", control]
    sizes = ["--page-size", "64KB", "--object-size", "1MB", "--num-objects", "32", "--server-timeout", "120"]
    server = launch("--role", "server", *common, "--buffer-size", "256MB", *sizes, **environment)
    client = launch(
        "--role", "client", *common, "--listen-url", listen, *sizes, "--iters", str(iterations), "--warmup", "1",
        "--verify", **environment,
    )  # fmt: skip
    try:
        output, _ = client.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        client.kill()
        output = client.communicate()[0] + "no answer within 180 s"
    finally:
        server.kill()
        server.communicate()
    return client.returncode, output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{'GB/s, median of 20 reads':28}" + "".join(f"{f'round {i + 1}':>10}" for i in range(arguments.rounds)))
    ways = [(name, name, {}) for name in CHANNELS] + [("nixl", "nixl, UCX_TLS=tcp", {"UCX_TLS": "tcp"})]
    cells: dict[str, list[str]] = {label: [] for _, label, _ in ways}
    for _ in range(arguments.rounds):  # one after the other, so that a busy moment meets all of them
        for channel, label, environment in ways:
            status, output = benchmark(channel, 20, **environment)
            found = re.search(r"median *:.* ([0-9.]+) GB/s", output)
            right = status == 0 and "verify OK" in output
            cells[label].append(found[1] if right and found else "failed")
    for label, each in cells.items():
        print(f"{label:28}" + "".join(f"{cell:>10}" for cell in each))


if __name__ == "__main__":
    main()
