# SPDX-License-Identifier: Apache-2.0
"""kvferry under vLLM's tiered KV offload, between peers: its ``DataTransport``."""

from __future__ import annotations

import itertools
import logging
import time
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
#: Seconds.
_RETRY_AFTER = 0.1


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
    metadata: bytes
    connecting: Operation | None = None
    #: How the channel knows it; empty until it is connected.
    channel_id: str = ""
    #: What was asked for meanwhile.
    waiting: list[_Transfer] = field(default_factory=list)


class KvferryDataTransport(DataTransport):
    """Writes blocks into peers' memory. No call waits for a peer: ``poll`` takes everything on. One thread.

    A transfer that was cancelled with mode "wait", or has failed, is reported when nothing of it can land any more.
    Where its connection was lost before the peer had answered, that is when a connection anew has succeeded, when
    another one listens in its place, or when the peer is removed: who removes it knows that it has ended or has fenced.
    A peer that stands still and one that is gone look alike from here.

    view: the blocks, [number of blocks, bytes of a block]; held until ``close``.
    options: ``host`` and ``port`` say where peers connect; the lease has no meaning here.
    """

    def __init__(
        self, view: memoryview, config_fields: dict[str, Any] | None = None, options: Options | None = None
    ) -> None:
        super().__init__(view, config_fields=config_fields)
        chosen = options or Options()
        self._id = uuid.uuid4().hex
        self._timeout = chosen.timeout
        self._queue = CompletionQueue()
        self._ids = itertools.count()
        self._transfers: dict[int, _Transfer] = {}
        self._peers: dict[str, _Peer] = {}
        #: Transfers of which something may still land, and when to ask again.
        self._unsettled: list[tuple[float, _Peer, _Transfer]] = []
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
        peer = self._peers[peer_id] = _Peer(agent_metadata)
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
        transfer.operation = None
        if error.may_still_land:
            self._settle(peer, transfer)
        else:
            transfer.arrived = False

    def _settle(self, peer: _Peer, transfer: _Transfer) -> None:
        """What comes after a write, on the same connection or a new one, says that it has landed, or never does."""
        if transfer.arrived is not None or self._peers.get(transfer.peer_id) is not peer:
            transfer.arrived = False
            return
        operation = self._channel.submit_connect(self._queue, self._id, peer.metadata, timeout=self._timeout)
        operation.user_data = lambda ended: self._connected_anew(peer, transfer, ended)

    def _connected_anew(self, peer: _Peer, transfer: _Transfer, operation: Operation) -> None:
        if operation.error is not None:
            self._not_settled(peer, transfer, operation.error)
            return
        channel_id = operation.result().id
        if self._peers.get(transfer.peer_id) is not peer:  # what follows would connect anew
            self._disconnect(channel_id)
            transfer.arrived = False
            return
        follower = self._channel.submit_notify(self._queue, channel_id, b"\0", _SETTLED)
        follower.user_data = lambda ended: self._not_settled(peer, transfer, ended.error)

    def _not_settled(self, peer: _Peer, transfer: _Transfer, error: TransferError | None) -> None:
        if error is None or error.name == "peer_restarted":  # another one listens in its place
            transfer.arrived = False
        else:
            self._unsettled.append((time.monotonic() + _RETRY_AFTER, peer, transfer))

    def _ask_again(self) -> None:
        now = time.monotonic()
        asked, self._unsettled = self._unsettled, []
        for at, peer, transfer in asked:
            if at <= now:
                self._settle(peer, transfer)
            else:
                self._unsettled.append((at, peer, transfer))

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
        self._ask_again()
        ended: dict[bool, list[int]] = {True: [], False: []}
        for transfer_id, transfer in self._transfers.items():
            if transfer.arrived is not None and peer_id in (None, transfer.peer_id):
                ended[transfer.arrived].append(transfer_id)
        for transfer_id in (*ended[True], *ended[False]):
            del self._transfers[transfer_id]
        return PollResult(done=ended[True], failed=ended[False])

    def cancel(self, transfer_ids: Iterable[int], mode: Literal["immediate", "wait"] = "immediate") -> list[int]:
        wanted = dict.fromkeys(transfer_ids)
        cancelled = [(number, self._transfers[number]) for number in wanted if number in self._transfers]
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
                transfer.arrived = bool(transfer.arrived)  # nobody asks for it any more
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
        self._unsettled.clear()
        self._transfers.clear()
        self._peers.clear()
