# SPDX-License-Identifier: Apache-2.0
"""Notifications and news of peers that a call had taken when it was cancelled, for the next call of their kind."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal, Union

from ._errors import TransferError
from ._kvferry import Operation
from ._types import Notification

__all__ = ["Kind", "Unclaimed", "listed"]

#: A notification's key, 0 for those without one; or news of peers.
Kind = Union[int, Literal["peer event"]]


def listed(result: Any) -> list[Any]:
    """The result of an operation that receives, one or several, as a list."""
    return result if isinstance(result, list) else [result]


class Unclaimed:
    """What a channel keeps, oldest first. Its methods may be called from any thread."""

    def __init__(self, interrupted: Callable[[], list[Operation]]) -> None:
        self._interrupted = interrupted
        self._kept: dict[Kind, deque[Any]] = {}
        self._awaited: dict[Operation, asyncio.AbstractEventLoop] = {}
        self._left: list[Operation] = []
        self._lock = threading.RLock()  # a signal's handler may come back here

    def keep(self, operation: Operation) -> bool:
        """Keeps what an operation that has ended had taken, if it had."""
        try:
            results = listed(operation.result())
        except TransferError:
            return False
        with self._lock:
            for result in results:
                kind: Kind = result.key if isinstance(result, Notification) else "peer event"
                self._kept.setdefault(kind, deque()).append(result)
        return bool(results)

    def leave(self, operation: Operation) -> None:
        """Ends an operation for which nobody waits any more; what it has taken when it has ended is kept."""
        operation.cancel()
        with self._lock:
            self._left.append(operation)

    @contextlib.contextmanager
    def awaited(self, operation: Operation, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """In this loop: once that is closed nobody waits any more."""
        self._awaited[operation] = loop
        try:
            yield
        except GeneratorExit:  # the task is destroyed
            self.leave(operation)
            raise
        finally:
            self._awaited.pop(operation, None)

    def _ended(self) -> list[Operation]:
        if not self._left and not self._awaited:
            return []
        with self._lock:
            for operation, loop in list(self._awaited.items()):
                if loop.is_closed() and self._awaited.pop(operation, None) is not None:
                    self.leave(operation)
            ended = [operation for operation in self._left if operation.done()]
            self._left = [operation for operation in self._left if operation not in ended]
            return ended

    def take(self, kind: Kind, most: int) -> list[Any]:
        for operation in (*self._interrupted(), *self._ended()):
            self.keep(operation)
        if not self._kept:
            return []
        with self._lock:
            kept = self._kept.get(kind, deque())
            taken = [kept.popleft() for _ in range(min(most, len(kept)))]
            if not kept:
                self._kept.pop(kind, None)
            return taken

    def put_back(self, kind: Kind, taken: list[Any]) -> None:
        if not taken:
            return
        with self._lock:
            self._kept.setdefault(kind, deque()).extendleft(reversed(taken))

    def receive(self, kind: Kind, count: int, start: Callable[[int], Operation]) -> list[Any]:
        """What is kept, and from ``start(how many)``, which blocks, what lacks."""
        taken = self.take(kind, count)
        if taken and len(taken) == count:
            return taken
        try:
            return taken + listed(start(count - len(taken)).result())
        except BaseException:
            self.put_back(kind, taken)
            raise
