# SPDX-License-Identifier: Apache-2.0
"""Channels in asyncio: no thread, the event loop watches one descriptor.

    channel = kvferry.aio.AsyncChannel(kvferry.TcpTransferChannel(...))
    await channel.lazy_init_peer_connection("prefill", "decode", url)
    await channel.batched_write(pages, "decode", remote_indexes=indexes)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ._channel import BaseTransferChannel
from ._kvferry import CompletionQueue, Operation, Region
from ._types import Notification, PeerEvent, PeerInfo, SideMessage
from ._unclaimed import Kind, Start, listed, was_cancelled

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from ._options import Objects, OneSidedSpec, PairedSpec

__all__ = ["AsyncChannel"]

_Channel = TypeVar("_Channel", bound=BaseTransferChannel)

_MOST_DRAINED = 1024


def _drain_of(reference: weakref.ref[AsyncChannel[Any]]) -> None:
    channel = reference()
    if channel is not None:
        channel._drain()


def _let_go(loop: asyncio.AbstractEventLoop, queue: CompletionQueue) -> None:
    """The loop watches the queue no longer. On any thread, as the garbage collector may call it."""
    if asyncio._get_running_loop() is loop:
        loop.remove_reader(queue.fileno())
        return
    # The queue stays until then: its descriptor's number isn't somebody else's.
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(lambda: loop.remove_reader(queue.fileno()))


class AsyncChannel(Generic[_Channel]):
    """A channel whose operations are awaited. Belongs to the event loop in which it is first awaited.

    The methods are those of ``BaseTransferChannel``. A task that is cancelled cancels its operation, and goes on when
    that has ended: nothing touches its memory any more then. A notification, or news of a peer, that it had taken by
    then is for a call of its kind that waits already, or the next one. A loop doesn't keep a channel that is lost.
    """

    def __init__(self, channel: _Channel) -> None:
        self.channel = channel
        self._queue = CompletionQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watched: weakref.finalize[[asyncio.AbstractEventLoop, CompletionQueue], Any] | None = None
        self._closing = False
        self._waiting: dict[int, asyncio.Future[None]] = {}
        #: Operations that have ended, and whose tasks may not know it yet.
        self._drained: deque[Operation] = deque()
        self._last = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel, on a thread, as that may take a moment; lets the loop go when all operations have
        ended."""
        self._closing = True
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.channel.close)
        if self._loop is loop:
            self._drain()

    def _drain(self) -> None:
        try:
            self._drain_queue()
        except BaseException:  # of a signal's handler. The queue has told of what is drained
            if self._loop is not None:
                self._loop.call_soon(_drain_of, weakref.ref(self))
            raise

    def _drain_queue(self) -> None:
        while True:
            # In one call: no handler that raises comes between the two.
            self._drained.extend(itertools.chain.from_iterable(map(self._queue.drain, [_MOST_DRAINED])))
            if not self._drained:
                break
            while self._drained:
                waiting = self._waiting.get(self._drained[0].user_data)
                if waiting is None:
                    self.channel._unclaimed.keep_ended()
                elif not waiting.done():
                    waiting.set_result(None)
                self._drained.popleft()
        if self._closing and not len(self._queue) and self._loop is not None and self._watched is not None:
            _let_go(self._loop, self._queue)
            self._watched.detach()
            self._loop = None

    def _here(self) -> _Channel:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            loop.add_reader(self._queue.fileno(), _drain_of, weakref.ref(self))
            self._watched = weakref.finalize(self, _let_go, loop, self._queue)
            self._watched.atexit = False
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("this channel belongs to another event loop")
        return self.channel

    async def _end(self, operation: Operation) -> Any:
        await self._ended(operation)
        return operation.result()

    async def _ended(self, operation: Operation) -> None:
        self._last += 1
        number = self._last
        operation.user_data = number
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[number] = ended
        cancelled: asyncio.CancelledError | None = None
        try:
            while not ended.done():
                try:
                    await asyncio.shield(ended)
                except asyncio.CancelledError as error:
                    cancelled = error
                    operation.cancel()
        finally:
            self._waiting.pop(number, None)
        if cancelled is not None:
            raise cancelled

    async def _receive(
        self,
        kind: Kind,
        count: int,
        timeout: float | None,
        start: Start,
    ) -> list[Any]:
        """What cancelled calls have left, and from ``start`` what lacks."""
        unclaimed = self.channel._unclaimed
        now = asyncio.get_running_loop().time
        until = None if timeout is None else now() + timeout
        while True:
            seen = unclaimed.seen
            taken: list[Any] = []
            started: list[Operation] = []
            try:
                unclaimed.take(kind, count, taken)
                if taken and len(taken) == count:
                    return taken
                start(count - len(taken), None if until is None else max(until - now(), 0.0), seen, started)
                for operation in started:
                    with unclaimed.awaited(operation, asyncio.get_running_loop()):
                        await self._ended(operation)
                    if not was_cancelled(operation):
                        return taken + listed(operation.result())
                unclaimed.put_back(kind, taken, False)
            except BaseException:
                unclaimed.put_back(kind, taken, True)
                unclaimed.give_up(started)
                raise

    async def lazy_init_peer_connection(
        self,
        local_id: str,
        peer_id: str,
        peer_init_url: str,
        side_message: SideMessage | None = None,
        *,
        timeout: float | None = None,
    ) -> SideMessage | None:
        answer: SideMessage | None = await self._end(
            self._here().submit_lazy_init_peer_connection(
                self._queue, local_id, peer_id, peer_init_url, side_message, timeout=timeout
            )
        )
        return answer

    async def send_init_side_msg(
        self, peer_init_url: str, message: SideMessage, *, timeout: float | None = None
    ) -> SideMessage:
        answer: SideMessage = await self._end(
            self._here().submit_send_init_side_msg(self._queue, peer_init_url, message, timeout=timeout)
        )
        return answer

    async def connect(self, local_id: str, metadata: bytes, *, timeout: float | None = None) -> PeerInfo:
        peer: PeerInfo = await self._end(
            self._here().submit_connect(self._queue, local_id, metadata, timeout=timeout)
        )
        return peer

    async def disconnect(self, peer_id: str) -> None:
        await self._end(self._here().submit_disconnect(self._queue, peer_id))

    async def wait_peer_event(self, timeout: float | None = None) -> PeerEvent:
        channel = self._here()
        event: PeerEvent
        [event] = await self._receive(
            "peer event",
            1,
            timeout,
            lambda _, left, seen, started: channel._native.wait_peer_event(left, self._queue, seen, started),
        )
        return event

    async def fence(self, peer_id: str, timeout: float | None = None) -> None:
        await self._end(self._here().submit_fence(self._queue, peer_id, timeout))

    def add_region(self, region: Region) -> int:
        return self._here().add_region(region)

    async def remove_region(self, number: int, timeout: float | None = None) -> None:
        channel = self._here()
        await self._end(channel.submit_remove_region(self._queue, number, timeout))
        channel._native.let_removed_go()

    async def batched_write(self, objects: Objects, peer_id: str, **spec: Unpack[OneSidedSpec]) -> int:
        count: int = await self._end(self._here().submit_write(self._queue, objects, peer_id, **spec))
        return count

    async def batched_read(self, objects: Objects, peer_id: str, **spec: Unpack[OneSidedSpec]) -> int:
        count: int = await self._end(self._here().submit_read(self._queue, objects, peer_id, **spec))
        return count

    async def batched_send(self, objects: Objects, peer_id: str, **spec: Unpack[PairedSpec]) -> int:
        count: int = await self._end(self._here().submit_send(self._queue, objects, peer_id, **spec))
        return count

    async def batched_recv(self, objects: Objects, peer_id: str, **spec: Unpack[PairedSpec]) -> Sequence[int]:
        operation = self._here().submit_recv(self._queue, objects, peer_id, **spec)
        await self._end(operation)
        return operation.sizes

    async def notify(self, peer_id: str, payload: bytes, key: int = 0, *, timeout: float | None = None) -> None:
        await self._end(self._here().submit_notify(self._queue, peer_id, payload, key, timeout=timeout))

    async def receive_notification(self, timeout: float | None = None) -> Notification:
        channel = self._here()
        notification: Notification
        [notification] = await self._receive(
            0,
            1,
            timeout,
            lambda _, left, seen, started: channel._native.receive_notification(left, self._queue, seen, started),
        )
        return notification

    async def receive_notifications(
        self, key: int, count: int, timeout: float | None = None
    ) -> list[Notification]:
        channel = self._here()
        return await self._receive(
            key,
            count,
            timeout,
            lambda most, left, seen, started: channel._native.receive_notifications(
                key, most, left, self._queue, seen, started
            ),
        )
