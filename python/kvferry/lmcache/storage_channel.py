# SPDX-License-Identifier: Apache-2.0
"""LMCache's transfer channels of its P2P and prefill/decode backends (``lmcache.v1.transfer_channel``): pages of one
buffer are written and read."""

from __future__ import annotations

import asyncio
import functools
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec
from lmcache.v1 import transfer_channel as _lmcache
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.transfer_channel.abstract import BaseTransferChannel as LmcacheTransferChannel
from lmcache.v1.transfer_channel.transfer_utils import InitSideMsgBase, InitSideRetMsgBase, SideMsg

from .. import AutoTransferChannel, BaseTransferChannel, Region, ShmTransferChannel, SideMessage, TcpTransferChannel
from ..aio import AsyncChannel
from .options import channel_options, say_path, without_scheme

__all__ = ["KvferryAutoChannel", "KvferryChannel", "KvferryShmChannel", "offer"]

#: The modules that have taken LMCache's function for themselves when they were imported.
_BACKENDS = ("p2p_backend", "pd_backend", "pd_backend_async")


class KvferryChannel(LmcacheTransferChannel):
    """Moves pages of LMCache's buffer between the buffers of peers. What LMCache promises of channels holds for all of
    its methods, and the asynchronous ones use no thread.

    async_mode, tp_rank: make no difference.
    role: "both" or "receiver", whose pages peers may read and write, or "sender".
    buffer_ptr, buffer_size: host memory, in bytes, divided in pages of ``align_bytes``. It is the caller's, and stays
        until ``close`` has returned.
    peer_init_url: "host:port" to answer at; None: this side only connects.
    peer_lookup_url: the answer to LMCache's ``P2PInitSideMsg``.
    device: where the buffer is; ValueError for anything but "cpu".

    A transfer fails after 10 seconds, with ``kvferry.TransferError``; nothing of it lands any more then, unless the
    error says ``may_still_land``. For further options see ``kvferry.lmcache.options``. Thread-safe.
    """

    channel_class: ClassVar[type[BaseTransferChannel]] = TcpTransferChannel

    def __init__(
        self,
        async_mode: bool,
        role: str,
        buffer_ptr: int,
        buffer_size: int,
        align_bytes: int,
        tp_rank: int = 0,
        peer_init_url: str | None = None,
        device: str | None = None,
        peer_lookup_url: str | None = None,
        **_: Any,
    ) -> None:
        if device not in (None, "cpu"):
            raise ValueError(f"kvferry moves LMCache's buffers in host memory, and this one is on {device}")
        self.peer_init_url = peer_init_url
        self.peer_lookup_url = peer_lookup_url
        region = Region((buffer_ptr, buffer_size), align_bytes, "none" if role == "sender" else "read_write")
        options = channel_options(peer_lookup_url=peer_lookup_url, default_timeout=10.0)
        if peer_init_url is not None:
            options["peer_init_url"] = without_scheme(peer_init_url)
        self.channel = self.channel_class(regions=[region], **options)
        #: For peers to whom LMCache gives no name of this side's.
        self._local_id = uuid.uuid4().hex
        self._asked: set[str] = set()
        self._in_loops: dict[asyncio.AbstractEventLoop, AsyncChannel[BaseTransferChannel]] = {}

    def _here(self) -> AsyncChannel[BaseTransferChannel]:
        loop = asyncio.get_running_loop()
        found = self._in_loops.get(loop)
        if found is None:
            for other in list(self._in_loops):  # a program may have a loop for each request
                if other.is_closed():
                    self._in_loops.pop(other, None)
            found = self._in_loops[loop] = AsyncChannel(self.channel)
        return found

    # Connections

    def _is_asked_again(self, peer_id: str) -> bool:
        """Whether LMCache connects to a peer another time. Then it has given up what it had asked the peer for, and is
        about to free the memory."""
        again = peer_id in self._asked and self.channel.remote_xfer_handler_exists(peer_id)
        self._asked.add(peer_id)
        return again

    def lazy_init_peer_connection(
        self, local_id: str, peer_id: str, peer_init_url: str, init_side_msg: InitSideMsgBase | None = None
    ) -> InitSideRetMsgBase | None:
        if self._is_asked_again(peer_id):
            self.channel.disconnect(peer_id)
        answer = self.channel.lazy_init_peer_connection(
            local_id or self._local_id, peer_id, without_scheme(peer_init_url), _encoded(init_side_msg)
        )
        say_path(self.channel, peer_id)
        return _decoded(answer)

    async def async_lazy_init_peer_connection(
        self, local_id: str, peer_id: str, peer_init_url: str, init_side_msg: InitSideMsgBase | None = None
    ) -> InitSideRetMsgBase | None:
        if self._is_asked_again(peer_id):
            await self._here().disconnect(peer_id)
        answer = await self._here().lazy_init_peer_connection(
            local_id or self._local_id, peer_id, without_scheme(peer_init_url), _encoded(init_side_msg)
        )
        say_path(self.channel, peer_id)
        return _decoded(answer)

    def remote_xfer_handler_exists(self, receiver_or_sender_id: str) -> bool:
        return self.channel.remote_xfer_handler_exists(receiver_or_sender_id)

    # Transfers

    def get_local_mem_indices(self, objects: Sequence[Any]) -> list[int]:
        """Raises TransferError for what doesn't begin at a page of the buffer."""
        return self.channel.get_local_mem_indices(_memory_of(objects))

    def batched_send(self, objects: Sequence[Any], transfer_spec: Mapping[str, Any] | None = None) -> int:
        return self.channel.batched_send(_memory_of(objects), _peer(transfer_spec, "receiver_id"))

    def batched_recv(self, buffers: Sequence[Any], transfer_spec: Mapping[str, Any] | None = None) -> int:
        return len(self.channel.batched_recv(_memory_of(buffers), _peer(transfer_spec, "sender_id")))

    def batched_write(self, objects: Sequence[Any], transfer_spec: Mapping[str, Any] | None = None) -> int:
        peer_id, indexes = _peer(transfer_spec, "receiver_id"), _indexes(transfer_spec)
        return self.channel.batched_write(_memory_of(objects), peer_id, remote_indexes=indexes)

    def batched_read(self, buffers: Sequence[Any], transfer_spec: Mapping[str, Any] | None = None) -> int:
        peer_id, indexes = _peer(transfer_spec, "sender_id"), _indexes(transfer_spec)
        return self.channel.batched_read(_memory_of(buffers), peer_id, remote_indexes=indexes)

    async def async_batched_send(self, objects: Sequence[Any], transfer_spec: Mapping[str, Any] | None = None) -> int:
        return await self._here().batched_send(_memory_of(objects), _peer(transfer_spec, "receiver_id"))

    async def async_batched_recv(self, buffers: Sequence[Any], transfer_spec: Mapping[str, Any] | None = None) -> int:
        return len(await self._here().batched_recv(_memory_of(buffers), _peer(transfer_spec, "sender_id")))

    async def async_batched_write(self, objects: Sequence[Any], transfer_spec: Mapping[str, Any] | None = None) -> int:
        peer_id, indexes = _peer(transfer_spec, "receiver_id"), _indexes(transfer_spec)
        return await self._here().batched_write(_memory_of(objects), peer_id, remote_indexes=indexes)

    async def async_batched_read(self, buffers: Sequence[Any], transfer_spec: Mapping[str, Any] | None = None) -> int:
        peer_id, indexes = _peer(transfer_spec, "sender_id"), _indexes(transfer_spec)
        return await self._here().batched_read(_memory_of(buffers), peer_id, remote_indexes=indexes)

    def close(self) -> None:
        """When it returns, nothing touches the buffer any more. What is awaited ends with an error."""
        self.channel.close()
        self._in_loops.clear()  # who awaits in one has it


class KvferryShmChannel(KvferryChannel):
    """Within a host."""

    channel_class = ShmTransferChannel


class KvferryAutoChannel(KvferryChannel):
    """Within a host where that gets through, and else over TCP."""

    channel_class = AutoTransferChannel


def offer(channels: Mapping[str, type[KvferryChannel]]) -> None:
    """Makes LMCache's ``transfer_channel`` take these names. LMCache knows its own two alone."""
    original = _lmcache.CreateTransferChannel

    @functools.wraps(original)
    def create_transfer_channel(channel_type: str, *arguments: Any, **keywords: Any) -> LmcacheTransferChannel:
        found = channels.get(channel_type)
        if found is None:
            made: LmcacheTransferChannel = original(channel_type, *arguments, **keywords)
            return made
        return found(*arguments, **keywords)

    modules = [sys.modules.get(f"lmcache.v1.storage_backend.{name}") for name in _BACKENDS]
    for module in (_lmcache, *modules):
        if module is not None and module.CreateTransferChannel is original:
            module.CreateTransferChannel = create_transfer_channel


def _encoded(message: InitSideMsgBase | None) -> SideMessage | None:
    return None if message is None else SideMessage.decode(msgspec.msgpack.encode(message))


def _decoded(answer: SideMessage | None) -> InitSideRetMsgBase | None:
    return None if answer is None else msgspec.msgpack.decode(answer.encoded, type=SideMsg)


def _memory_of(objects: Sequence[Any]) -> list[Any]:
    return [_one_of(each) if isinstance(each, MemoryObj) else each for each in objects]


def _one_of(memory: MemoryObj) -> tuple[int, int]:
    """All that the object has: of the last chunk of a prompt that is less than a page."""
    tensor = memory.raw_tensor
    if tensor is None:
        raise ValueError("an object of LMCache's has no memory any more")
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def _peer(transfer_spec: Mapping[str, Any] | None, key: str) -> str:
    if not transfer_spec or key not in transfer_spec:
        raise ValueError(f"the transfer_spec has no {key!r}")
    return str(transfer_spec[key])


def _indexes(transfer_spec: Mapping[str, Any] | None) -> list[int]:
    if not transfer_spec or "remote_indexes" not in transfer_spec:
        raise ValueError("the transfer_spec has no 'remote_indexes'")
    return list(transfer_spec["remote_indexes"])
