# SPDX-License-Identifier: Apache-2.0
"""LMCache's transfer channels of its multi-process mode (``lmcache.v1.distributed.transfer_channel``), which read."""

from __future__ import annotations

import itertools
import uuid
from typing import Any, ClassVar

import numpy as np
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.distributed.transfer_channel.abstract import (
    TransferChannelClient,
    TransferChannelContext,
    TransferChannelServer,
)
from lmcache.v1.distributed.transfer_channel.api import TransferChannelAddress, TransferChannelReadResult
from numpy.typing import NDArray

from .. import (
    Addresses,
    AutoTransferChannel,
    BaseTransferChannel,
    CompletionQueue,
    Operation,
    Region,
    ShmTransferChannel,
    TcpTransferChannel,
)
from .options import channel_options, say_path, without_scheme

__all__ = ["KvferryAutoContext", "KvferryClient", "KvferryContext", "KvferryServer", "KvferryShmContext"]


class KvferryServer(TransferChannelServer):
    """Nothing but a name for the channel's listener, which the context has."""

    def __init__(self, listen_url: str, advertise_url: str, l1_memory_desc: L1MemoryDesc) -> None:
        self.listen_url = listen_url
        self.advertise_url = advertise_url

    def close(self) -> None:
        """The listener goes with the context."""


class KvferryClient(TransferChannelClient):
    """Reads from one peer's memory. A peer that comes back is connected to again by the next read."""

    def __init__(self, transfer_channel_server_url: str, context: KvferryContext) -> None:
        self._context = context
        self._peer = transfer_channel_server_url
        self._tasks: dict[int, Operation] = {}
        context.channel.lazy_init_peer_connection(context.local_id, self._peer, without_scheme(self._peer))
        say_path(context.channel, self._peer)

    def submit_read(
        self, local_addresses: list[TransferChannelAddress], remote_addresses: list[TransferChannelAddress]
    ) -> int:
        if len(local_addresses) != len(remote_addresses):
            raise ValueError(f"there are {len(local_addresses)} local addresses and {len(remote_addresses)} remote ones")
        rows = _rows(local_addresses)
        if len(rows) and int((rows[:, 0] + rows[:, 1]).max()) > self._context.size:
            raise ValueError(f"a local address lies behind the end of the memory, of {self._context.size} bytes")
        rows[:, 0] += np.uint64(self._context.address)
        remote = _rows(remote_addresses)
        ranges = np.concatenate([np.zeros((len(remote), 1), dtype=np.uint64), remote], axis=1)
        operation = self._context.channel.submit_read(
            self._context.queue, Addresses(rows), self._peer, remote_ranges=ranges, statuses=True
        )
        number = next(self._context.numbers)
        self._tasks[number] = operation
        return number

    def query_read_status(self, task_id: int) -> TransferChannelReadResult:
        self._context.queue.drain()
        operation = self._tasks[task_id]
        if not operation.done():
            return TransferChannelReadResult(finished=False)
        del self._tasks[task_id]
        succeeded = [status is None for status in operation.statuses]
        return TransferChannelReadResult(finished=True, succeeded_mask=succeeded)

    def close(self) -> None:
        """Ends the reads that are under way; when it returns, nothing of theirs lands any more."""
        for operation in self._tasks.values():
            operation.cancel()
        while not all(operation.done() for operation in self._tasks.values()):
            # Not for long: another client, which LMCache polls on another thread, may take the entry that this waits for.
            self._context.queue.wait(0.05)
            self._context.queue.drain()
        self._tasks.clear()


class KvferryContext(TransferChannelContext):
    """A channel that offers LMCache's L1 memory for reading, and its clients.

    read_timeout: seconds, after which a read has failed. A peer that is gone is looked for until then. LMCache has a
        deadline of its own, ``load_timeout_s``, 10 seconds unless it is configured: it frees the memory then, and
        doesn't say so. So a read has to have failed well before. For further options see ``kvferry.lmcache.options``.
    """

    channel_class: ClassVar[type[BaseTransferChannel]] = TcpTransferChannel

    def __init__(
        self,
        l1_memory_desc: L1MemoryDesc,
        listen_url: str,
        advertise_url: str,
        read_timeout: float = 5.0,
        **_: Any,
    ) -> None:
        self.address = l1_memory_desc.ptr
        self.size = l1_memory_desc.size
        self.local_id = uuid.uuid4().hex
        self.queue = CompletionQueue()
        #: Of reads. Clients may be used on a thread each.
        self.numbers = itertools.count(1)
        # Peers name bytes and no pages.
        region = Region((self.address, self.size), page_size=self.size, access="read")
        self.channel = self.channel_class(
            regions=[region],
            **channel_options(
                peer_init_url=without_scheme(listen_url),
                advertised_init_url=without_scheme(advertise_url),
                default_timeout=read_timeout,
            ),
        )
        self._server = KvferryServer(listen_url, advertise_url, l1_memory_desc)
        self._clients: dict[str, KvferryClient] = {}

    def get_transfer_channel_server(self) -> KvferryServer:
        return self._server

    def get_transfer_channel_client(self, peer_advertise_url: str) -> KvferryClient:
        client = self._clients.get(peer_advertise_url)
        if client is None:
            client = self._clients[peer_advertise_url] = KvferryClient(peer_advertise_url, self)
        return client

    def remove_transfer_channel_client(self, peer_advertise_url: str) -> None:
        client = self._clients.pop(peer_advertise_url, None)
        if client is not None:
            client.close()

    def get_transfer_channel_address(self, lmcache_addresses: list[tuple[int, int]]) -> list[TransferChannelAddress]:
        for offset, size in lmcache_addresses:
            if offset < 0 or size < 0 or offset + size > self.size:
                raise ValueError(f"[{offset}, {offset + size}) is not within [0, {self.size})")
        return [TransferChannelAddress(offset=offset, size=size) for offset, size in lmcache_addresses]

    def get_num_connected_clients(self) -> int:
        return len(self._clients)

    def close(self) -> None:
        for url in list(self._clients):
            self.remove_transfer_channel_client(url)
        self.channel.close()


class KvferryShmContext(KvferryContext):
    """Within a host."""

    channel_class = ShmTransferChannel


class KvferryAutoContext(KvferryContext):
    """Within a host where that gets through, and else over TCP."""

    channel_class = AutoTransferChannel


def _rows(addresses: list[TransferChannelAddress]) -> NDArray[np.uint64]:
    pairs = [(address.offset, address.size) for address in addresses]
    return np.array(pairs, dtype=np.uint64).reshape(-1, 2)
