# SPDX-License-Identifier: Apache-2.0
"""kvferry as the DataTransport of vLLM's tiered KV offload. See tests/engines.sh."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from kvferry.vllm import KvferryDataTransport
from kvferry.vllm.data_transport import _Transfer
from kvferry.vllm.options import Options

BLOCKS, SIZE = 32, 1 << 16


class Node:
    def __init__(self, fill: int = 0, blocks: int = BLOCKS, **options: Any) -> None:
        self.cache = np.zeros((blocks, SIZE), dtype=np.uint8)
        if fill:
            self.cache[...] = np.arange(fill, fill + blocks, dtype=np.uint8)[:, None]
        self.transport = KvferryDataTransport(memoryview(self.cache), {"model": "m"}, Options(**options))

    def knows(self, peer_id: str, other: Node) -> None:
        theirs = other.transport
        self.transport.add_remote_peer(
            peer_id, theirs.get_agent_metadata(), theirs.base_addr, theirs.num_blocks, theirs.block_len
        )

    def wait(self, *transfers: int | None, peer_id: str | None = None) -> tuple[set[int], set[int]]:
        """Which of the transfers arrived, and which failed."""
        done: set[int] = set()
        failed: set[int] = set()
        deadline = time.monotonic() + 60
        while len(done) + len(failed) < len(transfers):
            assert time.monotonic() < deadline
            result = self.transport.poll(peer_id)
            done.update(result.done)
            failed.update(result.failed)
            time.sleep(0.0005)
        assert done | failed == set(transfers)
        return done, failed


@pytest.fixture
def node() -> Iterator[Callable[..., Node]]:
    with ExitStack() as stack:

        def made(*arguments: Any, **keywords: Any) -> Node:
            one = Node(*arguments, **keywords)
            stack.callback(one.transport.close)
            return one

        yield made


def test_blocks_go_both_ways_as_soon_as_peers_know_each_other(node: Callable[..., Node]) -> None:
    a, b = node(100), node(200, blocks=BLOCKS * 2 - 20)
    assert a.transport.config_fingerprint == b.transport.config_fingerprint != ""
    a.knows("b", b)
    b.knows("a", a)
    first = a.transport.write_blocks("b", [0, 3, 7], [5, 40, 1])  # before it is connected
    second = b.transport.write_blocks("a", [43], [31])
    assert first is not None and second is not None
    assert a.wait(first) == ({first}, set()) and b.wait(second) == ({second}, set())
    assert [set(b.cache[i].tolist()) for i in (5, 40, 1, 6)] == [{100}, {103}, {107}, {206}]
    assert set(a.cache[31].tolist()) == {243}
    assert a.transport.poll() == ([], []) and b.transport.poll("a") == ([], [])


def test_what_is_polled_belongs_to_one_peer(node: Callable[..., Node]) -> None:
    a, b, c = node(100), node(), node()
    a.knows("b", b)
    a.knows("c", c)
    to_b, to_c = a.transport.write_blocks("b", [1], [1]), a.transport.write_blocks("c", [2], [2])
    assert a.wait(to_b, peer_id="b") == ({to_b}, set())
    assert a.wait(to_c, peer_id="c") == ({to_c}, set())
    assert b.cache[1, 0] == 101 and c.cache[2, 0] == 102
    a.transport.remove_remote_peer("b")
    assert a.transport.write_blocks("b", [1], [1]) is None
    more = a.transport.write_blocks("c", [3], [3])
    assert a.wait(more) == ({more}, set())


def test_what_cannot_be_written(node: Callable[..., Node]) -> None:
    a, b = node(100), node(timeout=1.0)
    assert a.transport.write_blocks("b", [1], [1]) is None
    with pytest.raises(ValueError, match=r"blocks of 10 bytes, and not of 65536"):
        a.transport.add_remote_peer("b", b.transport.get_agent_metadata(), 0, 1, 10)
    a.knows("b", b)
    for local, remote in (([1], [BLOCKS]), ([BLOCKS], [1]), ([1, 2], [1]), ([-1], [1]), ([1], [-1])):
        transfer = a.transport.write_blocks("b", local, remote)
        assert a.wait(transfer) == (set(), {transfer})
    assert not b.cache.any()
    fine = a.transport.write_blocks("b", [1], [1])
    assert a.wait(fine) == ({fine}, set())


@pytest.mark.parametrize("mode", ["immediate", "wait"])
def test_nothing_lands_after_a_cancelled_transfer_has_been_reported(node: Callable[..., Node], mode: Any) -> None:
    a, b = node(1), node()
    a.knows("b", b)
    everything = list(range(BLOCKS))
    fine = a.transport.write_blocks("b", everything, everything)
    a.wait(fine)
    for turn in range(30):
        transfers = [a.transport.write_blocks("b", everything, everything) for _ in range(4)]
        if turn % 3:
            time.sleep(0.0003 * (turn % 3))
        left = a.transport.cancel([number for number in transfers if number is not None] + [10**9], mode)
        if mode == "immediate":
            assert left == []
            continue
        a.wait(*left)
        b.cache[...] = 77
        assert a.transport.poll() == ([], [])
        fine = a.transport.write_blocks("b", [0], [0])
        a.wait(fine)
        assert (b.cache[1:] == 77).all()
    fine = a.transport.write_blocks("b", everything, everything)
    assert a.wait(fine) == ({fine}, set()) and (b.cache == a.cache).all()


def test_a_transfer_that_waits_for_its_peer_can_be_cancelled(node: Callable[..., Node]) -> None:
    a, b = node(1), node()
    a.knows("b", b)
    transfer = a.transport.write_blocks("b", [1], [1])
    assert transfer is not None
    a.transport.cancel([transfer], "wait")
    fine = a.transport.write_blocks("b", [2], [2])
    assert a.wait(fine) == ({fine}, set())


def test_a_peer_that_is_removed_while_it_is_connected_to_anew_stays_removed(node: Callable[..., Node]) -> None:
    """To settle a transfer whose connection was lost."""
    a, b = node(100), node()
    a.knows("b", b)
    first = a.transport.write_blocks("b", [1], [1])
    assert a.wait(first) == ({first}, set())
    transport, peer = a.transport, a.transport._peers["b"]
    transfer = _Transfer("b", [2], [2])
    transport._settle(peer, transfer)
    transport.remove_remote_peer("b")
    deadline = time.monotonic() + 60
    while transfer.arrived is None or len(transport._queue) > 1:  # one waits for notifications
        assert time.monotonic() < deadline
        transport.poll()
        time.sleep(0.0005)
    assert transfer.arrived is False and not transport._channel.remote_xfer_handler_exists(peer.channel_id)


def test_a_transport_may_be_closed_with_work_in_flight(node: Callable[..., Node]) -> None:
    a, b = node(1), node()
    a.knows("b", b)
    a.transport.write_blocks("b", [1], [1])
    a.transport.close()
    a.transport.close()


PEER = f"""
import sys
import numpy as np
from kvferry.vllm import KvferryDataTransport
from kvferry.vllm.data_transport import _Transfer
cache = np.zeros(({BLOCKS}, {SIZE}), dtype=np.uint8)
transport = KvferryDataTransport(memoryview(cache))
print(transport.get_agent_metadata().hex(), flush=True)
for line in sys.stdin:
    transport.poll()
    print(cache[int(line), 0], flush=True)
"""


class Process:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.metadata = bytes.fromhex(self.answer())

    def answer(self) -> str:
        assert self.process.stdout is not None
        line: str = self.process.stdout.readline()
        assert line, "the peer ended"
        return line

    def block(self, number: int) -> int:
        assert self.process.stdin is not None
        print(number, file=self.process.stdin, flush=True)
        return int(self.answer())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def stopped(a: Node, peer: Process) -> int:
    """Cancels a large write to a peer that stands still, whose receive buffer has a part of it."""
    a.transport.add_remote_peer("b", peer.metadata, 0, BLOCKS, SIZE)
    a.wait(a.transport.write_blocks("b", [4], [9]))
    peer.process.send_signal(signal.SIGSTOP)
    everything = list(range(BLOCKS))
    transfer = a.transport.write_blocks("b", everything * 64, everything * 64)
    assert transfer is not None
    time.sleep(0.2)  # some of it is under way
    assert a.transport.cancel([transfer, transfer], "wait") == [transfer]
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        assert a.transport.poll() == ([], [])  # something may land when the peer goes on
        time.sleep(0.01)
    return transfer


@pytest.mark.parametrize("how", ["goes on", "is killed and removed"])
def test_a_cancelled_transfer_is_reported_when_its_peer_has_settled_it(node: Callable[..., Node], how: str) -> None:
    a, peer = node(100, timeout=2.0), Process()
    try:
        transfer = stopped(a, peer)
        if how == "goes on":
            peer.process.send_signal(signal.SIGCONT)
        else:
            peer.kill()
            a.transport.remove_remote_peer("b")
        assert a.wait(transfer) == (set(), {transfer})
        if how == "goes on":
            fine = a.transport.write_blocks("b", [4], [9])
            assert a.wait(fine) == ({fine}, set()) and peer.block(9) == 104
    finally:
        peer.kill()


def test_a_peer_that_is_killed_and_its_successor(node: Callable[..., Node]) -> None:
    a = node(100, timeout=5.0)
    peer, successor = Process(), Process()
    try:
        a.transport.add_remote_peer("b", peer.metadata, 0, BLOCKS, SIZE)
        transfer = a.transport.write_blocks("b", [4], [9])
        assert a.wait(transfer) == ({transfer}, set()) and peer.block(9) == 104
        peer.kill()
        lost = a.transport.write_blocks("b", [4], [9])
        if lost is not None:
            assert a.wait(lost) == (set(), {lost})
        a.transport.remove_remote_peer("b")
        a.transport.add_remote_peer("b", successor.metadata, 0, BLOCKS, SIZE)
        transfer = a.transport.write_blocks("b", [5], [9])
        assert a.wait(transfer) == ({transfer}, set()) and successor.block(9) == 105
    finally:
        peer.kill()
        successor.kill()
