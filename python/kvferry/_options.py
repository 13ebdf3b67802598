# SPDX-License-Identifier: Apache-2.0
"""The keyword arguments of channels and transfers. Times are in seconds, sizes in bytes; what is left out, or None, has
the library's default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, Union

from . import _kvferry
from ._types import RdmaRail, Road

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from ._dlpack import SupportsDLPack

    #: Host memory: the buffer protocol (bytearray, mmap, numpy), DLPack (torch, jax on CPU), or (address, size).
    MemoryLike = Union[Buffer, SupportsDLPack, tuple[int, int]]
    #: The objects of a batch. A buffer or tensor alone is no sequence of objects.
    Objects = Union[Sequence[MemoryLike], _kvferry.Pages, _kvferry.Addresses]
    #: Page numbers.
    Indexes = Union[NDArray[np.uint64], NDArray[np.int64], Sequence[int]]
    #: Rows of numbers.
    Rows = NDArray[np.uint64]


class ChannelOptions(TypedDict, total=False):
    """Options of every channel."""

    #: Where to answer handshakes: "tcp://host:port", port 0 for any free one. Left out: the channel only connects.
    peer_init_url: str | None
    #: The address that peers are told, where it differs from the bound one.
    advertised_init_url: str | None
    #: The answer to LMCache's P2PInitSideMsg.
    peer_lookup_url: str | None
    require_equal_page_sizes: bool | None
    #: Whether transfers have checksums that don't say otherwise.
    checksums: bool | None
    #: Secures handshakes: the files of this channel's secret key and of the keys of its peers, as kvferry-keygen makes them.
    keyring: tuple[str, str] | None
    #: No channel is made that would move pages off this host unencrypted.
    require_encryption: bool | None
    max_peers: int | None
    #: The deadline of transfers that set none.
    default_timeout: float | None
    handshake_timeout: float | None
    max_pending_operations: int | None
    max_pending_peer_events: int | None
    max_pending_notifications: int | None
    max_pending_notifications_of_peer: int | None
    max_pending_notification_bytes: int | None
    max_pending_notification_bytes_of_peer: int | None
    max_posted_recv_bytes: int | None
    max_posted_recv_bytes_of_peer: int | None
    max_pending_side_message_bytes: int | None
    max_pending_side_message_bytes_of_source: int | None
    max_handshake_bytes: int | None
    io_threads: int | None
    #: How long an I/O thread looks again and again before it sleeps.
    poll_spin: float | None


class TcpOptions(ChannelOptions, total=False):
    """Options of a TCP channel."""

    data_host: str | None
    data_port: int | None
    advertised_data_address: str | None
    allowed_hosts: list[str] | None
    #: Whether data connections are encrypted. Left out: "with_keyring".
    encryption: Literal["with_keyring", "off", "required"] | None
    #: Encrypts by X.509 certificates, both sides', and takes a keyring: the PEM files of this side's chain, its private key, and
    #: the CA that is trusted. Files that change are taken up for the next connection.
    certificates: tuple[str, str, str] | None
    lanes_per_peer: int | None
    stripe_threshold: int | None
    drain_timeout: float | None
    hello_timeout: float | None
    frame_timeout: float | None
    send_buffer: int | None
    receive_buffer: int | None
    congestion_control: str | None
    same_host_congestion_control: str | None
    keepalive_idle: float | None
    user_timeout: float | None


class ShmOptions(ChannelOptions, total=False):
    """Options of a channel within one host."""

    #: Further users (numbers) whose processes may connect, and be connected to.
    allowed_users: list[int] | None
    process_memory: bool | None
    process_memory_threshold: int | None
    drain_timeout: float | None
    frame_timeout: float | None


class AutoOptions(ChannelOptions, total=False):
    """Options of a channel that chooses among transports."""

    #: The best first. Left out: shm, then TCP.
    roads: Sequence[Road] | None
    #: The names of those that may be taken. Left out: all.
    require: list[str] | None
    allow_unencrypted: bool | None
    road_timeout: float | None


class RdmaOptions(ChannelOptions, total=False):
    """Options of an RDMA channel."""

    rails: Sequence[RdmaRail] | None
    stripe_threshold: int | None
    #: Connections to each peer on each rail, of which large batches use all; each costs adapter resources and pinned memory.
    queue_pairs_per_rail: int | None
    queue_pair_threshold: int | None
    slice_bytes: int | None
    #: The adapters may put bytes into regions in any order, as long as notifications come behind them.
    relaxed_ordering: bool | None
    queue_depth: int | None
    read_depth: int | None
    eager_bytes: int | None
    ack_timeout: float | None
    retry_count: int | None
    keepalive_interval: float | None
    drain_timeout: float | None
    parts_timeout: float | None
    #: Nobody else is on the rails' network, or it encrypts: RDMA may be used with require_encryption.
    trusted_fabric: bool | None
    #: Each peer's connection has the regions registered for itself alone, and keys that open them to no other one.
    isolate_peers: bool | None
    service_level: int | None
    traffic_class: int | None


class PairedSpec(TypedDict, total=False):
    """What a send or recv may be told besides its objects and peer."""

    #: A send meets the recv of the same tag.
    tag: int
    #: Which incarnation of the peer this is meant for: its ``incarnation``, from itself or a notification of its. Another one
    #: ends it with "peer_restarted". Left out or 0: the one that this side knows.
    incarnation: int
    #: Whether the bytes are compared with checksums where they have landed; either side may ask.
    checksums: bool | None
    timeout: float | None
    #: Whether each object's outcome is recorded: ``TransferError.statuses``, ``Operation.statuses``.
    statuses: bool


class OneSidedSpec(TypedDict, total=False):
    """What a write or read may be told besides its objects and peer."""

    #: One page number in the peer's region for each object.
    remote_indexes: Indexes | None
    #: Which of the peer's regions ``remote_indexes`` are of.
    remote_region: int
    #: Instead of indexes, one range of the peer's bytes for each object. Rows of (region, offset, size), or of
    #: (region, offset, size, stride, count): ``count`` blocks of ``size`` bytes, ``stride`` bytes apart.
    remote_ranges: Rows | None
    #: For each object (block size, stride): which bytes of its buffer it is made of.
    local_strides: Rows | None
    timeout: float | None
    #: Handed to the peer once all of a write is in its memory, or all of a read in this side's.
    notification: bytes
    #: 0: for ``receive_notification``; another: for ``receive_notifications`` of that key.
    notification_key: int
    #: Which incarnation of the peer this is meant for: its ``incarnation``, from itself or a notification of its. Another one
    #: ends it with "peer_restarted". Left out or 0: the one that this side knows.
    incarnation: int
    #: Whether the bytes are compared with checksums where they have landed; left out: as the channel's options say.
    checksums: bool | None
    #: Whether each object's outcome is recorded: ``TransferError.statuses``, ``Operation.statuses``.
    statuses: bool
