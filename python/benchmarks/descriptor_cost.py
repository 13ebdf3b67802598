# SPDX-License-Identifier: Apache-2.0
"""What it costs to submit a write of many descriptors from Python, to be read beside what benchmarks/descriptor_bench
prints for C++. The times are those of the call alone; medians, in nanoseconds a descriptor."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import kvferry
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--descriptors", type=int, default=100_000)
    parser.add_argument("--block", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    count, block, stride = options.descriptors, options.block, options.block + 64

    pages = count * stride // block + 1
    source = np.ones((pages, block), dtype=np.uint8)
    destination = np.zeros((pages, block), dtype=np.uint8)
    far = kvferry.TcpTransferChannel(
        regions=[kvferry.Region(destination, block)], peer_init_url="tcp://127.0.0.1:0"
    )
    near = kvferry.TcpTransferChannel(regions=[kvferry.Region(source, block)])
    near.lazy_init_peer_connection("near", "far", far.peer_init_url)

    order = np.random.default_rng(1).permutation(count).astype(np.uint64)
    ranges = np.stack(
        [np.zeros_like(order), order * np.uint64(stride), np.full_like(order, block)], axis=1
    )
    rows = np.stack([np.uint64(source.ctypes.data) + order * np.uint64(block), np.full_like(order, block)], axis=1)
    queue = kvferry.CompletionQueue()

    def measure(what: str, submit: Callable[[], kvferry.Operation]) -> None:
        times = []
        for _ in range(options.rounds):
            begin = time.perf_counter_ns()
            operation = submit()
            times.append((time.perf_counter_ns() - begin) / count)
            while not queue.drain():
                queue.wait()
            operation.result()
        print(f"{what:46} {statistics.median(times):8.1f}")

    print(f"{count} descriptors of {block} bytes: nanoseconds a descriptor, for the call")
    measure(
        "Pages, remote_indexes",
        lambda: near.submit_write(queue, kvferry.Pages(order), "far", remote_indexes=order),
    )
    measure(
        "Pages, remote_ranges",
        lambda: near.submit_write(queue, kvferry.Pages(order), "far", remote_ranges=ranges),
    )
    measure(
        "Addresses, remote_ranges",
        lambda: near.submit_write(queue, kvferry.Addresses(rows, owner=source), "far", remote_ranges=ranges),
    )
    few = [source[int(page)] for page in order[:1000]]
    begin = time.perf_counter_ns()
    near.submit_write(queue, few, "far", remote_indexes=order[:1000])
    print(f"{'a list of 1000 numpy rows, remote_indexes':46} {(time.perf_counter_ns() - begin) / len(few):8.1f}")
    queue.wait()


if __name__ == "__main__":
    main()
