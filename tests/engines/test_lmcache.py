# SPDX-License-Identifier: Apache-2.0
"""LMCache's own programs with kvferry's channel, in processes of their own. See tests/engines.sh."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import kvferry.lmcache
import numpy as np
import pytest
from free_ports import free_url
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.distributed.transfer_channel.api import TransferChannelReadResult
from lmcache.v1.distributed.transfer_channel.factory import create_transfer_channel_context
from lmcache_benchmark import benchmark

SIZE = 1 << 20
OBJECT = 1 << 16


@pytest.mark.parametrize("name", ["kvferry", "kvferry_shm", "kvferry_auto"])
def test_lmcaches_benchmark_verifies_what_it_reads(name: str) -> None:
    status, output = benchmark(name)
    print(output)
    assert status == 0
    assert "verify OK: 32 objects match" in output
    # Both processes are of one host.
    assert re.search(rf"connected to \S+: {'tcp' if name == 'kvferry' else 'shm'} ", output)


def context_of(memory: np.ndarray[Any, Any], url: str) -> kvferry.lmcache.KvferryContext:
    described = L1MemoryDesc(ptr=memory.ctypes.data, size=memory.nbytes, align_bytes=4096)
    made = create_transfer_channel_context("kvferry", described, url, url, read_timeout=2.0)
    assert isinstance(made, kvferry.lmcache.KvferryContext)
    return made


def end_of(client: kvferry.lmcache.KvferryClient, task: int) -> TransferChannelReadResult:
    deadline = time.monotonic() + 60
    while not (result := client.query_read_status(task)).is_finished():
        assert time.monotonic() < deadline
    with pytest.raises(KeyError):
        client.query_read_status(task)  # a final answer is given once
    return result


PEER = f"""
import sys
import numpy as np
import kvferry.lmcache
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.distributed.transfer_channel.factory import create_transfer_channel_context
memory = np.full({SIZE}, int(sys.argv[2]), dtype=np.uint8)
described = L1MemoryDesc(ptr=memory.ctypes.data, size=memory.nbytes, align_bytes=4096)
context = create_transfer_channel_context("kvferry", described, sys.argv[1], sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
context.close()
del memory, described
print("freed", flush=True)
sys.stdin.read()
"""


class Peer:
    """A process that offers memory full of one value."""

    def __init__(self, url: str, fill: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PEER, url, str(fill)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()) != "ready\n":
            assert line, "the peer ended"

    def free(self) -> None:
        """The memory is no longer there, and the process is."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "freed\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def memory() -> np.ndarray[Any, Any]:
    return np.zeros(SIZE, dtype=np.uint8)


@pytest.fixture
def context(memory: np.ndarray[Any, Any]) -> Iterator[kvferry.lmcache.KvferryContext]:
    made = context_of(memory, free_url())
    yield made
    made.close()


def test_a_killed_peer_fails_its_reads_and_its_successor_serves_them(
    memory: np.ndarray[Any, Any], context: kvferry.lmcache.KvferryContext
) -> None:
    url = free_url()
    peer = Peer(url, 7)
    try:
        client = context.get_transfer_channel_client(url)
        assert context.get_transfer_channel_client(url) is client and context.get_num_connected_clients() == 1
        local = context.get_transfer_channel_address([(0, OBJECT), (3 * OBJECT, 100)])
        remote = context.get_transfer_channel_address([(OBJECT, OBJECT), (5, 100)])
        assert end_of(client, client.submit_read(local, remote)).succeeded_mask == [True, True]
        assert (memory[:OBJECT] == 7).all() and (memory[3 * OBJECT : 3 * OBJECT + 100] == 7).all()
        assert not memory[OBJECT : 3 * OBJECT].any() and not memory[3 * OBJECT + 100 :].any()
        peer.kill()
        assert end_of(client, client.submit_read(local, remote)).succeeded_mask == [False, False]
        peer = Peer(url, 9)
        deadline = time.monotonic() + 60
        while end_of(client, client.submit_read(local, remote)).succeeded_mask != [True, True]:
            assert time.monotonic() < deadline
        assert (memory[:OBJECT] == 9).all()
        context.remove_transfer_channel_client(url)
        assert context.get_num_connected_clients() == 0
    finally:
        peer.kill()


def test_what_a_peer_has_freed_is_not_read(
    memory: np.ndarray[Any, Any], context: kvferry.lmcache.KvferryContext
) -> None:
    url = free_url()
    peer = Peer(url, 7)
    try:
        client = context.get_transfer_channel_client(url)
        addresses = context.get_transfer_channel_address([(0, OBJECT), (OBJECT, 100)])
        assert end_of(client, client.submit_read(addresses[:1], addresses[:1])).succeeded_mask == [True]
        peer.free()
        memory[...] = 1
        assert end_of(client, client.submit_read(addresses, addresses)).succeeded_mask == [False, False]
        assert (memory == 1).all()
    finally:
        peer.kill()


def test_addresses_outside_of_the_memory(context: kvferry.lmcache.KvferryContext) -> None:
    with pytest.raises(ValueError, match="not within"):
        context.get_transfer_channel_address([(SIZE - 10, 11)])
    url = free_url()
    peer = Peer(url, 1)
    try:
        client = context.get_transfer_channel_client(url)
        inside = context.get_transfer_channel_address([(0, 10), (20, 10)])
        beyond = [inside[0], type(inside[0])(offset=SIZE - 5, size=10)]
        assert end_of(client, client.submit_read(inside, beyond)).succeeded_mask == [False, False]
        with pytest.raises(ValueError, match="behind the end"):
            client.submit_read(beyond, inside)
        with pytest.raises(ValueError, match="2 local addresses and 1 remote"):
            client.submit_read(inside, inside[:1])
        assert end_of(client, client.submit_read(inside, inside)).succeeded_mask == [True, True]
    finally:
        peer.kill()
