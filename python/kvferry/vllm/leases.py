# SPDX-License-Identifier: Apache-2.0
"""Which requests' blocks a prefilling worker keeps for the decoding ones, and until when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Leases"]


@dataclass
class _Lease:
    #: None: the request is still being computed.
    deadline: float | None = None
    #: Ranks of the decoding side that are done, and how many there are.
    done: set[int] = field(default_factory=set)
    readers: int | None = None

    @property
    def released(self) -> bool:
        return self.readers is not None and len(self.done) >= self.readers


class Leases:
    """The leases of one worker. Thread-safe: the engine's thread grants and ends them, peers' messages renew and
    release.

    A request is expected from the step in which it is scheduled: its readers may be done before the worker hears that
    it has finished. A lease that ``take_ended`` has named is unknown from then on, so that a reader whose bytes may be
    another request's is told so.

    duration: seconds, from ``grant`` or the last ``renew``.
    """

    def __init__(self, duration: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._duration = duration
        self._clock = clock
        self._lock = threading.Lock()
        self._leases: dict[str, _Lease] = {}
        self._expired = 0

    def expect(self, request_id: str) -> None:
        """The request's blocks are its own; it is being computed."""
        with self._lock:
            self._leases.setdefault(request_id, _Lease())

    def grant(self, request_id: str) -> None:
        """The request has finished; its blocks stay."""
        with self._lock:
            self._leases.setdefault(request_id, _Lease()).deadline = self._clock() + self._duration

    def forget(self, request_id: str) -> None:
        """The request has ended otherwise; its blocks are freed."""
        with self._lock:
            self._leases.pop(request_id, None)

    def renew(self, request_id: str) -> bool:
        """Whether the lease still holds; if so, it is as long as a new one."""
        with self._lock:
            lease = self._leases.get(request_id)
            if lease is not None and lease.deadline is not None:
                lease.deadline = max(lease.deadline, self._clock() + self._duration)
            return lease is not None

    def release(self, request_id: str, reader: int, readers: int) -> bool:
        """One of ``readers`` has read all that it wants. Returns whether the blocks were the request's until now."""
        with self._lock:
            lease = self._leases.get(request_id)
            if lease is None:
                return False
            lease.done.add(reader)
            lease.readers = readers
            return True

    def take_ended(self) -> set[str]:
        """Requests whose blocks may be used for something else: released by all readers, or not renewed in time."""
        with self._lock:
            now = self._clock()
            ended = set()
            for request_id, lease in self._leases.items():
                if lease.deadline is not None and (lease.released or lease.deadline <= now):
                    ended.add(request_id)
                    self._expired += not lease.released
            for request_id in ended:
                del self._leases[request_id]
            return ended

    @property
    def expired(self) -> int:
        """How many leases have run out so far."""
        with self._lock:
            return self._expired

    def __len__(self) -> int:
        with self._lock:
            return len(self._leases)
