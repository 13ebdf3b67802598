# SPDX-License-Identifier: Apache-2.0
"""Transports within a host, and channels that choose among several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import kvferry
import numpy as np
import pytest
from conftest import PAGE, make_cache
from kvferry import AutoTransferChannel, Road, ShmTransferChannel

#: Through the socket even where the kernel allows more: the path is then the same on each machine.
UNREAD = {"process_memory": False}

Connected = Callable[..., Any]


@pytest.fixture
def connected() -> Iterator[Connected]:
    """Makes two channels of a class, "near" connected to "far"."""
    with contextlib.ExitStack() as stack:

        def made(kind: Any, near_options: dict[str, Any], far_options: dict[str, Any] | None = None) -> Any:
            if issubclass(kind, AutoTransferChannel):  # on a busy machine the next road would be taken
                near_options = {"road_timeout": 30, "handshake_timeout": 60, **near_options}
            cache = make_cache(7)
            region = kvferry.Region(cache, PAGE)
            options = near_options if far_options is None else far_options
            far = stack.enter_context(kind(regions=[region], peer_init_url="tcp://127.0.0.1:0", **options))
            near = stack.enter_context(kind(**near_options))
            near.lazy_init_peer_connection("near", "far", far.peer_init_url)
            return near, far, cache

        yield made


def path_of(channel: Any) -> str:
    info = channel.peer_info("far")
    assert info is not None
    return str(info.path)


def moves(near: Any, far: Any, cache: Any) -> None:
    """All kinds of transfers, and what comes with them."""
    assert near.batched_write([b"a" * PAGE, b"b" * 100], "far", remote_indexes=[3, 4], notification=b"there") == 2
    assert far.receive_notification(10).payload == b"there"
    assert (cache[3] == ord("a")).all() and (cache[4, :100] == ord("b")).all() and (cache[4, 100:] == 7).all()
    back = bytearray(PAGE)
    ranges = np.array([[0, 3 * PAGE + 8, PAGE]], dtype=np.uint64)
    assert near.batched_read([back], "far", remote_ranges=ranges) == 1
    assert back == b"a" * (PAGE - 8) + b"b" * 8
    queue = kvferry.CompletionQueue()
    received = bytearray(PAGE)
    receiving = far.submit_recv(queue, [received], "near", tag=5)
    assert near.batched_send([b"c" * PAGE], "far", tag=5) == 1
    assert queue.wait(10) and queue.drain() == [receiving] and received == b"c" * PAGE
    with pytest.raises(kvferry.TransferError) as caught:
        near.batched_write([b"x"], "far", remote_indexes=[cache.shape[0]])
    assert caught.value.name == "index_out_of_range"


@pytest.mark.parametrize("options", [{}, UNREAD], ids=["as the kernel allows", "by the connection"])
def test_within_a_host(connected: Connected, options: dict[str, Any]) -> None:
    near, far, cache = connected(ShmTransferChannel, options)
    assert near.transport == "shm"
    moves(near, far, cache)
    large = np.random.default_rng(1).integers(0, 255, 1 << 20, dtype=np.uint8)
    near.batched_write([large[i * PAGE : (i + 1) * PAGE] for i in range(64)], "far", remote_indexes=range(64))
    assert (cache.reshape(-1) == large[: 64 * PAGE]).all()
    assert ("process_memory is off" in path_of(near)) == bool(options)


def test_the_best_road_is_taken(connected: Connected) -> None:
    near, far, cache = connected(AutoTransferChannel, {})
    assert near.transport == "auto" and path_of(near).startswith("shm")
    moves(near, far, cache)


def test_roads_are_chosen_by_the_program(connected: Connected) -> None:
    roads = [Road("tcp", {"lanes_per_peer": 2}), Road("shm", UNREAD)]
    near, far, cache = connected(AutoTransferChannel, {"roads": roads})
    assert path_of(near).startswith("tcp")
    moves(near, far, cache)
    assert near.stats()["transport"] == "auto"


def test_names_tell_roads_of_one_transport_apart(connected: Connected) -> None:
    roads = [Road("tcp", {"data_host": "127.0.0.1"}, "first"), Road("tcp", {}, "second")]
    near, _, _ = connected(AutoTransferChannel, {"roads": roads, "require": ["second"]}, {"roads": roads})
    assert "road second" in path_of(near)


def test_without_a_road_that_is_required_nothing_connects(connected: Connected) -> None:
    with pytest.raises(kvferry.TransferError) as caught:
        connected(AutoTransferChannel, {"require": ["shm"]}, {"roads": [Road("tcp")]})
    assert caught.value.name == "no_path"


def test_a_road_that_this_host_does_not_have_is_left_out(connected: Connected) -> None:
    if kvferry.RdmaTransferChannel.active_rails():
        pytest.skip("this host has RDMA")
    if not kvferry._kvferry.built_with_rdma:
        pytest.skip("built without RDMA")
    near, _, _ = connected(AutoTransferChannel, {"roads": [Road("rdma"), Road("tcp")]})
    assert path_of(near).startswith("tcp")
    with pytest.raises(kvferry.TransferError) as caught:
        AutoTransferChannel(roads=[Road("rdma")])
    assert caught.value.name == "no_path"


def test_roads_that_make_no_sense() -> None:
    wrong: Any
    for wrong, kind, match in (
        (["tcp"], TypeError, "roads are Road"), ([Road("pigeon")], ValueError, "'pigeon'"),  # type: ignore[arg-type]
        ([Road("tcp", {"lanes": 2})], TypeError, "no argument 'lanes'"), (7, TypeError, "roads can't be 7"),
        ([Road("tcp", 7)], TypeError, "options can't be 7"),  # type: ignore[arg-type]
        ([Road("tcp"), Road("tcp")], kvferry.TransferError, "tcp"),
    ):  # fmt: skip
        with pytest.raises(kind, match=match):
            AutoTransferChannel(roads=wrong)


class Answering(AutoTransferChannel):
    """Side messages of its own."""

    def handle_init_side_msg(self, message: kvferry.SideMessage) -> kvferry.SideMessage:
        return message


def test_side_messages_are_answered(connected: Connected) -> None:
    near, far, _ = connected(Answering, {})
    asked = kvferry.SideMessage.decode(b"\x81\xa4type\xa4mine")
    assert near.send_init_side_msg(far.peer_init_url, asked) == asked
