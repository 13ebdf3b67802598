# SPDX-License-Identifier: Apache-2.0
"""When leases at prefilling workers are renewed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from .messages import Remote

__all__ = ["LEAST_INTERVAL", "Renewals"]

#: Leases are not renewed more often than that, whatever requests say: seconds.
LEAST_INTERVAL = 0.1


class Renewals:
    """The leases that a decoding worker keeps alive, from a thread of its own: an engine's step may take longer than a
    lease. Thread-safe.

    own: seconds. Renewed is after a third of the shortest lease, or of this.
    renew: told what is to be renewed, on the thread.
    lease_of: the lease of one that is kept, in seconds. On any thread.
    """

    def __init__(
        self, own: float, renew: Callable[[list[Remote]], None], lease_of: Callable[[Remote], float]
    ) -> None:
        self._own = own
        self._renew = renew
        self._lease_of = lease_of
        self._changed = threading.Condition()
        #: By decoding request.
        self._kept: dict[str, Remote] = {}
        self._last = time.monotonic()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvferry-vllm-renewals", daemon=True)
        self._thread.start()

    def keep(self, remotes: Iterable[tuple[str, Remote]]) -> None:
        """These are renewed until they are let go. A decoding request each."""
        with self._changed:
            if not self._kept:
                self._last = time.monotonic()
            self._kept.update(remotes)
            self._changed.notify()

    def let_go(self, request_id: str) -> None:
        with self._changed:
            self._kept.pop(request_id, None)

    def reckon(self) -> None:
        """Leases are other ones."""
        with self._changed:
            self._changed.notify()

    def interval(self) -> float:
        """Seconds from one renewal to the next."""
        with self._changed:
            return self._interval()

    def _interval(self) -> float:
        shortest = min(map(self._lease_of, self._kept.values()), default=self._own)
        return max(min(shortest, self._own) / 3, LEAST_INTERVAL)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _wait(self) -> list[Remote]:
        """What is due; nothing when it is closed."""
        with self._changed:
            while not self._closed:
                left = self._last + self._interval() - time.monotonic()
                if self._kept and left <= 0:
                    self._last = time.monotonic()
                    return list(self._kept.values())
                self._changed.wait(left if self._kept else None)
            return []

    def _run(self) -> None:
        while due := self._wait():
            self._renew(due)
