# SPDX-License-Identifier: Apache-2.0
"""kvferry under vLLM's tiered KV offload, between peers: its ``DataTransport``."""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from vllm.v1.kv_offload.tiering.p2p.data.base import DataTransport, PollResult

from .. import CompletionQueue, Operation, Pages, Region, TransferError
from .options import Options, channel_class, channel_keywords

__all__ = ["KvferryDataTransport"]

_logger = logging.getLogger("kvferry.vllm")

#: Of the notifications that follow writes whose bytes may still land.
_SETTLED = 1


@dataclass(eq=False)
class _Transfer:
    peer_id: str
    local: list[int]
    remote: list[int]
    operation: Operation | None = None
    #: Whether all of it has arrived; None while it is under way.
    arrived: bool | None = None


@dataclass(eq=False)
class _Peer:
    connecting: Operation | None = None
    #: How the channel knows it; empty until it is connected.
    channel_id: str = ""
    #: What was asked for meanwhile.
    waiting: list[_Transfer] = field(default_factory=list)


class KvferryDataTransport(DataTransport):
    """Writes blocks into peers' memory. No call waits for a peer: ``poll`` takes everything on. One thread.

    A transfer that was cancelled, or has failed, is reported when nothing of it can land any more at a peer that is still
    connected. Where the connection is lost, the peer's own ``remove_remote_peer`` says so.

    view: the blocks, [number of blocks, bytes of a block]; held until ``close``.
    options: ``host`` and ``port`` say where peers connect; the lease has no meaning here.
    """

    def __init__(
        self, view: memoryview, config_fields: dict[str, Any] | None = None, options: Options | None = None
    ) -> None:
        super().__init__(view, config_fields=config_fields)
        chosen = options or Options()
        self._id = uuid.uuid4().hex
        self._queue = CompletionQueue()
        self._ids = itertools.count()
        self._transfers: dict[int, _Transfer] = {}
        self._peers: dict[str, _Peer] = {}
        self._closed = False
        region = Region((self.base_addr, self.num_blocks * self.block_len), self.block_len, "write")
        make: Any = channel_class(chosen.transport)
        self._channel = make(regions=[region], **channel_keywords(chosen, listening=True))
        self._receive()

    def get_agent_metadata(self) -> bytes:
        metadata: bytes = self._channel.local_metadata(self._id)
        return metadata

    def add_remote_peer(
        self, peer_id: str, agent_metadata: bytes, base_addr: int, num_blocks: int, block_len: int
    ) -> None:
        """Raises ValueError for blocks of another size. Whether the peer can be reached its transfers say."""
        if block_len != self.block_len:
            raise ValueError(f"peer {peer_id} has blocks of {block_len} bytes, and not of {self.block_len}")
        peer = self._peers[peer_id] = _Peer()
        peer.connecting = self._channel.submit_connect(self._queue, self._id, agent_metadata)
        peer.connecting.user_data = lambda operation: self._connected(peer_id, peer, operation)

    def _connected(self, peer_id: str, peer: _Peer, operation: Operation) -> None:
        peer.connecting = None
        if operation.error is None:
            peer.channel_id = operation.result().id
        else:
            _logger.error("peer %s can't be connected to: %s", peer_id, operation.error)
        waiting, peer.waiting = peer.waiting, []
        for transfer in waiting:
            self._write(peer, transfer)

    def remove_remote_peer(self, peer_id: str) -> None:
        peer = self._peers.pop(peer_id, None)
        if peer is None:
            return
        for transfer in peer.waiting:
            transfer.arrived = False
        if peer.connecting is not None:
            peer.connecting.user_data = self._connected_too_late
            peer.connecting.cancel()
        elif peer.channel_id:
            self._disconnect(peer.channel_id)

    def _connected_too_late(self, operation: Operation) -> None:
        if operation.error is None:
            self._disconnect(operation.result().id)

    def _disconnect(self, channel_id: str) -> None:
        if all(peer.channel_id != channel_id for peer in self._peers.values()):
            operation = self._channel.submit_disconnect(self._queue, channel_id)
            operation.user_data = lambda _: None

    def write_blocks(self, peer_id: str, local_idxs: list[int], remote_idxs: list[int]) -> int | None:
        peer = self._peers.get(peer_id)
        if peer is None or (peer.connecting is None and not peer.channel_id):
            _logger.warning("peer %s is not connected", peer_id)
            return None
        transfer = _Transfer(peer_id, list(local_idxs), list(remote_idxs))
        transfer_id = next(self._ids)
        self._transfers[transfer_id] = transfer
        if peer.connecting is not None:
            peer.waiting.append(transfer)
        else:
            self._write(peer, transfer)
        return transfer_id

    def _write(self, peer: _Peer, transfer: _Transfer) -> None:
        if transfer.arrived is not None or not peer.channel_id:
            transfer.arrived = False
            return
        try:
            remote = np.array(transfer.remote, dtype=np.uint64)
            operation = self._channel.submit_write(
                self._queue, Pages(transfer.local), peer.channel_id, remote_indexes=remote
            )
        except (TransferError, TypeError, ValueError, OverflowError) as error:
            _logger.error("writing %d blocks to peer %s: %s", len(transfer.local), transfer.peer_id, error)
            transfer.arrived = False
            return
        transfer.operation = operation
        operation.user_data = lambda ended: self._written(peer, transfer, ended)

    def _written(self, peer: _Peer, transfer: _Transfer, operation: Operation) -> None:
        error = operation.error
        if error is None:
            transfer.arrived = True
            return
        if not error.cancelled:
            _logger.error("writing %d blocks to peer %s: %s", len(transfer.local), transfer.peer_id, error)
        if error.may_still_land and self._channel.remote_xfer_handler_exists(peer.channel_id):
            # What comes after a write says that it has landed, or never does.
            follower = self._channel.submit_notify(self._queue, peer.channel_id, b"", _SETTLED)
            follower.user_data = lambda _: setattr(transfer, "arrived", False)
            transfer.operation = None
        else:
            transfer.arrived = False

    def _receive(self) -> None:
        """Takes peers' followers from the queue, where they would take the place of others'."""
        operation = self._channel.submit_receive_notifications(self._queue, _SETTLED, 1)
        operation.user_data = lambda ended: None if ended.error is not None else self._receive()

    def _drain(self) -> None:
        while ended := self._queue.drain():
            for operation in ended:
                operation.user_data(operation)

    def poll(self, peer_id: str | None = None) -> PollResult:
        self._drain()
        ended: dict[bool, list[int]] = {True: [], False: []}
        for transfer_id, transfer in self._transfers.items():
            if transfer.arrived is not None and peer_id in (None, transfer.peer_id):
                ended[transfer.arrived].append(transfer_id)
        for transfer_id in (*ended[True], *ended[False]):
            del self._transfers[transfer_id]
        return PollResult(done=ended[True], failed=ended[False])

    def cancel(self, transfer_ids: Iterable[int], mode: Literal["immediate", "wait"] = "immediate") -> list[int]:
        cancelled = [(number, self._transfers[number]) for number in transfer_ids if number in self._transfers]
        for _, transfer in cancelled:
            if transfer.operation is not None:
                transfer.operation.cancel()
        self._drain()
        left = []
        for number, transfer in cancelled:
            peer = self._peers.get(transfer.peer_id)
            if peer is not None and transfer in peer.waiting:
                peer.waiting.remove(transfer)  # it never begins
                transfer.arrived = False
            if mode == "immediate" or transfer.arrived is not None:
                del self._transfers[number]
            else:
                left.append(number)
        return left

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._channel.close()
        self._queue.drain()
        self._transfers.clear()
        self._peers.clear()
