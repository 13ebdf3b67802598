# SPDX-License-Identifier: Apache-2.0
"""Memory that peers of the same host map."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kvferry
import numpy as np
import pytest
from conftest import PAGE, PAGES, becomes
from kvferry import Region, SharedRegion, ShmTransferChannel, TcpTransferChannel, TransferError

SIZE = PAGES * PAGE
#: What isn't mapped travels over the socket then.
OPTIONS: Any = {"process_memory": False}


def is_mapped(address: int) -> bool:
    """Whether a shared region's memory begins there."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any(line.startswith(f"{address:x}-") and "memfd:kvferry" in line for line in lines)


def bytes_in(channel: Any, way: str) -> int:
    return sum(path["bytes_in"] for path in channel.stats()["paths"] if path["name"] == way)


@pytest.fixture
def near() -> Iterator[ShmTransferChannel]:
    with ShmTransferChannel(**OPTIONS) as channel:
        yield channel


def far_with(region: Region) -> ShmTransferChannel:
    return ShmTransferChannel(regions=[region], peer_init_url="tcp://127.0.0.1:0", **OPTIONS)


def test_it_is_memory_of_zeros_that_its_views_hold() -> None:
    shared = SharedRegion(SIZE - 1)
    assert len(shared) == shared.size == SIZE - 1
    view = np.frombuffer(memoryview(shared), dtype=np.uint8)
    assert view.size == SIZE - 1 and not view.any() and view.ctypes.data == shared.address
    view[5] = 9
    with memoryview(shared) as bytes_of_it:
        assert not bytes_of_it.readonly and bytes_of_it[5] == 9
    address = shared.address
    del shared
    gc.collect()
    assert is_mapped(address) and view[5] == 9
    del view
    gc.collect()
    assert not is_mapped(address)


def test_peers_read_it_by_themselves_and_a_channel_holds_it(near: ShmTransferChannel) -> None:
    shared = SharedRegion(SIZE)
    address = shared.address
    np.frombuffer(memoryview(shared), dtype=np.uint8)[:] = 7
    far = far_with(Region(shared, PAGE))
    del shared
    gc.collect()
    with far:
        near.lazy_init_peer_connection("near", "far", far.peer_init_url)
        assert becomes(lambda: "1 of the peer's regions mapped" in getattr(near.peer_info("far"), "path", ""))
        buffer = bytearray(SIZE)
        near.batched_read([buffer], "far", remote_ranges=np.array([[0, 0, SIZE]], dtype=np.uint64))
        assert buffer == b"\7" * SIZE and bytes_in(near, "shared memory") == SIZE
        near.batched_write([b"w" * PAGE], "far", remote_indexes=[3])
        near.batched_read([buffer], "far", remote_ranges=np.array([[0, 0, SIZE]], dtype=np.uint64))
        assert buffer == b"\7" * 3 * PAGE + b"w" * PAGE + b"\7" * (SIZE - 4 * PAGE)
        assert is_mapped(address)
    del far
    gc.collect()
    assert not is_mapped(address)


def test_a_part_of_one_is_not_handed_out(near: ShmTransferChannel) -> None:
    shared = SharedRegion(SIZE)
    with far_with(Region(memoryview(shared)[PAGE:], PAGE)) as far:
        near.lazy_init_peer_connection("near", "far", far.peer_init_url)
        near.batched_write([b"p" * PAGE], "far", remote_indexes=[0])
        assert bytes(memoryview(shared)[PAGE : 2 * PAGE]) == b"p" * PAGE
        buffer = bytearray(PAGE)
        near.batched_read([buffer], "far", remote_indexes=[0])
        assert buffer == b"p" * PAGE and bytes_in(near, "shared memory") == 0


def test_with_other_transports_it_is_memory_like_any_other() -> None:
    shared = SharedRegion(SIZE)
    region = Region(shared, PAGE)
    with (
        TcpTransferChannel(regions=[region], peer_init_url="tcp://127.0.0.1:0") as far,
        TcpTransferChannel() as near,
    ):
        near.lazy_init_peer_connection("near", "far", far.peer_init_url)
        near.batched_write([b"t" * PAGE], "far", remote_indexes=[1])
    assert bytes(memoryview(shared)[PAGE : 2 * PAGE]) == b"t" * PAGE


def test_what_it_could_not_get() -> None:
    with pytest.raises(TransferError, match="shared region of 0 bytes") as caught:
        SharedRegion(0)
    assert caught.value.name == "invalid_region" and caught.value.invalid_argument
    with pytest.raises(TransferError, match="huge pages") as caught:
        SharedRegion(1 << 50, huge_pages=True)
    assert caught.value.category == "system"
    for wrong in (-1, "4096", None):
        with pytest.raises(TypeError):
            SharedRegion(wrong)  # type: ignore[arg-type]
    with pytest.raises(BufferError, match="has not run"):
        memoryview(SharedRegion.__new__(SharedRegion))
    assert kvferry.SharedRegion(1).size == 1
