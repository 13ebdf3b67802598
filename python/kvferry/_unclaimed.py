# SPDX-License-Identifier: Apache-2.0
"""Notifications and news of peers that a call had taken when it was cancelled, for others of their kind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal, Optional, Union

from ._errors import TransferError
from ._kvferry import Channel, Operation
from ._types import Notification

__all__ = ["Kind", "Start", "Unclaimed", "listed"]

#: A notification's key, 0 for those without one; or news of peers.
Kind = Union[int, Literal["peer event"]]

#: Starts an operation that receives, given how many, a timeout, `Unclaimed.seen` and a list. The operation is in the list,
#: not in what is returned: a signal's handler may raise between the two. It isn't there if it wasn't started.
Start = Callable[[int, Optional[float], int, list[Operation]], object]


def listed(result: Any) -> list[Any]:
    """The result of an operation that receives, one or several, as a list."""
    return result if isinstance(result, list) else [result]


def _at_once(calls: Iterator[Any]) -> None:
    """Makes the calls of a ``map``: no signal's handler, which may come back to what they change, runs between them."""
    deque(calls, maxlen=0)


def was_cancelled(operation: Operation) -> bool:
    return operation.error is not None and operation.error.name == "cancelled"


class Unclaimed:
    """What a channel keeps, oldest first. Its methods may be called from any thread.

    Whoever waits for something of the same kind when it is kept - another task, perhaps of another loop, or a thread in a
    blocking call - has its operation cancelled, and looks here again.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._kept: dict[Kind, deque[Any]] = {}
        self._awaited: dict[Operation, asyncio.AbstractEventLoop] = {}
        self._left: dict[Operation, None] = {}  # oldest first
        self._lock = threading.RLock()  # a signal's handler may come back here

    def _keep(self, operation: Operation) -> None:
        """Keeps what an operation that has ended had taken, if it had and it isn't kept already."""
        try:
            results = listed(operation.result())
        except TransferError:
            return
        if results:
            first = results[0]  # an operation receives things of one kind
            kind: Kind = first.key if isinstance(first, Notification) else "peer event"
            self._look_again(kind)  # before: those who wait are told whatever comes, and wait for the lock
            _at_once(map(operation._hand_over, self._deque_of(kind), [results]))

    def _deque_of(self, kind: Kind) -> Iterator[deque[Any]]:
        """To be used in `_at_once`: an empty one is forgotten in any call."""
        return map(self._kept.setdefault, [kind], [deque()])

    def _look_again(self, kind: Kind) -> None:
        self._channel.look_again(None if kind == "peer event" else kind)

    @property
    def seen(self) -> int:
        """How often something has been kept. To be read before `take`, and given to what is then started."""
        return self._channel.kept

    def leave(self, operation: Operation) -> None:
        """Ends an operation for which nobody waits any more; what it has taken when it has ended is kept."""
        self._left[operation] = None
        operation.cancel()

    def give_up(self, started: list[Operation]) -> None:
        """What they have taken is for others, by whatever their caller is ended."""
        for operation in started:
            self.leave(operation)
        self.keep_ended()  # of others, too, if that is what was interrupted

    @contextlib.contextmanager
    def awaited(self, operation: Operation, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """In this loop: once that is closed nobody waits any more."""
        self._awaited[operation] = loop
        try:
            yield
        finally:
            self._awaited.pop(operation, None)

    def keep_ended(self) -> None:
        """What operations have taken that were left, or whose calls in C++ were interrupted.

        An operation is forgotten in one place when it is in the next, and what it has taken is handed over once: after a
        signal's handler that raises the next call goes on.
        """
        self._channel.take_unclaimed(self._left)
        if not self._left and not self._awaited:
            return
        with self._lock:
            for operation, loop in list(self._awaited.items()):
                if loop.is_closed():
                    self.leave(operation)
                    self._awaited.pop(operation, None)
            for operation in list(self._left):
                if operation.done():
                    self._keep(operation)
                    self._left.pop(operation, None)

    def take(self, kind: Kind, most: int, taken: list[Any]) -> None:
        """Moves what is kept to ``taken``, in one call: a signal's handler that raises, or takes something itself, leaves
        each thing in one of them."""
        self.keep_ended()
        if not self._kept:
            return
        with self._lock:
            kept = self._kept.get(kind, deque())
            taken.extend(map(deque.popleft, itertools.takewhile(bool, itertools.repeat(kept, most))))
            empty = itertools.filterfalse(self._kept.get, [kind])
            _at_once(map(self._kept.pop, empty, [None]))

    def put_back(self, kind: Kind, taken: list[Any], for_others: bool) -> None:
        """Moves it back, in one call as `take`. To be called again if it is interrupted."""
        if taken:
            with self._lock:
                backwards = map(list.pop, itertools.repeat(taken, len(taken)))
                _at_once(map(deque.extendleft, self._deque_of(kind), [backwards]))
        if for_others and self._kept.get(kind):
            self._look_again(kind)

    def receive(
        self,
        kind: Kind,
        count: int,
        timeout: float | None,
        start: Start,
    ) -> list[Any]:
        """What is kept, and from ``start``, which blocks, what lacks."""
        until = None if timeout is None else time.monotonic() + timeout
        left = timeout
        while True:
            seen = self.seen
            taken: list[Any] = []
            started: list[Operation] = []
            try:
                self.take(kind, count, taken)
                if taken and len(taken) == count:
                    return taken
                start(count - len(taken), left, seen, started)
                for operation in started:
                    if not was_cancelled(operation):
                        return taken + listed(operation.result())
                self.put_back(kind, taken, False)
            except BaseException:
                self.put_back(kind, taken, True)
                self.give_up(started)
                raise
            left = None if until is None else max(until - time.monotonic(), 0.0)
