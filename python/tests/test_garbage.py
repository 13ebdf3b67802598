# SPDX-License-Identifier: Apache-2.0
"""What is collected, and what it leaves."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import kvferry
import pytest
from conftest import Pair, becomes


def is_let_go(buffer: bytearray) -> bool:
    """Whether no operation holds it, which the next queue of any finds out."""
    kvferry.CompletionQueue()
    try:
        buffer.append(0)
    except BufferError:
        return False
    return True


def test_a_lost_channel_is_closed(pair: Pair) -> None:
    channel = kvferry.TcpTransferChannel()
    channel.lazy_init_peer_connection("third", "far", pair.far.peer_init_url)
    queue = kvferry.CompletionQueue()
    buffer = bytearray(8)
    operation = channel.submit_recv(queue, [buffer], "far", tag=9)
    lost = weakref.ref(channel)
    del channel
    gc.collect()
    assert lost() is None
    assert queue.wait(20) and queue.drain() == [operation]
    assert operation.error is not None and operation.error.name == "closed"
    buffer.append(0)


def test_a_lost_queue_leaves_its_memory_to_the_channel(pair: Pair) -> None:
    queue = kvferry.CompletionQueue()
    buffer = bytearray(8)
    pair.near.submit_recv(queue, [buffer], "far", tag=9)
    del queue
    gc.collect()
    with pytest.raises(BufferError):
        buffer.append(0)
    assert pair.far.batched_send([b"arrives."], "near", tag=9, timeout=20) == 1
    assert buffer == b"arrives."
    assert becomes(lambda: is_let_go(buffer))


def test_a_blocking_call_lets_go_of_what_a_lost_queue_left(pair: Pair) -> None:
    buffer = bytearray(8)
    pair.near.submit_recv(kvferry.CompletionQueue(), [buffer], "far", tag=9)
    gc.collect()
    assert pair.far.batched_send([b"arrives."], "near", tag=9, timeout=20) == 1
    until = time.monotonic() + 20
    while True:
        pair.near.notify("far", b"any call")
        try:
            buffer.append(0)
            break
        except BufferError:
            assert time.monotonic() < until
            time.sleep(0.001)  # notifications that nobody takes are bounded


def test_a_lost_queue_loses_no_result(pair: Pair) -> None:
    def end_of(operation: kvferry.Operation) -> Any:
        gc.collect()
        until = time.monotonic() + 20
        while not operation.done():
            assert time.monotonic() < until
            time.sleep(0.001)
        return operation.result()

    one = pair.far.submit_receive_notification(kvferry.CompletionQueue(), 20)
    several = pair.far.submit_receive_notifications(kvferry.CompletionQueue(), 3, 1, 20)
    gc.collect()
    pair.near.notify("far", b"one")
    pair.near.notify("far", b"of several", 3)
    assert end_of(one).payload == b"one"
    assert [each.payload for each in end_of(several)] == [b"of several"]
    with kvferry.TcpTransferChannel() as third:
        metadata = pair.far.local_metadata("far")
        assert end_of(third.submit_connect(kvferry.CompletionQueue(), "third", metadata)).id == "far"


def test_a_queue_and_what_belongs_to_its_operations_are_collected(pair: Pair) -> None:
    class Program:
        pass

    queue, buffer, program = kvferry.CompletionQueue(), bytearray(8), Program()
    operation = pair.near.submit_recv(queue, [buffer], "far", tag=9)
    operation.user_data = [queue, operation, program]
    lost = weakref.ref(queue), weakref.ref(program)
    gc.collect()
    assert operation.user_data == [queue, operation, program]
    del queue, program
    gc.collect()
    assert lost[0]() is not None and lost[1]() is not None
    del operation
    gc.collect()
    assert lost[0]() is None and lost[1]() is None
    with pytest.raises(BufferError):
        buffer.append(0)  # it is the channel's until the operation ends
    assert pair.far.batched_send([b"arrives."], "near", tag=9, timeout=20) == 1
    assert buffer == b"arrives."
    assert becomes(lambda: is_let_go(buffer))


def test_an_operation_that_ended_is_collected_with_its_user_data(pair: Pair) -> None:
    class Program:
        operation: kvferry.Operation

    queue, program = kvferry.CompletionQueue(), Program()
    program.operation = pair.near.submit_write(queue, [b"x"], "far", remote_indexes=[0])
    program.operation.user_data = program
    assert queue.wait(20) and queue.drain() == [program.operation]
    lost = weakref.ref(program)
    del program
    gc.collect()
    assert lost() is None
