# SPDX-License-Identifier: Apache-2.0
"""What a receiving call had taken when a signal came isn't lost."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable

import kvferry
import pytest
from conftest import (
    Interruption,
    Pair,
    becomes,
    each_step_of,
    interrupted_at_return_of,
    receives_nothing,
    signal_when,
    waits,
)


def receive_until_interrupted(
    pair: Pair, interrupt: Callable[..., None], receive: Callable[[], object] | None = None
) -> None:
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(Interruption):
            signal_when(waits(pair.near), signal.SIGALRM)
            if receive is not None:
                receive()
            else:
                pair.near.receive_notification(60)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_what_an_interrupted_call_had_taken_is_for_the_next(pair: Pair) -> None:
    def interrupt(*_: object) -> None:
        pair.far.notify("near", b"taken")  # which returns when the call that is interrupted has it
        raise Interruption

    receive_until_interrupted(pair, interrupt)
    assert pair.near.receive_notification(20).payload == b"taken"


def test_what_an_interrupted_call_had_taken_is_for_a_thread_that_waits_already(pair: Pair) -> None:
    received: list[kvferry.Notification] = []
    thread = threading.Thread(target=lambda: received.append(pair.near.receive_notification(60)))

    def interrupt(*_: object) -> None:
        thread.start()
        assert becomes(waits(pair.near, 2))
        pair.far.notify("near", b"taken")  # which returns when the call that is interrupted has it
        raise Interruption

    receive_until_interrupted(pair, interrupt)
    thread.join()
    assert [notification.payload for notification in received] == [b"taken"]


@pytest.mark.parametrize("of", ["<lambda>", "was_cancelled"])
def test_what_a_call_that_is_interrupted_at_its_end_had_taken_is_for_the_next(pair: Pair, of: str) -> None:
    pair.far.notify("near", b"taken")
    with pytest.raises(Interruption), interrupted_at_return_of(of):
        pair.near.receive_notification()
    assert pair.near.receive_notification(20).payload == b"taken"
    with pytest.raises(kvferry.TransferTimeout):
        pair.near.receive_notification(0)


def test_what_a_call_that_is_interrupted_had_taken_of_what_is_kept_is_for_the_next(pair: Pair) -> None:
    with pytest.raises(Interruption), interrupted_at_return_of("was_cancelled"):
        pair.far.notify("near", b"kept", 7)
        pair.near.receive_notifications(7, 1, 60)
    with pytest.raises(Interruption), interrupted_at_return_of("take"):
        pair.near.receive_notifications(7, 2, 60)

    def end_it() -> None:
        if becomes(waits(pair.near)):
            pair.near._native.look_again(7)

    looks_again = threading.Thread(target=end_it)
    looks_again.start()
    with pytest.raises(Interruption), interrupted_at_return_of("put_back"):
        pair.near.receive_notifications(7, 2, 60)
    looks_again.join()
    assert [notification.payload for notification in pair.near.receive_notifications(7, 1, 20)] == [b"kept"]
    assert not pair.near.receive_notifications(7, 1, 0)


def test_a_signal_loses_nothing_of_what_was_left_wherever_it_comes(pair: Pair) -> None:
    def interrupt(*_: object) -> None:
        pair.far.notify("near", b"taken")  # which returns when the call that is interrupted has it
        raise Interruption

    native, queue = pair.near._native, kvferry.CompletionQueue()
    for receive_interrupted in each_step_of("keep_ended", lambda: receives_nothing(pair)):
        # Of an operation whose call in C++ was interrupted, and of one that was left.
        receive_until_interrupted(pair, interrupt, lambda: native.receive_notification(60, None, native.kept, []))
        operation = pair.near.submit_receive_notifications(queue, 7, 2)
        received: list[kvferry.Notification] = []
        thread = threading.Thread(target=lambda: received.extend(pair.near.receive_notifications(7, 2, 60)))
        thread.start()
        assert becomes(waits(pair.near))
        for payload in (b"1", b"2"):
            pair.far.notify("near", payload, 7)
        assert becomes(operation.done)
        pair.near._unclaimed.leave(operation)  # as its task does if that is interrupted
        receive_interrupted()
        thread.join()
        assert [notification.payload for notification in received] == [b"1", b"2"]
        assert pair.near.receive_notification(20).payload == b"taken"
        with pytest.raises(kvferry.TransferTimeout):
            pair.near.receive_notification(0)
        assert not pair.near.receive_notifications(7, 1, 0)


@pytest.mark.parametrize("of", ["take", "put_back", "keep_ended"])
@pytest.mark.parametrize("does", ["receives", "keeps", "receives and keeps"])
def test_a_handler_that_receives_itself_takes_nothing_twice_and_loses_nothing(pair: Pair, of: str, does: str) -> None:
    unclaimed, queue = pair.near._unclaimed, kvferry.CompletionQueue()
    numbers = itertools.count()
    came: list[bytes] = []
    received: list[bytes] = []

    def notify() -> None:
        came.append(str(next(numbers)).encode())
        pair.far.notify("near", came[-1], 7)

    def receive(count: int) -> None:
        received.extend(each.payload for each in pair.near.receive_notifications(7, count, 0))

    def leave(count: int) -> None:
        """What an operation has taken is kept in the next call."""
        operation = pair.near.submit_receive_notifications(queue, 7, count)
        for _ in range(count):
            notify()
        assert becomes(operation.done)
        unclaimed.leave(operation)

    def handle() -> None:
        if "receives" in does:
            receive(1)
        if "keeps" in does:
            leave(1)
            unclaimed.keep_ended()

    def call() -> None:
        if of == "put_back":
            taken: list[kvferry.Notification] = []
            unclaimed.take(7, 2, taken)
            unclaimed.put_back(7, taken, True)
        elif of == "take":
            receive(2)
        else:
            unclaimed.keep_ended()

    for call_interrupted in each_step_of(of, call, handle):
        leave(2)
        if of != "keep_ended":
            unclaimed.keep_ended()
        call_interrupted()
        receive(100)
        assert sorted(received) == sorted(came) and not unclaimed._kept


def test_a_signal_that_comes_while_a_call_waits_for_the_gil_loses_nothing(pair: Pair) -> None:
    def interrupt(*_: object) -> None:
        raise Interruption

    main, called, queue = threading.get_ident(), threading.Event(), kvferry.CompletionQueue()

    def be_busy() -> None:
        """Has the GIL from when the main thread sleeps in its call until the signal is there."""
        called.wait(20)
        notified = pair.far.submit_notify(queue, "near", b"taken")
        while not notified.done():  # until the call has it
            pass
        until = time.monotonic() + 0.1
        while time.monotonic() < until:  # the call's thread wakes
            pass
        signal.pthread_kill(main, signal.SIGALRM)

    busy = threading.Thread(target=be_busy)
    before, interval = signal.signal(signal.SIGALRM, interrupt), sys.getswitchinterval()
    try:
        busy.start()
        sys.setswitchinterval(20.0)
        called.set()
        with pytest.raises(Interruption):
            pair.near.receive_notification()
    finally:
        sys.setswitchinterval(interval)
        busy.join()
        signal.signal(signal.SIGALRM, before)
    assert pair.near.receive_notification(20).payload == b"taken"
