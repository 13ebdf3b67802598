# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import kvferry
import numpy as np
import pytest
from conftest import PAGE, PAGES, Pair
from vllm_sides import changing


def test_a_write_puts_pages_where_the_indexes_say(pair: Pair) -> None:
    before = pair.far_cache.copy()
    written = pair.near.batched_write(kvferry.Pages([1, 2, 3]), "far", remote_indexes=[5, 9, 7])
    assert written == 3
    assert (pair.far_cache[[5, 9, 7]] == pair.near_cache[[1, 2, 3]]).all()
    untouched = [i for i in range(PAGES) if i not in (5, 9, 7)]
    assert (pair.far_cache[untouched] == before[untouched]).all()


def test_a_read_fills_buffers(pair: Pair) -> None:
    buffers = [bytearray(PAGE), bytearray(100)]
    assert pair.near.batched_read(buffers, "far", remote_indexes=np.array([3, 4])) == 2
    assert buffers == [bytes([103]) * PAGE, bytes([104]) * 100]


@pytest.mark.parametrize("width", [3, 5])
def test_byte_ranges_come_from_an_array(pair: Pair, width: int) -> None:
    ranges = np.zeros((2, width), dtype=np.uint64)
    ranges[:, 1] = [10, PAGE * 2 + 1]
    ranges[:, 2] = [7, 9]
    if width == 5:
        ranges[0] = [0, 10, 3, 5, 2]  # two blocks of three bytes
        ranges[1, 4] = 1
    first = b"abcdef" if width == 5 else b"abcdefg"
    expected = pair.far_cache.copy().reshape(-1)
    if width == 5:
        expected[10:13] = list(b"abc")
        expected[15:18] = list(b"def")
    else:
        expected[10:17] = list(first)
    expected[PAGE * 2 + 1 : PAGE * 2 + 10] = list(b"012345678")
    pair.near.batched_write([first, b"012345678"], "far", remote_ranges=ranges)
    assert (pair.far_cache.reshape(-1) == expected).all()


def test_a_stride_picks_blocks_of_a_buffer(pair: Pair) -> None:
    pair.near.batched_write(
        [b"ab..cd..ef"],
        "far",
        remote_ranges=np.array([[0, 0, 6]], dtype=np.uint64),
        local_strides=np.array([[2, 4]], dtype=np.uint64),
    )
    assert bytes(pair.far_cache[0, :6]) == b"abcdef"


def test_addresses_are_moved_without_objects(pair: Pair) -> None:
    base = pair.near_cache.ctypes.data
    rows = np.array([[base + 7 * PAGE, PAGE], [base + 8 * PAGE, 16]], dtype=np.uint64)
    pair.near.batched_write(kvferry.Addresses(rows, owner=pair.near_cache), "far", remote_indexes=[0, 1])
    assert (pair.far_cache[0] == 7).all()
    assert (pair.far_cache[1, :16] == 8).all() and (pair.far_cache[1, 16:] == 101).all()


def test_a_send_meets_the_recv_of_its_tag(pair: Pair) -> None:
    received = [bytearray(8), bytearray(8)]
    sizes: list[list[int]] = []
    receiver = threading.Thread(
        target=lambda: sizes.append(pair.far.batched_recv(received, "near", tag=7, timeout=20))
    )
    receiver.start()
    assert pair.near.batched_send([b"long one", b"short"], "far", tag=7, timeout=20) == 2
    receiver.join()
    assert sizes == [[8, 5]]
    assert received == [b"long one", b"short\0\0\0"]


def test_a_submitted_operation_ends_in_its_queue(pair: Pair) -> None:
    queue = kvferry.CompletionQueue()
    first = pair.near.submit_write(queue, kvferry.Pages([1]), "far", remote_indexes=[0])
    second = pair.near.submit_read(queue, [bytearray(PAGE)], "far", remote_indexes=[9])
    first.user_data, second.user_data = "first", "second"
    ended: list[kvferry.Operation] = []
    while len(ended) < 2:
        assert queue.wait(20)
        ended += queue.drain()
    assert {operation.user_data for operation in ended} == {"first", "second"}
    assert [operation.result() for operation in ended] == [1, 1]
    assert len(queue) == 0 and queue.drain() == []
    assert not queue.wait(0)


def test_an_operation_that_has_not_ended_has_no_result(pair: Pair) -> None:
    queue = kvferry.CompletionQueue()
    operation = pair.near.submit_receive_notification(queue)
    assert not operation.done() and operation.error is None
    with pytest.raises(RuntimeError, match="has not ended yet"):
        operation.result()
    operation.cancel()
    assert queue.wait(20)
    assert queue.drain() == [operation]
    assert operation.error is not None and operation.error.cancelled
    with pytest.raises(kvferry.TransferError):
        operation.result()


def test_notifications_come_with_writes_reads_and_alone(pair: Pair) -> None:
    pair.near.batched_write(kvferry.Pages([1]), "far", remote_indexes=[0], notification=b"w")
    pair.near.batched_read([bytearray(1)], "far", remote_indexes=[0], notification=b"r")
    pair.near.notify("far", b"alone")
    got = [pair.far.receive_notification(20) for _ in range(3)]
    assert [n.payload for n in got] == [b"w", b"r", b"alone"]
    assert {(n.peer_id, n.key) for n in got} == {("near", 0)}

    pair.near.batched_write(kvferry.Pages([1]), "far", remote_indexes=[0], notification=b"a", notification_key=3)
    pair.near.notify("far", b"b", 3)
    assert [n.payload for n in pair.far.receive_notifications(3, 2, 20)] == [b"a", b"b"]
    pair.near.notify("far", b"c", 3)
    assert [n.payload for n in pair.far.receive_notifications(3, 2, 0.05)] == [b"c"]


def test_checksums_are_compared(pair: Pair) -> None:
    assert pair.near.capabilities()["checksums"]
    assert pair.near.batched_write(kvferry.Pages([1]), "far", remote_indexes=[0], checksums=True) == 1
    assert (pair.far_cache[0] == 1).all() and pair.far.stats()["checksum_mismatches"] == 0
    source, target = (np.zeros(8 << 20, dtype=np.uint8) for _ in range(2))
    number = pair.far.add_region(kvferry.Region(target, target.nbytes))
    until = time.monotonic() + 60
    with changing(source), pytest.raises(kvferry.TransferError) as caught:
        while time.monotonic() < until:
            pair.near.batched_write([source], "far", remote_indexes=[0], remote_region=number, checksums=True)
    assert caught.value.name == "checksum_mismatch"
    assert pair.far.stats()["checksum_mismatches"] > 0


def test_a_hundred_thousand_descriptors(pair: Pair) -> None:
    count = 100_000
    source = np.arange(count, dtype=np.uint64)
    ranges = np.zeros((count, 3), dtype=np.uint64)
    room = PAGES * PAGE // 2
    ranges[:, 1] = (np.arange(count) * 2) % room
    ranges[:, 2] = 1
    rows = np.stack([source.ctypes.data + 8 * source, np.ones_like(source)], axis=1)
    written = pair.near.batched_write(
        kvferry.Addresses(rows, owner=source), "far", remote_ranges=ranges, timeout=60
    )
    assert written == count
    last = {int(offset): int(value) & 255 for offset, value in zip(ranges[:, 1], source)}
    flat = pair.far_cache.reshape(-1)
    assert all(flat[offset] == value for offset, value in last.items())


def test_objects_are_any_sequence_of_memory(pair: Pair) -> None:
    class Twice(Sequence[bytes]):
        def __getitem__(self, index: Any) -> Any:
            return (b"twice", b"twice")[index]

        def __len__(self) -> int:
            return 2

    assert pair.near.batched_write(Twice(), "far", remote_indexes=range(4, 6)) == 2
    assert pair.near.batched_write(deque([b"deque"]), "far", remote_indexes=[6]) == 1
    assert [bytes(pair.far_cache[page, :5]) for page in (4, 5, 6)] == [b"twice", b"twice", b"deque"]


def test_a_tensor_alone_is_no_sequence_of_objects(pair: Pair) -> None:
    class Tensor:
        def __dlpack__(self) -> None: ...
        def __getitem__(self, index: int) -> bytes:
            return b"row"

        def __len__(self) -> int:
            return 1

    for alone in (Tensor(), np.zeros((1, 8), np.uint8), "text", {0: b"x"}):
        with pytest.raises(TypeError, match=f"objects are a sequence of memory.*not one '{type(alone).__name__}'"):
            pair.near.batched_write(alone, "far", remote_indexes=[0])  # type: ignore[arg-type]
