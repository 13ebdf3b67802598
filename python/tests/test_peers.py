# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import kvferry
import msgspec
import pytest
from conftest import PAGE, PAGES, Pair, becomes, is_free, make_cache
from loopback import own_loopback_url


class Question(msgspec.Struct, tag="Question"):
    text: str


class Answer(msgspec.Struct, tag="Answer"):
    text: str


class P2PInitSideMsg(msgspec.Struct, tag="P2PInitSideMsg"):
    pass


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


#: What a handler returns or raises that is no answer.
ANSWERS: dict[str, kvferry.SideMessage | BaseException] = {
    "interrupt": KeyboardInterrupt(),
    "exit": SystemExit(3),
    "speechless": Speechless(),
    "half a pair": ValueError("half: \udc80"),
    "zero": ValueError("a\0b"),
    "no code": kvferry.TransferError("no code", code="x"),  # type: ignore[arg-type]
    "large code": kvferry.TransferError("large \udc80", code=1 << 40),
    "no bytes": kvferry.SideMessage("Answer", bytearray(b"junk")),  # type: ignore[arg-type]
    "words": kvferry.SideMessage("Answer", "junk"),  # type: ignore[arg-type]
}


def message_of(struct: msgspec.Struct) -> kvferry.SideMessage:
    return kvferry.SideMessage.decode(msgspec.msgpack.encode(struct))


class Oracle(kvferry.TcpTransferChannel):
    """Answers questions."""

    def __init__(self, **options: Any) -> None:
        super().__init__(peer_init_url="tcp://127.0.0.1:0", **options)
        self.answers = {"ping": "pong"}

    def handle_init_side_msg(self, message: kvferry.SideMessage) -> kvferry.SideMessage:
        if message.type != "Question":
            return super().handle_init_side_msg(message)
        question = msgspec.msgpack.decode(message.encoded, type=Question)
        if question.text == "refuse":
            raise kvferry.TransferError("not today", "access_denied", "kvferry", 10)
        if question.text == "nothing":
            return None  # type: ignore[return-value]
        if question.text in ANSWERS:
            answer = ANSWERS[question.text]
            if isinstance(answer, BaseException):
                raise answer
            return answer
        return message_of(Answer(self.answers[question.text]))


@pytest.fixture
def oracle() -> Iterator[Oracle]:
    with Oracle(peer_lookup_url="tcp://lookup:1") as channel:
        yield channel


@pytest.fixture
def asker() -> Iterator[kvferry.TcpTransferChannel]:
    with kvferry.TcpTransferChannel() as channel:
        yield channel


def test_a_subclass_answers_side_messages(oracle: Oracle, asker: kvferry.TcpTransferChannel) -> None:
    question = message_of(Question("ping"))
    assert question.type == "Question"
    answer = asker.send_init_side_msg(oracle.peer_init_url, question)
    assert msgspec.msgpack.decode(answer.encoded, type=Answer) == Answer("pong")
    assert asker.lazy_init_peer_connection("asker", "oracle", oracle.peer_init_url, question) == answer
    assert asker.lazy_init_peer_connection("asker", "oracle", oracle.peer_init_url) is None


def test_lmcaches_messages_have_an_answer(oracle: Oracle, asker: kvferry.TcpTransferChannel) -> None:
    answer = asker.send_init_side_msg(oracle.peer_init_url, message_of(P2PInitSideMsg()))
    assert answer.type == "P2PInitSideRetMsg"
    assert msgspec.msgpack.decode(answer.encoded)["peer_lookup_url"] == "tcp://lookup:1"


def test_an_exception_becomes_an_error_and_is_logged(
    oracle: Oracle, asker: kvferry.TcpTransferChannel, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(kvferry.TransferError, match="KeyError: 'unheard of'") as caught:
        asker.send_init_side_msg(oracle.peer_init_url, message_of(Question("unheard of")))
    assert caught.value.name == "handshake_failed"
    logged = [record for record in caplog.records if "handle_init_side_msg" in record.getMessage()]
    assert len(logged) == 1 and logged[0].levelno == logging.ERROR and logged[0].exc_info
    told = {name: getattr(logged[0], name) for name in ("event", "transport", "peer", "cause", "suppressed")}
    assert told == {
        "event": "side_message_failed", "transport": "tcp", "peer": "", "cause": "handshake_failed", "suppressed": 0,
    }  # fmt: skip

    with pytest.raises(kvferry.TransferError, match="returned no SideMessage"):
        asker.send_init_side_msg(oracle.peer_init_url, message_of(Question("nothing")))


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("interrupt", "answered: KeyboardInterrupt"),
        ("exit", "answered: SystemExit: 3"),
        ("speechless", "answered: Speechless"),
        ("half a pair", r"answered: ValueError: half: .*udc80"),
        ("zero", r"answered: ValueError: a.*x00b"),
        ("no code", "answered: no code"),
        ("large code", r"answered: large .*udc80"),
        ("no bytes", "answered: TypeError: .*which is no bytes"),
        ("words", "answered: TypeError: .*which is no bytes"),
    ],
)
def test_whatever_a_handler_does_the_peer_is_told_in_a_sentence(
    oracle: Oracle, asker: kvferry.TcpTransferChannel, caplog: pytest.LogCaptureFixture, question: str, answer: str
) -> None:
    for _ in range(2):  # the thread that calls handlers is still there
        with pytest.raises(kvferry.TransferError, match=answer) as caught:
            asker.send_init_side_msg(oracle.peer_init_url, message_of(Question(question)))
        assert caught.value.name == "handshake_failed"
        assert "Traceback" not in str(caught.value) and __file__ not in str(caught.value)
    if not question.endswith("code"):
        assert any("handle_init_side_msg" in record.getMessage() for record in caplog.records)


def test_a_handler_that_would_wait_for_itself_is_told(asker: kvferry.TcpTransferChannel) -> None:
    class Introvert(kvferry.TcpTransferChannel):
        def handle_init_side_msg(self, message: kvferry.SideMessage) -> kvferry.SideMessage:
            return self.send_init_side_msg(self.peer_init_url, message, timeout=60)

    with Introvert(peer_init_url="tcp://127.0.0.1:0") as channel:
        with pytest.raises(kvferry.TransferError, match="which only it could answer") as caught:
            asker.send_init_side_msg(channel.peer_init_url, message_of(Question("go")), timeout=60)
        assert caught.value.name == "would_deadlock"


def test_a_log_filter_that_raises_is_no_answer_to_the_peer(oracle: Oracle, asker: kvferry.TcpTransferChannel) -> None:
    def careless(record: logging.LogRecord) -> bool:
        raise RuntimeError("careless")

    logger = logging.getLogger("kvferry")
    logger.addFilter(careless)
    try:
        with pytest.raises(kvferry.TransferError, match="KeyError: 'unheard of'"):
            asker.send_init_side_msg(oracle.peer_init_url, message_of(Question("unheard of")))
    finally:
        kvferry.flush_logs()
        logger.removeFilter(careless)


def test_a_transfer_error_keeps_its_code(oracle: Oracle, asker: kvferry.TcpTransferChannel) -> None:
    with pytest.raises(kvferry.TransferError, match="not today") as caught:
        asker.send_init_side_msg(oracle.peer_init_url, message_of(Question("refuse")))
    assert caught.value.name == "access_denied"


def test_a_channel_may_be_closed_and_dropped_by_its_own_handler(asker: kvferry.TcpTransferChannel) -> None:
    class Suicidal(kvferry.TcpTransferChannel):
        def handle_init_side_msg(self, message: kvferry.SideMessage) -> kvferry.SideMessage:
            kept.clear()
            return message

    kept: list[Suicidal] = [Suicidal(peer_init_url=own_loopback_url())]
    url = kept[0].peer_init_url
    queue = kvferry.CompletionQueue()
    asked = asker.submit_send_init_side_msg(queue, url, message_of(Question("go")), timeout=60)
    assert becomes(lambda: not kept)
    assert becomes(lambda: is_free(url))  # again: the channel that had it is destroyed
    asked.cancel()
    assert queue.wait(60) and queue.drain() == [asked]
    assert asked.error is not None


def test_what_is_no_message() -> None:
    with pytest.raises(kvferry.TransferError) as caught:
        kvferry.SideMessage.decode(b"junk")
    assert caught.value.name == "malformed_message"


def test_channels_meet_by_metadata(pair: Pair) -> None:
    metadata = pair.far.local_metadata("far")
    with kvferry.TcpTransferChannel() as third:
        peer = third.connect("third", metadata)
        assert peer.id == "far"
        assert peer.regions == (kvferry.RemoteRegion(PAGE * PAGES, PAGE, "read_write", 0),)
        assert peer.regions[0].page_count == PAGES
        assert third.peer_info("far") == peer and third.peers() == [peer]
        assert third.remote_xfer_handler_exists("far")
        assert third.batched_write([b"x"], "far", remote_indexes=[0]) == 1
        third.disconnect("far")
        assert third.peer_info("far") is None


def test_news_of_peers(pair: Pair) -> None:
    event = pair.far.wait_peer_event(20)
    assert (event.kind, event.peer_id, event.cause, event.missed) == ("connected", "near", None, 0)
    pair.near.close()
    event = pair.far.wait_peer_event(20)
    assert (event.kind, event.cause) == ("gone", "peer_closed")


def test_an_operation_names_the_incarnation_that_it_is_meant_for(pair: Pair) -> None:
    run, known = pair.far.incarnation, pair.near.peer_info("far")
    assert known is not None and run == known.incarnation
    pair.near.batched_write(kvferry.Pages([1]), "far", remote_indexes=[0], incarnation=run)
    with pytest.raises(kvferry.TransferError) as told:
        pair.near.batched_write(kvferry.Pages([1]), "far", remote_indexes=[0], incarnation=run ^ 1)
    assert told.value.name == "peer_restarted"


def test_a_fence_returns(pair: Pair) -> None:
    pair.far.fence("near", 20)


def test_regions_come_and_go(pair: Pair) -> None:
    more = make_cache()
    held = weakref.ref(more)
    number = pair.far.add_region(kvferry.Region(more, PAGE))
    assert pair.near.batched_write(kvferry.Pages([3]), "far", remote_indexes=[0], remote_region=number) == 1
    assert (more[0] == 3).all()
    peer = pair.near.peer_info("far")
    assert peer is not None and [region.number for region in peer.regions] == [0, number]
    assert pair.far.get_local_mem_indices([more[2]], number) == [2]
    del more
    assert held() is not None
    pair.far.remove_region(number, 20)
    assert held() is None
    with pytest.raises(kvferry.TransferError) as error:
        pair.near.batched_write(kvferry.Pages([3]), "far", remote_indexes=[0], remote_region=number)
    assert error.value.name == "region_gone"
    with pytest.raises(kvferry.TransferError) as error:
        pair.far.remove_region(number)
    assert error.value.name == "region_gone"
    assert pair.far.capabilities()["region_changes"]


def test_pages_of_a_region_that_is_being_removed_are_refused(pair: Pair) -> None:
    queue = kvferry.CompletionQueue()
    more = make_cache()
    held = weakref.ref(more)
    number = pair.near.add_region(kvferry.Region(more, PAGE))
    del more
    waits = pair.near.submit_recv(queue, kvferry.Pages([0], number), "far", tag=5)
    removal = pair.near.submit_remove_region(queue, number, 20)
    with pytest.raises(ValueError, match=f"no region {number}"):
        pair.near.batched_read(kvferry.Pages([0], number), "far", remote_indexes=[0])
    assert not waits.done() and held() is not None
    pair.far.batched_send([b"x" * PAGE], "near", tag=5)
    while not (waits.done() and removal.done()):
        assert queue.wait(20)
        queue.drain()
    waits.result()
    removal.result()
    with pytest.raises(kvferry.TransferError):
        pair.near.remove_region(number)
    assert held() is None


def test_what_goes_with_a_removal_may_use_the_channel(pair: Pair) -> None:
    class AddsAnother:
        def __del__(self) -> None:
            numbers.append(pair.near.add_region(kvferry.Region(bytearray(PAGE), PAGE)))

    numbers: list[int] = []
    queue = kvferry.CompletionQueue()
    number = pair.near.add_region(kvferry.Region(bytearray(PAGE), PAGE))
    removal = pair.near.submit_remove_region(queue, number, 20)
    removal.user_data = AddsAnother()
    del removal
    while len(queue) != 0:
        assert queue.wait(20)
        queue.drain()
    first = pair.near.add_region(kvferry.Region(bytearray(PAGE), PAGE))
    assert sorted([first, *numbers]) == [number + 1, number + 2]
    for added in (first, *numbers):
        pair.near.remove_region(added, 20)


def test_a_removal_that_is_refused_leaves_the_region(pair: Pair) -> None:
    with pytest.raises(kvferry.TransferError):
        pair.near.remove_region(7)
    with pytest.raises((ValueError, TypeError, OverflowError)):
        pair.near.remove_region(0, "soon")  # type: ignore[arg-type]
    assert pair.near.batched_write(kvferry.Pages([3]), "far", remote_indexes=[0]) == 1


def test_a_cancelled_removal_lets_go_of_the_memory_with_the_next_call(pair: Pair) -> None:
    queue = kvferry.CompletionQueue()
    more = make_cache()
    held = weakref.ref(more)
    number = pair.near.add_region(kvferry.Region(more, PAGE))
    del more
    waits = pair.near.submit_recv(queue, kvferry.Pages([0], number), "far", tag=6)
    removal = pair.near.submit_remove_region(queue, number, 20)
    removal.cancel()
    while not removal.done():
        assert queue.wait(20)
        queue.drain()
    assert removal.error is not None and held() is not None
    waits.cancel()
    try:
        pair.near.remove_region(number, 20)
    except kvferry.TransferError as error:
        assert error.name == "region_gone"
    while not waits.done():
        assert queue.wait(20)
        queue.drain()
    del waits
    assert held() is None


def test_facts_and_statistics(pair: Pair) -> None:
    assert pair.near.transport == "tcp"
    assert pair.near.peer_init_url == "" and pair.far.peer_init_url.startswith("tcp://127.0.0.1:")
    able = pair.near.capabilities()
    assert able["ranges"] and able["max_notification_bytes"] > 0
    pair.near.batched_write(kvferry.Pages([1, 2]), "far", remote_indexes=[1, 2])
    with pytest.raises(kvferry.TransferError):
        pair.near.batched_write(kvferry.Pages([1]), "far", remote_indexes=[PAGES])
    stats = pair.near.stats()
    write = stats["transfers"]["write"]
    assert (write["started"], write["succeeded"], write["objects"], write["bytes"]) == (2, 1, 2, 2 * PAGE)
    assert write["failures"] == {"index_out_of_range": 1} and write["in_flight"] == 0
    assert write["latency"]["count"] == 1 and sum(count for _, count in write["latency"]["buckets"]) == 1
    assert stats["peers"]["far"]["connected"] and stats["connected_peers"] == 1
    assert stats["handshakes"]["dialed"] == 1
    assert sum(path["bytes_out"] for path in stats["paths"]) > 2 * PAGE


def test_prometheus_text(pair: Pair) -> None:
    pair.near.batched_write(kvferry.Pages([1]), "far", remote_indexes=[1])
    text = kvferry.to_prometheus(pair.near, pair.far, labels=[{"side": "near"}, {"side": "far"}])
    assert 'side="near"' in text and 'side="far"' in text and "kvferry_" in text
    with pytest.raises(ValueError, match="2 channels and labels for 1"):
        kvferry.to_prometheus(pair.near, pair.far, labels=[{}])


def test_rdma_says_what_is_missing() -> None:
    from kvferry import _kvferry

    if kvferry.RdmaTransferChannel.active_rails():
        pytest.skip("this host has RDMA devices")
    with pytest.raises(kvferry.TransferError) as caught:
        kvferry.RdmaTransferChannel()
    expected = {"ENODEV", "ENOSYS"} if _kvferry.built_with_rdma else {"not_supported"}
    assert caught.value.name in expected, str(caught.value)


def test_the_base_class_is_no_channel() -> None:
    with pytest.raises(TypeError, match="has no transport"):
        kvferry.BaseTransferChannel()


def test_held_messages_find_the_handler_after_the_channel_is_dropped(asker: kvferry.TcpTransferChannel) -> None:
    """One message's handler lets go of the channel while others wait for their turn."""
    queue = kvferry.CompletionQueue()
    entered, dropped = threading.Event(), threading.Event()

    class Dropped(kvferry.TcpTransferChannel):
        def __init__(self) -> None:
            super().__init__(
                peer_init_url=own_loopback_url(),
                max_pending_side_message_bytes=80_000,
                max_pending_side_message_bytes_of_source=80_000,
            )
            question = message_of(Question("x" * 8_000))
            self.asked = [
                asker.submit_send_init_side_msg(queue, self.peer_init_url, question, timeout=20) for _ in range(20)
            ]
            assert queue.wait(20)  # some are refused, so that the others are held

        def handle_init_side_msg(self, message: kvferry.SideMessage) -> kvferry.SideMessage:
            entered.set()
            dropped.wait(20)
            return message

    channel = Dropped()
    assert entered.wait(20)
    url, asked, lost = channel.peer_init_url, channel.asked, weakref.ref(channel)
    del channel
    dropped.set()
    while not all(operation.done() for operation in asked):
        queue.wait(1)
        queue.drain()
    assert lost() is None
    names = [operation.error.name for operation in asked if operation.error]
    assert "resource_limit" in names and len(names) - names.count("resource_limit") > 2, names
    assert becomes(lambda: is_free(url))  # again: the channel that had it is destroyed
