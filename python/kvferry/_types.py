# SPDX-License-Identifier: Apache-2.0
"""What channels are given and hand out, as values."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from . import _kvferry

__all__ = ["Access", "Notification", "PeerEvent", "PeerInfo", "RdmaRail", "RemoteRegion", "Road", "SideMessage"]

#: The one-sided operations that peers may use on a region.
Access = Literal["none", "read", "write", "read_write"]


class RemoteRegion(NamedTuple):
    """A peer's region. Sizes are in bytes."""

    size: int
    page_size: int
    access: Access
    #: By which it is named: ``remote_region``, the first number of a row of ``remote_ranges``.
    number: int

    @property
    def page_count(self) -> int:
        return self.size // self.page_size if self.page_size else 0


class PeerInfo(NamedTuple):
    """A connected peer."""

    id: str
    #: Drawn anew at each start of the peer's channel.
    incarnation: int
    #: Where the peer's handshakes are answered; empty if it hasn't said.
    init_url: str
    regions: tuple[RemoteRegion, ...]
    #: How the bytes travel, for people.
    path: str


class Notification(NamedTuple):
    """What a peer attached to a write or read, or sent alone."""

    peer_id: str
    payload: bytes
    incarnation: int
    key: int


class PeerEvent(NamedTuple):
    """News of a peer."""

    kind: Literal["connected", "gone", "restarted"]
    peer_id: str
    incarnation: int
    #: The name of the error that the connection ended with.
    cause: str | None
    #: How many older events were dropped before this one, because nobody took them.
    missed: int


class SideMessage(NamedTuple):
    """A message of the handshake: a msgpack map whose key "type" has ``type``, as msgspec encodes a tagged struct."""

    type: str
    encoded: bytes

    @classmethod
    def decode(cls, encoded: bytes) -> SideMessage:
        """Looks for the type in an encoded message.

        Raises TransferError ("malformed_message") for anything that is no such map.
        """
        return cls(_kvferry.message_type(encoded), encoded)


class Road(NamedTuple):
    """A transport among those of an ``AutoTransferChannel``."""

    transport: Literal["shm", "tcp", "rdma"]
    #: What is the transport's own among its options; the others are the channel's.
    options: dict[str, Any] = {}
    #: What both sides call it; empty: as the transport.
    name: str = ""


class RdmaRail(NamedTuple):
    """A port of an RDMA device."""

    device: str
    port: int = 1
    #: An entry of the port's GID table; None: chosen by address.
    gid_index: int | None = None
    #: InfiniBand's partition; None: the first of the port's table.
    partition_key: int | None = None
