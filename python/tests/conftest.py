# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import itertools
import linecache
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import kvferry
import numpy as np
import pytest
from numpy.typing import NDArray

# Programs that tests run have it from here, and a shell's background job ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

PAGE = 4096
PAGES = 64

Cache = NDArray[np.uint8]


def becomes(condition: Callable[[], bool]) -> bool:
    """Whether it comes to be so. Not every end of something on another thread tells that it is there."""
    until = time.monotonic() + 60
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True


def is_free(url: str) -> bool:
    """Whether a channel can listen there."""
    try:
        with kvferry.TcpTransferChannel(peer_init_url=url):
            return True
    except kvferry.TransferError as error:
        assert error.name == "EADDRINUSE", error
        return False


def signal_when(condition: Callable[[], bool], number: int) -> threading.Thread:
    """Has this thread, which goes on to a blocking call, get a signal when the call has come so far."""
    main = threading.get_ident()

    def send() -> None:
        if becomes(condition):
            signal.pthread_kill(main, number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def waits(channel: kvferry.TcpTransferChannel, calls: int = 1) -> Callable[[], bool]:
    """Whether so many calls of the channel, blocking or of tasks, wait for notifications or peer events."""
    return lambda: channel._native.receiving == calls


class Interruption(Exception):
    pass


def raise_interruption() -> None:
    raise Interruption


@contextmanager
def interrupted_when(
    due: Callable[[FrameType, str], bool], handler: Callable[[], object] = raise_interruption
) -> Iterator[None]:
    """Has this thread get a signal, with this handler, at the first event of a trace of kvferry's functions that is due."""

    def interrupt(*_: object) -> None:
        handler()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if "kvferry" not in frame.f_globals.get("__name__", ""):
            return None
        if due(frame, event):
            sys.settrace(None)
            signal.raise_signal(signal.SIGALRM)
        return trace

    before, traced = signal.signal(signal.SIGALRM, interrupt), sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(traced)
        signal.signal(signal.SIGALRM, before)


def interrupted_at_return_of(name: str) -> AbstractContextManager[None]:
    """Where a function of kvferry's that has this name returns."""
    return interrupted_when(lambda frame, event: event == "return" and frame.f_code.co_name == name)


def interrupted_in(
    name: str, step: int, handler: Callable[[], object] = raise_interruption
) -> AbstractContextManager[None]:
    """At a step of a function of kvferry's that has this name, or of those that it calls: the beginning of one, a line, a
    return. With more steps than there are nothing happens."""
    steps = itertools.count()

    def due(frame: FrameType, event: str) -> bool:
        # The line of a `with` comes again at its end, where CPython calls no handler before the lock is released.
        if event == "line" and linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            return False
        inner: FrameType | None = frame
        while inner is not None and inner.f_code.co_name != name:
            inner = inner.f_back
        return inner is not None and next(steps) == step

    return interrupted_when(due, handler)


def each_step_of(
    name: str, call: Callable[[], object], handler: Callable[[], object] = raise_interruption
) -> Iterator[Callable[[], None]]:
    """For each step of a function of kvferry's what makes the call and has it interrupted there, as ``interrupted_in``; in
    the end what makes it without. The loop's body prepares, calls it once, and looks at what has become of all."""
    interrupted = True

    def handle() -> None:
        nonlocal interrupted
        interrupted = True
        handler()

    for step in itertools.count():
        if not interrupted:
            assert step > 10
            return
        interrupted = False

        def call_interrupted(at: int = step) -> None:
            with contextlib.suppress(Interruption), interrupted_in(name, at, handle):
                call()

        yield call_interrupted


def make_cache(fill: int = 0) -> Cache:
    return np.full((PAGES, PAGE), fill, dtype=np.uint8)


@dataclass
class Pair:
    """Two connected channels: "near" starts operations, "far" offers its pages."""

    near: kvferry.TcpTransferChannel
    far: kvferry.TcpTransferChannel
    near_cache: Cache
    far_cache: Cache


@pytest.fixture
def pair() -> Iterator[Pair]:
    near_cache, far_cache = make_cache(), make_cache()
    for page in range(PAGES):
        near_cache[page] = page
        far_cache[page] = 100 + page
    with (
        kvferry.TcpTransferChannel(
            regions=[kvferry.Region(far_cache, PAGE)], peer_init_url="tcp://127.0.0.1:0"
        ) as far,
        kvferry.TcpTransferChannel(regions=[kvferry.Region(near_cache, PAGE)]) as near,
    ):
        near.lazy_init_peer_connection("near", "far", far.peer_init_url)
        yield Pair(near, far, near_cache, far_cache)


def receives_nothing(pair: Pair) -> None:
    """A call that looks for what is kept."""
    assert not pair.near.receive_notifications(9, 1, 0)


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """Makes a ``vllm_sides.Side`` (or a ``kind`` of it) that is closed in the end."""
    from vllm_sides import Side

    with ExitStack() as stack:

        def made(*arguments: Any, kind: type[Side] = Side, **keywords: Any) -> Side:
            side = kind(*arguments, **keywords)
            stack.callback(side.worker.close)
            return side

        yield made


def run_python(program: str, *, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs a program in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-X", "faulthandler", "-c", program],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def check(program: str, output: str = "done") -> None:
    """Runs a program that says "done", or something else, and nothing more."""
    ran = run_python(program)
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, output, ""), ran.stderr


#: For programs of their own: a listening channel "far", and "near" connected to it.
TWO_CHANNELS = """
import gc, os, signal, sys, threading, weakref
import kvferry
memory = bytearray(64 * 4096)
far = kvferry.TcpTransferChannel(regions=[kvferry.Region(memory, 4096)], peer_init_url="tcp://127.0.0.1:0")
near = kvferry.TcpTransferChannel()
near.lazy_init_peer_connection("near", "far", far.peer_init_url)
"""
