# SPDX-License-Identifier: Apache-2.0
"""The channel of LMCache's P2P and prefill/decode backends, with LMCache's memory and no backend: tests/engines.sh."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from free_ports import free_url
from kvferry import TransferError
from kvferry.lmcache import KvferryChannel
from kvferry.lmcache.options import VARIABLE
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.distributed.transfer_channel.factory import create_transfer_channel_context
from lmcache.v1.memory_allocators.paged_cpu_gpu_memory_allocator import PagedCpuGpuMemoryAllocator
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.transfer_channel import CreateTransferChannel
from lmcache.v1.transfer_channel.transfer_utils import P2PInitSideMsg, P2PInitSideRetMsg

#: Keys and values, layers, tokens, numbers of a token.
SHAPE = torch.Size([2, 2, 16, 32])
PAGES = 8


class Node:
    """A channel and its memory."""

    def __init__(self, name: str = "kvferry", role: str = "both", is_listening: bool = True, **changed: Any) -> None:
        self.allocator = PagedCpuGpuMemoryAllocator()
        page = SHAPE.numel() * 4
        self.allocator.init_cpu_memory_allocator(PAGES * page, [SHAPE], [torch.float32], MemoryFormat.KV_2LTD)
        self.pages = self.allocator.cpu_allocator
        self.url = free_url()
        self.channel: Any = CreateTransferChannel(
            **{
                "channel_type": name, "async_mode": True, "role": role, "buffer_ptr": self.pages.buffer_ptr,
                "buffer_size": self.pages.buffer_size, "align_bytes": page, "tp_rank": 0,
                "peer_init_url": self.url if is_listening else None, "peer_lookup_url": f"lookup of {self.url}",
                "backends": ["UCX"], "device": "cpu", **changed,
            }
        )  # fmt: skip

    def made(self, *values: float, tokens: int = 16) -> list[Any]:
        """Objects full of one value each."""
        shape = torch.Size([*SHAPE[:2], tokens, SHAPE[3]])
        objects = [self.allocator.allocate(shape, torch.float32, MemoryFormat.KV_2LTD) for _ in values]
        for each, value in zip(objects, values):
            assert each is not None and each.tensor is not None
            each.tensor.fill_(value)
        return objects


def values_of(objects: list[Any]) -> list[list[float]]:
    return [sorted(set(each.tensor.flatten().tolist())) for each in objects]


@pytest.fixture
def node() -> Iterator[Callable[..., Node]]:
    with contextlib.ExitStack() as stack:

        def make(*arguments: Any, **keywords: Any) -> Node:
            made = Node(*arguments, **keywords)
            stack.callback(made.channel.close)
            return made

        yield make


@pytest.mark.parametrize("name", ["kvferry", "kvferry_shm", "kvferry_auto"])
def test_objects_are_written_and_read_by_the_pages_they_are_in(node: Callable[..., Node], name: str) -> None:
    near, far = node(name), node(name)
    assert isinstance(near.channel, KvferryChannel)
    assert not near.channel.remote_xfer_handler_exists(far.url)
    answer = near.channel.lazy_init_peer_connection(near.url, far.url, far.url, P2PInitSideMsg())
    assert answer == P2PInitSideRetMsg(peer_lookup_url=f"lookup of {far.url}")
    assert near.channel.remote_xfer_handler_exists(far.url)
    theirs = far.made(1, 2, 3)
    indexes = far.channel.get_local_mem_indices(theirs)
    assert indexes == [each.meta.address for each in theirs] == [0, 1, 2]
    assert near.channel.batched_write(near.made(7, 8), {"receiver_id": far.url, "remote_indexes": [2, 0]}) == 2
    assert values_of(theirs) == [[8], [2], [7]]
    ours = near.made(0, 0)
    assert near.channel.batched_read(ours, {"sender_id": far.url, "remote_indexes": [1, 2]}) == 2
    assert values_of(ours) == [[2], [7]]
    # The other way, over the same connection, and awaited. A last chunk has some of a page.
    assert far.channel.remote_xfer_handler_exists(near.url)
    short, whole = near.made(0, tokens=5), near.made(4)
    spec = {"receiver_id": near.url, "remote_indexes": near.channel.get_local_mem_indices([*short, *whole])}
    objects = [*far.made(9, tokens=5), *far.made(6)]
    assert asyncio.run(far.channel.async_batched_write(objects, spec)) == 2
    assert values_of([*short, *whole]) == [[9], [6]] and short[0].raw_data.numel() == SHAPE.numel() * 4 // 16 * 5
    back = far.made(0)
    read = far.channel.async_batched_read(back, {"sender_id": near.url, "remote_indexes": [short[0].meta.address]})
    assert asyncio.run(read) == 1 and back[0].tensor.flatten()[:20].tolist() == [9] * 20
    assert near.channel.batched_write([], {"receiver_id": far.url, "remote_indexes": []}) == 0


def test_raw_bytes_and_pairs_of_send_and_receive(node: Callable[..., Node]) -> None:
    near, far = node(), node()
    near.channel.lazy_init_peer_connection("", far.url, far.url)  # LMCache gives a prefilling side no name
    [name] = [peer.id for peer in far.channel.channel.peers()]
    theirs = far.made(1)
    assert near.channel.batched_write([b"\0" * 8], {"receiver_id": far.url, "remote_indexes": [0]}) == 1
    assert theirs[0].tensor.flatten()[:3].tolist() == [0, 0, 1]

    async def exchange() -> list[int]:
        buffers = [bytearray(5), bytearray(5)]
        received = asyncio.ensure_future(far.channel.async_batched_recv(buffers, {"sender_id": name}))
        sent = await near.channel.async_batched_send([b"first", b"other"], {"receiver_id": far.url})
        assert [await received, sent] == [2, 2] and [bytes(each) for each in buffers] == [b"first", b"other"]
        return [await received, sent]

    assert asyncio.run(exchange()) == [2, 2]
    assert asyncio.run(exchange()) == [2, 2]  # in another event loop


def test_who_is_connected_to_another_time_begins_anew(node: Callable[..., Node]) -> None:
    """LMCache does so before it frees what the peer was to write to."""
    near, far = node(), node()
    events = far.channel.channel
    far.channel.lazy_init_peer_connection(far.url, near.url, near.url)
    assert events.wait_peer_event(60).kind == "connected"
    for _ in range(2):
        asyncio.run(near.channel.async_lazy_init_peer_connection(near.url, far.url, far.url))
    assert [events.wait_peer_event(60).kind for _ in range(2)] == ["gone", "connected"]
    near.channel.lazy_init_peer_connection(near.url, far.url, far.url)
    assert [events.wait_peer_event(60).kind for _ in range(2)] == ["gone", "connected"]


def test_what_a_peer_has_closed_and_freed_is_not_read(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, '{"default_timeout": 0.5}')
    near, far = node(), node()
    near.channel.lazy_init_peer_connection(near.url, far.url, far.url)
    ours = near.made(5)
    far.channel.close()
    far.allocator.close()
    with pytest.raises(TransferError):
        near.channel.batched_read(ours, {"sender_id": far.url, "remote_indexes": [0]})
    with pytest.raises(TransferError):
        asyncio.run(near.channel.async_batched_write(ours, {"receiver_id": far.url, "remote_indexes": [0]}))
    assert values_of(ours) == [[5]]


def test_what_is_refused(node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = node(is_listening=False), node(role="sender")
    near.channel.lazy_init_peer_connection("near", far.url, far.url)
    objects = near.made(1)
    for spec in (None, {"remote_indexes": [0]}, {"receiver_id": far.url}):
        with pytest.raises(ValueError, match="transfer_spec has no"):
            near.channel.batched_write(objects, spec)
    for indexes in ([PAGES], [0]):  # none, and one of a side whose pages are nobody's but its own
        with pytest.raises(TransferError):
            near.channel.batched_write(objects, {"receiver_id": far.url, "remote_indexes": indexes})
    with pytest.raises(TransferError):
        near.channel.get_local_mem_indices(far.made(1))
    objects[0].invalidate()
    with pytest.raises(ValueError, match="no memory any more"):
        near.channel.get_local_mem_indices(objects)
    with pytest.raises(ValueError, match="is on cuda:0"):
        node(device="cuda:0")
    with pytest.raises(AssertionError, match="Unsupported channel type: other"):
        node("other")
    for text, error in (("[1]", "is a JSON object"), ("{", "is no JSON")):
        monkeypatch.setenv(VARIABLE, text)
        with pytest.raises(ValueError, match=error):
            node()


#: From ZeroMQ's manual.
KEYS = ("Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID", "D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs")


def test_with_a_keyring_nobody_else_connects(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In both interfaces. All have one pair of keys."""
    key, list_of_keys = tmp_path / "key", tmp_path / "peers"
    key.write_text(f"{KEYS[1]}\n")
    key.chmod(0o600)
    list_of_keys.write_text(f"{KEYS[0]} *\n")
    stranger = node()
    monkeypatch.setenv(VARIABLE, json.dumps({"keyring": [str(key), str(list_of_keys)], "default_timeout": 20}))
    near, far = node(), node()
    near.channel.lazy_init_peer_connection(near.url, far.url, far.url)
    assert near.channel.batched_write(near.made(7), {"receiver_id": far.url, "remote_indexes": [3]}) == 1
    assert "TLS" in near.channel.channel.peer_info(far.url).path
    with pytest.raises(TransferError):
        stranger.channel.channel.lazy_init_peer_connection("stranger", far.url, far.url, timeout=1.0)
    memory = L1MemoryDesc(ptr=far.pages.buffer_ptr, size=far.pages.buffer_size, align_bytes=4096)
    url = free_url()
    server = create_transfer_channel_context("kvferry", memory, url, url)
    try:
        assert near.channel.lazy_init_peer_connection(near.url, "server", url) is None
        with pytest.raises(TransferError):
            stranger.channel.channel.lazy_init_peer_connection("stranger", url, url, timeout=1.0)
    finally:
        server.close()
