# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kvferry
import numpy as np
import pytest
from conftest import PAGE, PAGES, Pair


def test_an_error_says_what_and_by_which_condition(pair: Pair) -> None:
    with pytest.raises(kvferry.TransferError, match="999") as caught:
        pair.near.batched_write(kvferry.Pages([0, 1]), "far", remote_indexes=[1, 999], statuses=True)
    error = caught.value
    assert (error.name, error.category, error.transferred) == ("index_out_of_range", "kvferry", 0)
    assert error.invalid_argument and not error.retryable and not error.may_still_land
    assert len(error.statuses) == 2 and error.statuses[1] == "index_out_of_range"


def test_an_unknown_peer(pair: Pair) -> None:
    with pytest.raises(kvferry.TransferError, match="nobody") as caught:
        pair.near.batched_write(kvferry.Pages([0]), "nobody", remote_indexes=[0])
    assert caught.value.name == "unknown_peer"


def test_a_deadline_is_a_timeout_error(pair: Pair) -> None:
    with pytest.raises(TimeoutError) as caught:
        pair.far.receive_notification(0.01)
    assert isinstance(caught.value, kvferry.TransferTimeout) and caught.value.timed_out


def test_a_refused_connection_may_be_tried_again() -> None:
    with kvferry.TcpTransferChannel() as channel, pytest.raises(kvferry.TransferError) as caught:
        channel.lazy_init_peer_connection("a", "b", "tcp://127.0.0.1:1", timeout=0.2)
    assert caught.value.retryable


def test_a_closed_channel_says_so(pair: Pair) -> None:
    pair.near.close()
    pair.near.close()
    with pytest.raises(kvferry.TransferError) as caught:
        pair.near.batched_write([b"x"], "far", remote_indexes=[0])
    assert caught.value.name == "closed" and caught.value.cancelled


def test_a_constructor_throws_the_librarys_errors() -> None:
    with pytest.raises(kvferry.TransferError) as caught:
        kvferry.TcpTransferChannel(regions=[kvferry.Region(bytearray(100), page_size=64)])
    assert caught.value.name == "invalid_region"
    with pytest.raises(kvferry.TransferError) as caught:
        kvferry.TcpTransferChannel(peer_init_url="nonsense://")
    assert caught.value.name == "invalid_url"


@pytest.mark.parametrize(
    ("options", "text"),
    [({"lanes": 2}, "takes no argument 'lanes'"), ({"lanes_per_peer": "two"}, "lanes_per_peer can't be 'two'")],
)
def test_wrong_options_are_type_errors(options: dict[str, object], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        kvferry.TcpTransferChannel(**options)  # type: ignore[arg-type]


def test_wrong_types_are_type_errors(pair: Pair) -> None:
    with pytest.raises(TypeError, match="a region can't be 5"):
        kvferry.TcpTransferChannel(regions=[5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="timeout can't be 'soon'"):
        pair.near.batched_write([b"x"], "far", remote_indexes=[0], timeout="soon")  # type: ignore[arg-type]


HALF = "half of a pair: \udc80"


@pytest.mark.parametrize(
    "call",
    [
        lambda channel: channel.lazy_init_peer_connection(HALF, "far", "tcp://127.0.0.1:1"),
        lambda channel: channel.lazy_init_peer_connection("near", HALF, "tcp://127.0.0.1:1"),
        lambda channel: channel.lazy_init_peer_connection("near", "far", HALF),
        lambda channel: channel.send_init_side_msg(HALF, kvferry.SideMessage("Q", b"\x81\xa4type\xa1Q")),
        lambda channel: channel.connect(HALF, b""),
        lambda channel: channel.batched_write([b"x"], HALF, remote_indexes=[0]),
        lambda channel: channel.notify(HALF, b"x"),
        lambda channel: channel.disconnect(HALF),
        lambda channel: channel.fence(HALF),
        lambda channel: channel.peer_info(HALF),
        lambda channel: channel.remote_xfer_handler_exists(HALF),
        lambda channel: channel.local_metadata(HALF),
    ],
)
def test_text_that_has_no_utf8_is_refused_as_such(pair: Pair, call: Callable[[Any], object]) -> None:
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        call(pair.near)


@pytest.mark.parametrize(
    ("rails", "text"),
    [
        (5, "rails can't be 5"),
        (["mlx5_0"], "rails are RdmaRail, not 'mlx5_0'"),
        ([kvferry.RdmaRail("mlx5_0", port=1000)], "a rail's port can't be 1000"),
    ],
)
def test_rails_of_a_wrong_type(rails: Any, text: str) -> None:
    try:
        kvferry.RdmaTransferChannel()
    except kvferry.TransferError as error:
        if error.name in ("not_supported", "ENOSYS"):
            pytest.skip("there is no libibverbs")
    with pytest.raises(TypeError, match=text):
        kvferry.RdmaTransferChannel(rails=rails)


def test_options_reach_the_channel(pair: Pair) -> None:
    with kvferry.TcpTransferChannel(default_timeout=0.02, lanes_per_peer=3, io_threads=2) as channel:
        channel.lazy_init_peer_connection("other", "far", pair.far.peer_init_url)
        with pytest.raises(kvferry.TransferTimeout):
            channel.batched_recv([bytearray(1)], "far")


def test_descriptors_that_make_no_sense(pair: Pair) -> None:
    write = pair.near.batched_write
    with pytest.raises(TypeError, match="remote_indexes"):
        write([b"x"], "far", remote_indexes=np.array([0.5]))
    with pytest.raises(ValueError, match="-3 is negative"):
        write([b"x"], "far", remote_indexes=np.array([-3]))
    with pytest.raises(TypeError, match="contiguous array of uint64"):
        write([b"x"], "far", remote_ranges=np.zeros((4, 6), dtype=np.uint64)[::2, ::2])
    with pytest.raises(ValueError, match="rows of 3 numbers, not of 4"):
        write([b"x"], "far", remote_ranges=np.zeros((1, 4), dtype=np.uint64))
    with pytest.raises(ValueError, match=f"no page {PAGES}, region 0 has {PAGES}"):
        write(kvferry.Pages([PAGES]), "far", remote_indexes=[0])
    with pytest.raises(ValueError, match="no region 1"):
        write(kvferry.Pages([0], region=1), "far", remote_indexes=[0])
    with pytest.raises(TypeError, match="not one 'bytes'"):
        write(b"x" * PAGE, "far", remote_indexes=[0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes no argument 'tag'"):
        write([b"x"], "far", tag=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="nan"):
        write([b"x"], "far", remote_indexes=[0], timeout=float("nan"))
