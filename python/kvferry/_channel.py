# SPDX-License-Identifier: Apache-2.0
"""The channels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from . import _kvferry, _logging
from ._errors import TransferError
from ._kvferry import CompletionQueue, Operation, Region
from ._types import Notification, PeerEvent, PeerInfo, RdmaRail, SideMessage
from ._unclaimed import Unclaimed

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from ._options import (
        AutoOptions, MemoryLike, Objects, OneSidedSpec, PairedSpec, RdmaOptions, ShmOptions, TcpOptions,
    )  # fmt: skip

__all__ = [
    "AutoTransferChannel",
    "BaseTransferChannel",
    "RdmaTransferChannel",
    "ShmTransferChannel",
    "TcpTransferChannel",
    "to_prometheus",
]

#: `kvferry::errc::handshake_failed`: what a peer gets where a handler's exception has no code of its own.
_HANDSHAKE_FAILED = 24


def _text_of(error: BaseException) -> str:
    """For the peer. An exception need not be able to say what it is."""
    try:
        text = str(error) if isinstance(error, TransferError) else f"{type(error).__name__}: {error}"
    except Exception:
        text = type(error).__name__
    return text.replace("\0", "\\x00").encode(errors="backslashreplace").decode()


class _AnsweringOnceMade(type):
    """Lets side messages through to an object's methods when all of its ``__init__`` have run."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if isinstance(made, BaseTransferChannel):
            made._native.answer_side_messages()
        return made


def _handler_of(channel: BaseTransferChannel) -> Callable[[str, bytes], bytes | tuple[int, str]]:
    """What answers side messages by the channel's method, and doesn't keep the channel."""
    reference = weakref.ref(channel)

    def answer(kind: str, encoded: bytes) -> bytes | tuple[int, str]:
        channel = reference()
        if channel is None:
            return _HANDSHAKE_FAILED, "the channel is going"
        try:
            answered = channel.handle_init_side_msg(SideMessage(kind, encoded))
            if not isinstance(answered, SideMessage):
                raise TypeError(f"handle_init_side_msg returned no SideMessage, but {answered!r}")
            if not isinstance(answered.encoded, bytes):
                raise TypeError(f"handle_init_side_msg returned a SideMessage of {answered.encoded!r}, which is no bytes")
            return answered.encoded
        except TransferError as error:
            own = error.category == "kvferry" and isinstance(error.code, int) and 0 < error.code < 1 << 31
            return error.code if own else _HANDSHAKE_FAILED, _text_of(error)
        except BaseException as error:  # SystemExit, too: it would end a thread that is the channel's
            _logging.log_exception(
                "side_message_failed", f"handle_init_side_msg of a message of type {kind!r}", channel.transport,
                "handshake_failed",
            )  # fmt: skip
            return _HANDSHAKE_FAILED, _text_of(error)

    return answer


class BaseTransferChannel(metaclass=_AnsweringOnceMade):
    """Moves pages of KV caches between peers, over any transport; see the classes for each.

    Objects are buffers: a sequence of anything with the buffer protocol or DLPack on the CPU, or of (address, size);
    ``Pages`` of the channel's own regions; or ``Addresses``. The channel holds references to them until the operation
    has ended. An object written to (read from) page ``i`` lies at ``[i * page_size, i * page_size + size)`` of the peer's
    region.

    Blocking methods release the GIL. A signal whose handler raises (Ctrl-C) cancels the operation; the exception goes
    on once the operation has ended, so that nothing touches its memory any more. A notification, or news of a peer,
    that it had taken by then is for a call of its kind that blocks or is awaited, already or next. ``submit_...`` methods
    return at once: the operation ends in a ``CompletionQueue``. For asyncio see ``kvferry.aio``.

    Failures raise ``TransferError``; arguments that make no sense raise ``TypeError`` or ``ValueError``. Timeouts are
    in seconds; None is the channel's default, except where a method says otherwise.

    Methods may be called from any thread. ``close()`` ends everything; so do the end of a ``with`` block, the
    interpreter's exit, and the loss of the last reference. A forked child can't use its parent's channels, but make its
    own.
    """

    _transport: ClassVar[str]

    def __init__(self, *, regions: Sequence[Region] = (), **options: Any) -> None:
        if not hasattr(type(self), "_transport"):
            raise TypeError(f"{type(self).__name__} has no transport: derive from TcpTransferChannel, say")
        overridden = type(self).handle_init_side_msg is not BaseTransferChannel.handle_init_side_msg
        _logging.start()
        self._native = _kvferry.Channel(
            self._transport, list(regions), options, _handler_of(self) if overridden else None
        )
        self._unclaimed = Unclaimed(self._native)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends everything: what is pending ends with "closed", all connections are dropped, and references to the
        regions' memory are let go. May be called again."""
        self._native.close()

    # Facts

    @property
    def transport(self) -> str:
        """The transport's name: "tcp", "shm", "auto", "rdma"."""
        return self._native.transport

    @property
    def peer_init_url(self) -> str:
        """Where this channel answers handshakes, with the port that was really bound; empty without a listener."""
        return self._native.peer_init_url

    @property
    def incarnation(self) -> int:
        """What tells this channel from a later one of its id: drawn at random. Peers may name it in ``incarnation``."""
        return self._native.incarnation

    def capabilities(self) -> dict[str, Any]:
        """What the transport supports: send_recv, write, read, notifications, ranges, checksums, region_changes,
        unregistered_objects and max_notification_bytes."""
        return self._native.capabilities()

    def peer_info(self, peer_id: str) -> PeerInfo | None:
        """A connected peer; None if there is no usable connection."""
        return self._native.peer_info(peer_id)

    def peers(self) -> list[PeerInfo]:
        """All peers with a usable connection, whichever side connected, ordered by id."""
        return self._native.peers()

    def stats(self) -> dict[str, Any]:
        """The channel's counters since it was made. Durations are in seconds."""
        return self._native.stats()

    # Peers

    def lazy_init_peer_connection(
        self,
        local_id: str,
        peer_id: str,
        peer_init_url: str,
        side_message: SideMessage | None = None,
        *,
        timeout: float | None = None,
    ) -> SideMessage | None:
        """Makes a peer usable: shakes hands at its url and connects, unless it is usable already. Then sends the side
        message if there is one, and returns its answer."""
        operation = self.submit_lazy_init_peer_connection(
            None, local_id, peer_id, peer_init_url, side_message, timeout=timeout
        )
        answer: SideMessage | None = operation.result()
        return answer

    def submit_lazy_init_peer_connection(
        self,
        queue: CompletionQueue | None,
        local_id: str,
        peer_id: str,
        peer_init_url: str,
        side_message: SideMessage | None = None,
        *,
        timeout: float | None = None,
    ) -> Operation:
        """As ``lazy_init_peer_connection``; ends in ``queue``."""
        encoded = None if side_message is None else side_message.encoded
        return self._native.init_peer(local_id, peer_id, peer_init_url, encoded, timeout, queue)

    def remote_xfer_handler_exists(self, peer_id: str) -> bool:
        """Whether there is a usable connection to the peer."""
        return self._native.exists(peer_id)

    def handle_init_side_msg(self, message: SideMessage) -> SideMessage:
        """Answers a side message; to be overridden by those who have messages of their own.

        Runs on a thread that the channel keeps for side messages, and not before all ``__init__`` have run. An
        exception becomes an error for the peer: a ``TransferError`` with its code, others as "handshake_failed" with
        their text; these are logged. The default answers LMCache's messages.
        """
        return SideMessage.decode(self._native.own_answer(message.encoded))

    def send_init_side_msg(
        self, peer_init_url: str, message: SideMessage, *, timeout: float | None = None
    ) -> SideMessage:
        """Sends one side message to whoever answers handshakes at the url, and returns the answer. Needs no
        connection."""
        answer: SideMessage = self.submit_send_init_side_msg(None, peer_init_url, message, timeout=timeout).result()
        return answer

    def submit_send_init_side_msg(
        self, queue: CompletionQueue | None, peer_init_url: str, message: SideMessage, *, timeout: float | None = None
    ) -> Operation:
        """As ``send_init_side_msg``; ends in ``queue``."""
        return self._native.send_message(peer_init_url, message.encoded, timeout, queue)

    def local_metadata(self, local_id: str) -> bytes:
        """What another channel's ``connect`` takes to connect to this one. Opaque, no secret, below 1 KiB."""
        return self._native.local_metadata(local_id)

    def connect(self, local_id: str, metadata: bytes, *, timeout: float | None = None) -> PeerInfo:
        """Connects to the channel whose ``local_metadata`` this is, and only to that very incarnation."""
        peer: PeerInfo = self.submit_connect(None, local_id, metadata, timeout=timeout).result()
        return peer

    def submit_connect(
        self, queue: CompletionQueue | None, local_id: str, metadata: bytes, *, timeout: float | None = None
    ) -> Operation:
        """As ``connect``; ends in ``queue``."""
        return self._native.connect(local_id, metadata, timeout, queue)

    def disconnect(self, peer_id: str) -> None:
        """Ends the connection to a peer. When this returns, nothing of the peer's lands here any more."""
        self.submit_disconnect(None, peer_id).result()

    def submit_disconnect(self, queue: CompletionQueue | None, peer_id: str) -> Operation:
        """As ``disconnect``; ends in ``queue``."""
        return self._native.disconnect(peer_id, queue)

    def wait_peer_event(self, timeout: float | None = None) -> PeerEvent:
        """The next thing that happened to any peer, oldest first. Without a timeout it waits for as long as it
        takes."""
        event: PeerEvent
        [event] = self._unclaimed.receive(
            "peer event",
            1,
            timeout,
            lambda _, left, seen, started: self._native.wait_peer_event(left, None, seen, started),
        )
        return event

    def submit_wait_peer_event(self, queue: CompletionQueue | None, timeout: float | None = None) -> Operation:
        """As ``wait_peer_event``; ends in ``queue``."""
        return self._native.wait_peer_event(timeout, queue)

    def fence(self, peer_id: str, timeout: float | None = None) -> None:
        """Returns when the writes that a peer has started so far can no longer change this channel's regions."""
        self.submit_fence(None, peer_id, timeout).result()

    def submit_fence(self, queue: CompletionQueue | None, peer_id: str, timeout: float | None = None) -> Operation:
        """As ``fence``; ends in ``queue``."""
        return self._native.fence(peer_id, timeout, queue)

    # Regions that come and go

    def add_region(self, region: Region) -> int:
        """Offers one more region to all peers. Returns its number, which is never given again."""
        return self._native.add_region(region)

    def remove_region(self, number: int, timeout: float | None = None) -> None:
        """Takes a region back. Returns when nothing can touch its memory any more, and no reference to it is held."""
        self.submit_remove_region(None, number, timeout).result()

    def submit_remove_region(
        self, queue: CompletionQueue | None, number: int, timeout: float | None = None
    ) -> Operation:
        """As ``remove_region``; ends in ``queue``. The reference to the memory goes with the next call that adds or removes
        a region."""
        return self._native.remove_region(number, timeout, queue)

    # Transfers

    def get_local_mem_indices(self, objects: Sequence[MemoryLike], region: int = 0) -> list[int]:
        """The page number of each object in a local region."""
        return self._native.local_mem_indices(list(objects), region)

    def batched_write(self, objects: Objects, peer_id: str, **spec: Unpack[OneSidedSpec]) -> int:
        """Writes objects into pages, or byte ranges, of the peer's regions.

        Returns their number when all are in the peer's memory. After a ``TransferError`` ``transferred`` says how many
        are there all the same, and with ``statuses=True`` ``statuses`` says which.
        """
        count: int = self._native.transfer("write", objects, peer_id, spec, None).result()
        return count

    def batched_read(self, objects: Objects, peer_id: str, **spec: Unpack[OneSidedSpec]) -> int:
        """Reads pages, or byte ranges, of the peer's regions into buffers, each filled whole. Returns their number."""
        count: int = self._native.transfer("read", objects, peer_id, spec, None).result()
        return count

    def batched_send(self, objects: Objects, peer_id: str, **spec: Unpack[PairedSpec]) -> int:
        """Sends objects to the peer's ``batched_recv`` of the same tag. Returns their number."""
        count: int = self._native.transfer("send", objects, peer_id, spec, None).result()
        return count

    def batched_recv(self, objects: Objects, peer_id: str, **spec: Unpack[PairedSpec]) -> list[int]:
        """Receives objects from the peer's ``batched_send`` of the same tag. Returns how many bytes each has."""
        operation = self._native.transfer("recv", objects, peer_id, spec, None)
        operation.result()
        return operation.sizes

    def submit_write(
        self, queue: CompletionQueue, objects: Objects, peer_id: str, **spec: Unpack[OneSidedSpec]
    ) -> Operation:
        """Starts a ``batched_write`` that ends in ``queue``."""
        return self._native.transfer("write", objects, peer_id, spec, queue)

    def submit_read(
        self, queue: CompletionQueue, objects: Objects, peer_id: str, **spec: Unpack[OneSidedSpec]
    ) -> Operation:
        """Starts a ``batched_read`` that ends in ``queue``."""
        return self._native.transfer("read", objects, peer_id, spec, queue)

    def submit_send(
        self, queue: CompletionQueue, objects: Objects, peer_id: str, **spec: Unpack[PairedSpec]
    ) -> Operation:
        """Starts a ``batched_send`` that ends in ``queue``."""
        return self._native.transfer("send", objects, peer_id, spec, queue)

    def submit_recv(
        self, queue: CompletionQueue, objects: Objects, peer_id: str, **spec: Unpack[PairedSpec]
    ) -> Operation:
        """Starts a ``batched_recv`` that ends in ``queue``; ``Operation.sizes`` says how many bytes each object has."""
        return self._native.transfer("recv", objects, peer_id, spec, queue)

    # Notifications

    def notify(self, peer_id: str, payload: bytes, key: int = 0, *, timeout: float | None = None) -> None:
        """Sends a notification alone. Returns when the peer's queue has it."""
        self.submit_notify(None, peer_id, payload, key, timeout=timeout).result()

    def submit_notify(
        self,
        queue: CompletionQueue | None,
        peer_id: str,
        payload: bytes,
        key: int = 0,
        *,
        timeout: float | None = None,
    ) -> Operation:
        """As ``notify``; ends in ``queue``."""
        return self._native.notify(peer_id, payload, key, timeout, queue)

    def receive_notification(self, timeout: float | None = None) -> Notification:
        """The next notification without a key, oldest first. Without a timeout it waits for as long as it takes."""
        notification: Notification
        [notification] = self._unclaimed.receive(
            0,
            1,
            timeout,
            lambda _, left, seen, started: self._native.receive_notification(left, None, seen, started),
        )
        return notification

    def submit_receive_notification(self, queue: CompletionQueue | None, timeout: float | None = None) -> Operation:
        """As ``receive_notification``; ends in ``queue``."""
        return self._native.receive_notification(timeout, queue)

    def receive_notifications(self, key: int, count: int, timeout: float | None = None) -> list[Notification]:
        """The next ``count`` notifications of a key, from whatever peers; fewer if the timeout passes first. Without a
        timeout it waits for as long as it takes."""
        return self._unclaimed.receive(
            key,
            count,
            timeout,
            lambda most, left, seen, started: self._native.receive_notifications(key, most, left, None, seen, started),
        )

    def submit_receive_notifications(
        self, queue: CompletionQueue | None, key: int, count: int, timeout: float | None = None
    ) -> Operation:
        """As ``receive_notifications``; ends in ``queue``."""
        return self._native.receive_notifications(key, count, timeout, queue)


class TcpTransferChannel(BaseTransferChannel):
    """Moves pages over TCP, gathered from and scattered to their places by the kernel.

    ``regions`` are offered to peers, numbered in their order. The options are those of C++'s ``TcpOptions``.
    """

    _transport = "tcp"

    def __init__(self, *, regions: Sequence[Region] = (), **options: Unpack[TcpOptions]) -> None:
        super().__init__(regions=regions, **options)


class ShmTransferChannel(BaseTransferChannel):
    """Moves pages between processes of one host that are in one network namespace: over a Unix-domain socket, and, where
    the kernel allows it, by reading the other process's memory. ``PeerInfo.path`` says which.

    The processes trust each other as far as the kernel lets them. The options are those of C++'s ``ShmOptions``.
    """

    _transport = "shm"

    def __init__(self, *, regions: Sequence[Region] = (), **options: Unpack[ShmOptions]) -> None:
        super().__init__(regions=regions, **options)


class AutoTransferChannel(BaseTransferChannel):
    """Moves pages over the best transport that there is between two peers, which has to have one of these, too.

    ``PeerInfo.path`` says which road is taken, and why no better one; so does a log record. ``roads`` are the transports,
    the best first: ``[Road("shm"), Road("tcp", {"lanes_per_peer": 4})]``. ``require`` names those that may be taken:
    without a way over one of them connecting ends with "no_path". The options are those of C++'s ``AutoOptions``.
    """

    _transport = "auto"

    def __init__(self, *, regions: Sequence[Region] = (), **options: Unpack[AutoOptions]) -> None:
        super().__init__(regions=regions, **options)


class RdmaTransferChannel(BaseTransferChannel):
    """Moves pages by RDMA, over InfiniBand or RoCE.

    libibverbs is looked for when a channel is made; where it is missing, that raises ``TransferError`` ("ENOSYS"), and
    where there is no active device, "ENODEV". The options are those of C++'s ``RdmaOptions``.
    """

    _transport = "rdma"

    def __init__(self, *, regions: Sequence[Region] = (), **options: Unpack[RdmaOptions]) -> None:
        super().__init__(regions=regions, **options)

    @staticmethod
    def active_rails() -> list[RdmaRail]:
        """The active ports of this host's RDMA devices; none where there is no libibverbs."""
        return [RdmaRail(device, port) for device, port in _kvferry.active_rails()]


def to_prometheus(
    *channels: BaseTransferChannel, labels: Sequence[Mapping[str, str]] | None = None
) -> str:
    """The channels' statistics in Prometheus' text format, version 0.0.4.

    ``labels``: further labels for each channel. Channels of the same transport need some that tell them apart.
    """
    if labels is None:
        labels = [{} for _ in channels]
    if len(labels) != len(channels):
        raise ValueError(f"there are {len(channels)} channels and labels for {len(labels)}")
    return _kvferry.to_prometheus([(channel._native, dict(own)) for channel, own in zip(channels, labels)])
