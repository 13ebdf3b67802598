# SPDX-License-Identifier: Apache-2.0
"""Signals that come while a call blocks."""

from __future__ import annotations

import signal
import threading
import time

import kvferry
import pytest
from conftest import TWO_CHANNELS, Interruption, Pair, check, signal_when, waits


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals go to the main thread")
def test_a_signal_ends_a_blocking_call(pair: Pair) -> None:
    def interrupt(*_: object) -> None:
        raise Interruption

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        buffer = bytearray(8)
        with pytest.raises(Interruption):
            signal_when(lambda: pair.near.stats()["transfers"]["recv"]["in_flight"] == 1, signal.SIGALRM)
            pair.near.batched_recv([buffer], "far", tag=4)
        buffer.append(0)  # nobody has it any more
        with pytest.raises(Interruption):
            signal_when(waits(pair.near), signal.SIGALRM)
            pair.near.receive_notification(60)
        with pytest.raises(Interruption):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            kvferry.CompletionQueue().wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert pair.near.stats()["transfers"]["recv"]["failures"] == {"cancelled": 1}


def test_a_signal_that_raises_nothing_ends_nothing(pair: Pair) -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: calls.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        until = time.monotonic() + 60
        while len(calls) < 2 and time.monotonic() < until:
            with pytest.raises(kvferry.TransferTimeout):
                pair.near.receive_notification(0.3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(calls) > 1


def test_ctrl_c_is_a_keyboard_interrupt() -> None:
    check(
        TWO_CHANNELS
        + """
try:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    near.receive_notification()
except KeyboardInterrupt:
    print("done")
"""
    )


def test_a_signal_that_another_thread_got_ends_a_blocking_call() -> None:
    check(
        TWO_CHANNELS
        + """
other = threading.Thread(target=threading.Event().wait, daemon=True)
other.start()
try:
    threading.Timer(0.3, signal.pthread_kill, (other.ident, signal.SIGINT)).start()
    near.receive_notification(60)
except KeyboardInterrupt:
    print("done")
"""
    )


def test_the_thread_of_log_records_takes_no_signals(pair: Pair) -> None:
    kvferry.flush_logs()  # it has begun
    [forwards] = [thread for thread in threading.enumerate() if thread.name == "kvferry-log"]
    with open(f"/proc/self/task/{forwards.native_id}/status") as status:
        [blocked] = [int(line.split()[1], 16) for line in status if line.startswith("SigBlk:")]
    assert blocked & 1 << signal.SIGINT - 1 and not blocked & 1 << signal.SIGSEGV - 1
