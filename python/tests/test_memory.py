# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import array
import ctypes
import mmap
import sys
import warnings
from collections import UserList
from collections.abc import Callable
from typing import Any

import kvferry
import numpy as np
import pytest
from conftest import PAGE, Pair, run_python


class Tensor:
    """A tensor with nothing but DLPack, as torch's."""

    def __init__(self, data: np.ndarray[Any, Any]) -> None:
        self.data = data

    def __dlpack__(self, **options: Any) -> Any:
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class CudaTensor(Tensor):
    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 3


def test_all_kinds_of_memory_are_sent(pair: Pair) -> None:
    held = np.frombuffer(b"addressed", dtype=np.uint8)
    with mmap.mmap(-1, mmap.PAGESIZE) as mapped:
        mapped[:3] = b"map"
        objects: list[Any] = [
            b"bytes",
            bytearray(b"array"),
            memoryview(b"--view--")[2:6],
            array.array("H", [1, 2]),
            np.arange(3, dtype=np.float32),
            Tensor(np.arange(2, dtype=np.int16)),
            (held.ctypes.data, held.size),
            mapped,
        ]
        pair.near.batched_write(objects, "far", remote_indexes=range(len(objects)))
    expected = [b"bytes", b"array", b"view", b"\1\0\2\0", np.arange(3, dtype=np.float32).tobytes(), b"\0\0\1\0"]
    for page, data in enumerate([*expected, b"addressed", b"map"]):
        assert bytes(pair.far_cache[page, : len(data)]) == data


def test_memory_is_read_into(pair: Pair) -> None:
    tensor, plain = Tensor(np.zeros(4, dtype=np.uint8)), np.zeros(4, dtype=np.uint8)
    pair.near.batched_read([tensor, plain], "far", remote_indexes=[1, 2])
    assert tensor.data.tolist() == [101] * 4 and plain.tolist() == [102] * 4


def test_read_only_memory_is_not_read_into(pair: Pair) -> None:
    with pytest.raises(BufferError):
        pair.near.batched_read([b"constant"], "far", remote_indexes=[0])
    frozen = np.zeros(4, dtype=np.uint8)
    frozen.flags.writeable = False
    with pytest.raises(ValueError):
        pair.near.batched_read([frozen], "far", remote_indexes=[0])
    region = kvferry.Region(bytes(PAGE), PAGE, "read")
    with kvferry.TcpTransferChannel(regions=[region]) as channel:
        channel.lazy_init_peer_connection("third", "far", pair.far.peer_init_url)
        with pytest.raises(ValueError, match="read only"):
            channel.batched_read(kvferry.Pages([0]), "far", remote_indexes=[0])
        assert channel.batched_write(kvferry.Pages([0]), "far", remote_indexes=[0]) == 1
    with pytest.raises(BufferError):
        kvferry.Region(bytes(PAGE), PAGE)


def test_memory_of_a_device_is_refused() -> None:
    with pytest.raises(TypeError, match="memory of this CudaTensor is on cuda:3: only host memory"):
        kvferry.Region(CudaTensor(np.zeros(PAGE, dtype=np.uint8)), PAGE)


@pytest.mark.parametrize("wrong", [object(), 17, "text", [1, 2], (1,), (1, "x")])
def test_what_is_no_memory(pair: Pair, wrong: Any) -> None:
    with pytest.raises(TypeError, match="memory"):
        pair.near.batched_write([wrong], "far", remote_indexes=[0])


def view_of(exporter: Any) -> memoryview:
    return memoryview(exporter)


def test_scattered_arrays_are_refused(pair: Pair) -> None:
    scattered = np.zeros((4, 4), dtype=np.uint8)[:, ::2]
    for view in (scattered, view_of(scattered), memoryview(bytearray(8))[::2], np.zeros((4, 2)).T):
        for start in (pair.near.batched_write, pair.near.batched_read):
            with pytest.raises((ValueError, BufferError), match="contiguous"):
                start([view], "far", remote_indexes=[0])
    with pytest.raises((TypeError, BufferError)):
        pair.near.batched_write([Tensor(scattered)], "far", remote_indexes=[0])


def objects_of_ctypes() -> Any:
    return (ctypes.py_object * 2)()


@pytest.mark.parametrize(
    "made",
    [
        lambda: np.array([b"a page", b"another"], dtype=object),
        lambda: np.zeros(2, dtype=[("number", np.uint8), ("page", object)]),
        objects_of_ctypes,
        lambda: view_of(np.array([b"a page", b"another"], dtype=object)),
        lambda: view_of(objects_of_ctypes()),
        lambda: np.zeros(2, dtype=[("day", "M8[D]"), ("page", object)]),
        pytest.param(
            lambda: np.array(["text"], dtype=np.dtypes.StringDType()),
            marks=pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="NumPy 1 has no such type"),
        ),
    ],
)
def test_references_to_objects_are_no_bytes(pair: Pair, made: Callable[[], Any]) -> None:
    # Read into they would be pointers to wherever the peer's bytes point.
    for start in (pair.near.batched_read, pair.near.batched_write):
        memory = made()
        with pytest.raises(TypeError, match="references to objects"):
            start([memory], "far", remote_indexes=[0])
    with pytest.raises(TypeError, match="references to objects"):
        kvferry.Region(made(), 2)


def test_memory_need_not_tell_its_format(pair: Pair) -> None:
    times = np.array(["2024-02-29", "1970-01-01"], dtype="datetime64[D]")
    named = np.array([(7,)], dtype=[("O", np.uint8)])
    assert pair.near.batched_write([times, named], "far", remote_indexes=[1, 2]) == 2
    assert bytes(pair.far_cache[1, :16]) == times.tobytes() and pair.far_cache[2, 0] == 7
    assert pair.near.batched_read([times], "far", remote_indexes=[2]) == 1


def test_ctrl_c_goes_through_whoever_exports_memory(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def interrupt_first(*arguments: object, **_: object) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt

    class Interrupted(Tensor):
        def __dlpack_device__(self) -> tuple[int, int]:
            interrupt_first()
            return super().__dlpack_device__()

    with pytest.raises(KeyboardInterrupt):
        kvferry.Region(Interrupted(np.zeros(PAGE, dtype=np.uint8)), PAGE, "read")
    asked_for = ""

    class InterruptedWhenAsked:
        def __getattr__(self, name: str) -> Any:
            if name == asked_for:
                raise KeyboardInterrupt
            raise AttributeError(name)

    class Sequence(InterruptedWhenAsked, UserList[Any]):
        pass

    for asked_for in ("__dlpack_device__", "__dlpack__"):
        with pytest.raises(KeyboardInterrupt):
            kvferry.Region(InterruptedWhenAsked(), PAGE)
    with pytest.raises(KeyboardInterrupt):
        pair.near.batched_write(Sequence([b"x"]), "far", remote_indexes=[0])
    calls.clear()
    warned_of, _ = np.broadcast_arrays(np.zeros(4), np.zeros((1, 4)))  # NumPy warns who asks for such a buffer, to write to
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", interrupt_first)
        with pytest.raises(KeyboardInterrupt):
            pair.near.batched_read([warned_of], "far", remote_indexes=[0])


def test_an_address_and_a_size_are_integers_of_64_bits(pair: Pair) -> None:
    held = np.frombuffer(b"addressed", dtype=np.uint8)
    address = int(held.ctypes.data)
    wrong: Any
    for wrong in (float(address), np.float32(9), str(address), "123", None, np.bool_(True), b"1"):
        for given in ((wrong, 9), (address, wrong)):
            with pytest.raises(TypeError, match="two integers"):
                pair.near.batched_write([given], "far", remote_indexes=[0])
    for wrong in (-1, np.int64(-1), 1 << 64):
        for given in ((wrong, 9), (address, wrong)):
            with pytest.raises(ValueError, match=f"64 bits and no sign: {int(wrong)} is none"):
                pair.near.batched_write([given], "far", remote_indexes=[0])
    with pytest.raises(TypeError, match="two integers"):
        pair.near.batched_write([(address, 9, 9)], "far", remote_indexes=[0])  # type: ignore[list-item]
    assert pair.near.batched_write([(address, True)], "far", remote_indexes=[1]) == 1  # which is an int to Python
    assert bytes(pair.far_cache[1, :2]) == b"ae"

    class Interrupted:
        def __index__(self) -> int:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pair.near.batched_write([(address, Interrupted())], "far", remote_indexes=[0])  # type: ignore[list-item]


def test_numpys_integers_are_addresses(pair: Pair) -> None:
    held = np.frombuffer(b"addressed", dtype=np.uint8)
    address = np.uint64(held.ctypes.data)
    assert pair.near.batched_write([(address, np.int64(held.size))], "far", remote_indexes=[1]) == 1  # type: ignore[list-item]
    assert bytes(pair.far_cache[1, :9]) == b"addressed"
    with pytest.raises(TypeError, match="two integers"):
        pair.near.batched_write([(float(address), 9)], "far", remote_indexes=[1])  # type: ignore[list-item]


def test_a_region_holds_its_memory_until_close() -> None:
    memory = bytearray(PAGE)
    channel = kvferry.TcpTransferChannel(regions=[kvferry.Region(memory, PAGE)])
    with pytest.raises(BufferError):
        memory.append(0)  # would move it
    channel.close()
    memory.append(0)


def test_what_close_lets_go_of_may_call_the_channel() -> None:
    ran = run_python("""
import weakref
import kvferry
import numpy as np
class Cache(np.ndarray):
    pass
channel = kvferry.TcpTransferChannel()
caught = []
def remove(number):
    try:
        channel.remove_region(number)
    except kvferry.TransferError as error:
        caught.append(error.name)
for _ in range(8):
    cache = np.zeros(8192, np.uint8).view(Cache)
    weakref.finalize(cache, remove, channel.add_region(kvferry.Region(cache, 4096)))
    del cache
channel.close()
print(caught == ["closed"] * 8)
""")
    assert (ran.returncode, ran.stdout.strip()) == (0, "True"), ran.stderr


def test_an_operation_holds_its_memory_until_it_ends(pair: Pair) -> None:
    buffer = bytearray(16)
    held = sys.getrefcount(buffer)
    queue = kvferry.CompletionQueue()
    operation = pair.near.submit_recv(queue, [buffer], "far", tag=5)
    with pytest.raises(BufferError):
        buffer.append(0)
    operation.cancel()
    assert queue.wait(20)
    queue.drain()
    buffer.append(0)
    assert sys.getrefcount(buffer) == held


def test_local_page_numbers(pair: Pair) -> None:
    assert pair.near.get_local_mem_indices([pair.near_cache[5], pair.near_cache[2]]) == [5, 2]
    with pytest.raises(kvferry.TransferError) as caught:
        pair.near.get_local_mem_indices([bytearray(PAGE)])
    assert caught.value.name == "not_in_region"
