# SPDX-License-Identifier: Apache-2.0
"""Loses questions: a road to a channel's init url whose connections break."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["LossyRoad", "lossy_road"]


class LossyRoad:
    """Takes connections for a channel. One over which a chosen message comes is ended instead of handing that on.

    Bytes of one message arrive together, as messages are small and their hosts are one.
    """

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("tcp://").rpartition(":")
        self._there = host, int(port)
        self._listener = socket.create_server((host, 0))
        self.url = f"tcp://{host}:{self._listener.getsockname()[1]}"
        #: How many messages of the kind are still to be lost, and whether when they are asked or when they are answered.
        self._left = 0
        self._kind = b""
        self._when = ""
        self._meanwhile: Callable[[bytes], None] = lambda _: None
        self.lost = 0
        self._changed = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._take)]
        self._threads[0].start()

    def lose(
        self, kind: str, times: int = 1, when: str = "asked", meanwhile: Callable[[bytes], None] = lambda _: None
    ) -> None:
        """when: "asked", before it arrives, or "answered": it is known there, and here is not what was said to it.
        meanwhile: called with what is lost before the connection ends."""
        with self._changed:
            self._kind, self._left, self._when, self._meanwhile = kind.encode(), times, when, meanwhile

    def _take(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            try:
                there = socket.create_connection(self._there)
            except OSError:  # nobody is there
                here.close()
                continue
            with self._changed:
                self._sockets += [here, there]
                for way in ((here, there, "asked"), (there, here, "answered")):
                    self._threads.append(threading.Thread(target=self._carry, args=way))
                    self._threads[-1].start()

    def _is_lost(self, way: str, data: bytes) -> bool:
        with self._changed:
            if way != self._when or not self._left or self._kind not in data:
                return False
            self._left -= 1
        self._meanwhile(data)
        self.lost += 1
        return True

    def _carry(self, source: socket.socket, target: socket.socket, way: str) -> None:
        before = b""  # a kind may come in two parts
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                if self._is_lost(way, before + data):
                    break
                target.sendall(data)
                before = (before + data)[-max(len(self._kind) - 1, 1) :]
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for end in self._sockets:
            end.close()


@contextmanager
def lossy_road(url: str) -> Iterator[LossyRoad]:
    road = LossyRoad(url)
    try:
        yield road
    finally:
        road.close()
