# SPDX-License-Identifier: Apache-2.0
"""What NIXL takes to submit a write of very many descriptors, by its Python interface and its UCX back end over TCP.

    python nixl_descriptors.py [--descriptors N] [--block BYTES] [--rounds N]

prints rows for the table of descriptor_bench; benchmarks/descriptors.sh installs NIXL and runs both.
"""

import argparse
import os
import statistics
import sys
import time

os.environ.setdefault("UCX_TLS", "tcp")  # before NIXL loads UCX
os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")

import numpy as np
from nixl_cu12._api import nixl_agent


class Pair:
    def __init__(self, descriptors, block, rounds):
        self.descriptors, self.block, self.rounds = descriptors, block, rounds
        self.stride = block + 64  # blocks that touch would be merged
        size = (descriptors * self.stride // block + 1) * block
        self.source, self.destination = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        self.initiator, self.target = nixl_agent("initiator"), nixl_agent("target")
        for agent, memory in ((self.initiator, self.source), (self.target, self.destination)):
            agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
        self.initiator.add_remote_agent(self.target.get_agent_metadata())

    def scattered(self, memory, seed):
        places = np.random.default_rng(seed).permutation(self.descriptors).astype(np.uint64)
        rows = np.zeros((self.descriptors, 3), np.uint64)
        rows[:, 0] = memory.ctypes.data + places * np.uint64(self.block)
        rows[:, 1] = self.block
        return rows

    def strided(self, memory):
        return np.array([[memory.ctypes.data, self.block, 0, self.stride, self.descriptors]], np.uint64)

    def check(self, rows):
        """Whether all blocks of these descriptors have arrived; makes them empty again."""
        for address in rows:
            begin = int(address) - self.destination.ctypes.data
            if not self.destination[begin : begin + self.block].all():
                raise SystemExit(f"verification failed: the block at {begin}")
        self.destination[:] = 0

    def measure(self, what, make, rows):
        """`make` returns a request that is ready to be posted; its time counts, too."""
        submitting, moving = [], []
        for _ in range(self.rounds):
            begin = time.perf_counter_ns()
            handle = make()
            state = self.initiator.transfer(handle)
            submitting.append(time.perf_counter_ns() - begin)
            while state == "PROC":
                state = self.initiator.check_xfer_state(handle)
            moving.append(time.perf_counter_ns() - begin)
            if state != "DONE":
                raise SystemExit(f"{what}: {state}")
            self.check(rows)
            handle.release()
        submitted = [each / self.descriptors for each in submitting]
        speed = self.descriptors * self.block / statistics.median(moving)
        print(f"| {what} | {statistics.median(submitted):.1f} | {min(submitted):.1f} | {speed:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--descriptors", type=int, default=100_000)
    parser.add_argument("--block", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    pair = Pair(arguments.descriptors, arguments.block, arguments.rounds)
    agent = pair.initiator
    local, remote = pair.scattered(pair.source, 1), pair.scattered(pair.destination, 2)

    def anew():
        lists = [agent.get_xfer_descs(rows, "DRAM") for rows in (local, remote)]
        return agent.initialize_xfer("WRITE", *lists, "target")

    pair.measure("NIXL: lists, `createXferReq`, `postXferReq`", anew, remote[:, 0])

    every = np.arange(pair.descriptors, dtype=np.int32)
    prepared = agent.prep_xfer_dlist("", local, "DRAM"), agent.prep_xfer_dlist("target", remote, "DRAM")

    def by_index():
        return agent.make_prepped_xfer("WRITE", prepared[0], every, prepared[1], every)

    pair.measure("NIXL: lists prepared before, `makeXferReq`, `postXferReq`", by_index, remote[:, 0])

    blocks = pair.destination.ctypes.data + np.arange(pair.descriptors, dtype=np.uint64) * np.uint64(pair.stride)

    def strided():
        source = agent.prep_xfer_dlist("", pair.strided(pair.source), "DRAM")
        destination = agent.prep_xfer_dlist("target", pair.strided(pair.destination), "DRAM")
        return agent.make_prepped_xfer("WRITE", source, every, destination, every)

    pair.measure("NIXL: one strided descriptor, `prepXferDlist`, `makeXferReq`, `postXferReq`", strided, blocks)
    sys.stdout.flush()
    os._exit(0)  # once it has made an agent, NIXL 1.5.1 crashes where a process exits


if __name__ == "__main__":
    main()
