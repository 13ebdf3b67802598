# SPDX-License-Identifier: Apache-2.0
"""Workers that push or are pushed to, and are slow, busy, gone or closed."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import kvferry
import pytest
from kvferry import Operation, TransferError
from kvferry.vllm.layout import HeadSource
from kvferry.vllm.messages import RENEW, message, parse
from kvferry.vllm.push_messages import WANT, Sender
from kvferry.vllm.push_worker import PushWorker, _Link
from kvferry.vllm.pushes import Pushes
from kvferry.vllm.renewals import LEAST_INTERVAL
from kvferry.vllm.scheduler import Load
from kvferry.vllm.steps import Runner, Signal, Steps
from push_sides import PushSide, each_pair, pair, want_of


def test_readers_may_ask_while_a_worker_is_made(make: Callable[..., Any]) -> None:
    """As when one is started again, on the port on which it was known."""
    answers: list[dict[str, Any]] = []

    class Asked(PushWorker):
        def _prepare(self) -> None:
            with kvferry.TcpTransferChannel() as other:
                for asked in (message(RENEW, transfer_ids=["t"]), message(WANT, want=want)):
                    answer = other.lazy_init_peer_connection("o", "p", self._channel.peer_init_url, asked)
                    assert answer is not None
                    answers.append(parse(answer))
            super()._prepare()

    class AskedSide(PushSide):
        make = Asked

    decode = make("decode", False, kind=PushSide)
    sender = Sender("t", ("tcp://h:1",), ("tcp://h:1",), "of a prompt", 10, 30.0)
    want = want_of(decode, sender)
    prefill = make("prefill", True, 100, kind=AskedSide)
    assert [answer.get("held") or answer.get("refused") for answer in answers] == [[False], ""]
    assert len(prefill.push._pushes._early) == 1


@pytest.mark.parametrize("senders,receivers,heads", [(2, 1, 2), (1, 2, 2), (4, 2, 4), (2, 2, 1)])
def test_every_rank_hears_of_a_request_that_never_comes(
    make: Callable[..., Any], senders: int, receivers: int, heads: int
) -> None:
    def side(name: str, rank: int, size: int) -> Any:
        return make(
            name, name == "prefill", kind=PushSide, heads=max(1, heads // size), total_heads=heads, tp_size=size,
            tp_rank=rank, lease=0.3, block=128,
        )  # fmt: skip

    prefills = [side("prefill", rank, senders) for rank in range(senders)]
    sender = prefills[0].sender("t", *prefills[1:])
    decodes = [side("decode", rank, receivers) for rank in range(receivers)]
    for decode in decodes:
        decode.step(waiting=[("d", sender)], loads=[Load("d", sender, [1, 2, 3], 0, 10)])
    for decode in decodes:
        assert decode.loaded("d") == {1, 2, 3}


@pytest.mark.parametrize("heads,senders,receivers", [(2, 1, 2), (4, 4, 2), (2, 4, 4), (1, 2, 2)])
def test_ranks_renew_where_their_bytes_come_from(
    make: Callable[..., Any], heads: int, senders: int, receivers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = tuple(f"tcp://h:{rank + 1}" for rank in range(senders))
    sender = Sender("t", urls, urls, "of a prompt", 10, 30.0)
    for rank in range(receivers):
        decode = make("decode", False, kind=PushSide, total_heads=heads, tp_size=receivers, tp_rank=rank)
        asked: list[str] = []
        monkeypatch.setattr(decode.push, "_send_renewals", lambda server, _: server.url)
        monkeypatch.setattr(decode.push, "_perform", asked.append)
        decode.push._renew([sender])
        assert {urls[source.rank] for source, _ in decode.worker._sources(sender)} == set(asked)


def test_nothing_is_pushed_over_a_connection_that_was_lost_before_anything_was_computed(
    each_pair: tuple[PushSide, PushSide],
) -> None:
    """The prefilling worker doesn't hear of it, and cannot connect."""
    prefill, decode = each_pair
    prefill.announce("t")
    decode.wants("d", prefill.sender("t"), [1, 2, 3])
    worker, server = decode.push, prefill.sender("t").servers()[0]
    decode.until(lambda: any(push.agreed for push in list(worker._pushed.values())))
    with worker._lock:
        worker._break(server.peer_id, worker._links[server.peer_id], "it is lost")
    assert decode.loaded("d") == {1, 2, 3}
    decode.cache[...] = 1
    prefill.announce("u")
    decode.wants("e", prefill.sender("u"), [8, 9, 10])  # a new connection
    prefill.compute("t", [5, 6, 7], 10)
    prefill.until(lambda: not prefill.push._pushes._by_transfer["t"].readers)
    prefill.compute("u", [5, 6, 7], 10)
    assert decode.loaded("e") == set()
    assert (decode.cache[:, :8] == 1).all() and (decode.cache[:, 8] == 105).all()


def test_a_connection_that_is_lost_before_the_answer_is_heard(
    pair: tuple[PushSide, PushSide], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is told to those that are pushed; what the answer makes one of them is told, too."""
    prefill, decode = pair
    prefill.announce("t")
    worker = decode.push
    ask_for = worker._ask_for

    def lost_first(push: Any, source: HeadSource, server: Any, readers: int) -> Any:
        refused = yield from ask_for(push, source, server, readers)
        worker._break(server.peer_id, push.link, "it is lost")
        return refused

    monkeypatch.setattr(worker, "_ask_for", lost_first)
    decode.wants("d", prefill.sender("t"), [1, 2, 3])
    assert decode.loaded("d") == {1, 2, 3}


def test_a_request_that_never_comes_is_waited_for_no_longer_than_a_lease(make: Callable[..., Any]) -> None:
    prefill = make("prefill", True, 100, kind=PushSide, lease=0.5)
    decode = make("decode", False, kind=PushSide)
    sender = prefill.sender("t")
    decode.step(waiting=[("d", sender)], loads=[Load("d", sender, [1, 2, 3], 0, 10)])
    assert decode.loaded("d") == {1, 2, 3} and not prefill.push._pushes._early


def test_a_peer_that_does_not_answer_pushes_nothing_into_blocks_that_are_free(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = make("prefill", True, 100, kind=PushSide)
    decode = make("decode", False, kind=PushSide, timeout=3.0, lease=1.0)
    prefill.announce("t")
    decode.wants("d", prefill.sender("t"), [1, 2, 3])
    prefill.until(lambda: bool(prefill.push._pushes._by_transfer["t"].readers))
    stalled, asked = threading.Event(), threading.Event()
    stop = prefill.push._pushes.stop

    def late(*arguments: Any) -> None:
        asked.set()
        prefill.push._lock.release()  # the engine goes on
        assert stalled.wait(60)
        prefill.push._lock.acquire()
        stop(*arguments)

    monkeypatch.setattr(prefill.push._pushes, "stop", late)
    try:
        decode.step(cancelled=["d"])
        assert asked.wait(60)
        assert decode.loaded("d") == set()  # after three seconds, by the end of the connection
        decode.cache[...] = 1
        prefill.compute("t", [5, 6, 7], 10)  # it has heard of nothing
        prefill.until(lambda: not prefill.push._pushes._by_transfer["t"].readers)
        assert (decode.cache == 1).all()
    finally:
        stalled.set()
    prefill.announce("u")
    prefill.compute("u", [5, 6, 7], 10)
    failed, until = {1}, time.monotonic() + 60
    for name in map(str, itertools.count()):  # it may still be busy with the former
        if not failed:
            break
        assert time.monotonic() < until
        decode.wants(name, prefill.sender("u"), [1, 2, 3])
        failed = decode.loaded(name)
    assert (decode.cache[:, 1] == 105).all()


@pytest.mark.parametrize("kind", ["want", "renewal"])
def test_a_message_too_many_ends_no_other_push(
    make: Callable[..., Any], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    few = {"max_pending_side_message_bytes": 4000, "max_pending_side_message_bytes_of_source": 4000}
    prefill = make("prefill", True, 100, kind=PushSide, channel_options=few)
    decode = make("decode", False, kind=PushSide)
    prefill.announce("t")
    sender = prefill.sender("t")
    decode.wants("d", sender, [1, 2, 3])
    decode.until(lambda: any(push.agreed for push in list(decode.push._pushed.values())))
    with prefill.push._lock:  # its engine is busy, and answers nothing
        for number in range(30):
            one = prefill.sender(f"u{number}")
            if kind == "renewal":
                decode.step(waiting=[("w", one)])
            else:
                decode.wants(f"e{number}", one, [4, 5, 6])
        decode.until(lambda: "are not renewed" in caplog.text or "does not push" in caplog.text)
    prefill.compute("t", [5, 6, 7], 10)
    received: set[str] = set()

    def arrived() -> bool:
        received.update(decode.worker.finished()[1])
        return "d" in received

    decode.until(arrived)
    assert (decode.cache[:, 1] == 105).all() and not decode.worker.failed_blocks() & {1, 2, 3}


def test_a_worker_that_stands_still_is_given_up_after_some_renewals(pair: tuple[PushSide, PushSide]) -> None:
    prefill, decode = pair
    prefill.announce("t")
    decode.wants("d", prefill.sender("t"), [1, 2, 3])
    worker, server = decode.push, prefill.sender("t").servers()[0]
    decode.until(lambda: any(push.agreed for push in list(worker._pushed.values())))

    def unanswered(times: int) -> _Link:
        """The steps of renewals whose deadline passes, one after the other."""
        link = worker._links[server.peer_id]
        for _ in range(times):
            with worker._lock:
                steps = worker._send_renewals(server, ["t"])
                operation = next(steps)
                assert isinstance(operation, Operation)
                with pytest.raises(StopIteration):
                    steps.throw(TransferError("no answer", "timed_out", conditions=["timed_out", "retryable"]))
            decode.until(operation.done)
        return link

    assert not unanswered(2).breaking
    with worker._lock:
        worker._perform(worker._send_renewals(server, ["t"]))
    decode.until(lambda: worker._links[server.peer_id].unanswered == 0)
    assert not unanswered(2).breaking
    assert unanswered(1).breaking
    assert decode.loaded("d") == {1, 2, 3}


class Late(Signal):
    """An operation that somebody else ends."""

    def result(self) -> None:
        pass


class LateNotifications:
    """A channel whose notifications are sent by ``send``."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self.kept: list[tuple[Late, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def submit_notify(self, *arguments: Any, **keywords: Any) -> Late:
        self.kept.append((Late(), arguments, keywords))
        return self.kept[-1][0]

    def send(self, runner: Runner) -> Steps:
        for late, arguments, keywords in self.kept:
            yield self._channel.submit_notify(*arguments, **keywords)
            runner.tell(late)


class Renewals:
    """Counts the answers to renewals, and may change them."""

    def __init__(self, pushes: Pushes, monkeypatch: pytest.MonkeyPatch) -> None:
        self._renew = pushes.renew
        self.answers: list[bool] = []
        self.held: Callable[[int], bool] | None = None
        monkeypatch.setattr(pushes, "renew", self._answer)

    def _answer(self, name: str) -> bool:
        held = self._renew(name)
        self.answers.append(held if self.held is None else self.held(len(self.answers)))
        return self.answers[-1]

    def some_more(self, side: PushSide) -> list[bool]:
        before = len(self.answers)
        side.until(lambda: len(self.answers) > before + 4)
        return self.answers[before:]


def awaited(prefill: PushSide, decode: PushSide, transfer: str, blocks: list[int]) -> None:
    """It is announced, will be pushed, and is renewed."""
    prefill.announce(transfer)
    sender = prefill.sender(transfer)
    name = f"d-{transfer}"
    decode.step(waiting=[(name, sender)], loads=[Load(name, sender, blocks, 0, 10)])
    decode.until(lambda: any(push.agreed for push in list(decode.push._pushed.values())))


def test_a_last_word_that_takes_its_time_is_waited_for(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it comes behind much else. The prefilling instance has its blocks back long before."""
    prefill, decode = make("prefill", True, 100, kind=PushSide), make("decode", False, kind=PushSide, lease=0.2)
    pushes, runner = prefill.push._pushes, prefill.push._runner
    pushes.channel = channel = LateNotifications(pushes.channel)
    renewals = Renewals(pushes, monkeypatch)
    awaited(prefill, decode, "t", [1, 2, 3])
    prefill.compute("t", [5, 6, 7], 10)
    prefill.step(granted=["p-t"])
    assert prefill.freed() == {"p-t"} and len(channel.kept) == 1
    assert all(renewals.some_more(decode)) and decode.worker.finished() == (set(), set())
    with prefill.push._lock:
        runner.perform(channel.send(runner))
    assert decode.loaded("d-t") == set()
    prefill.until(lambda: not pushes._telling)
    with prefill.push._lock:
        assert not pushes.renew("t")


def test_a_last_word_that_does_not_come_is_not_waited_for(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one taken for lost that is only heard later than an answer."""
    prefill, decode = make("prefill", True, 100, kind=PushSide), make("decode", False, kind=PushSide, lease=0.2)
    renewals = Renewals(prefill.push._pushes, monkeypatch)
    renewals.held = lambda count: count % 2 == 0
    awaited(prefill, decode, "t", [1, 2, 3])
    assert set(renewals.some_more(decode)) == {True, False}
    prefill.compute("t", [5, 6, 7], 10)
    assert decode.loaded("d-t") == set()
    awaited(prefill, decode, "u", [4, 5, 6])
    renewals.held = lambda _: False
    assert decode.loaded("d-u") == {4, 5, 6}


def test_a_worker_that_is_not_there_is_waited_for_once(
    make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Those who come later for a while have their prompts computed at once."""
    gone, decode = make("prefill", True, kind=PushSide), make("decode", False, kind=PushSide, timeout=0.5, lease=30.0)
    sender = gone.sender("t")
    gone.worker.close()
    decode.wants("d", sender, [1, 2, 3])
    assert decode.loaded("d") == {1, 2, 3}
    decode.push._options = replace(decode.push._options, timeout=1000.0)
    decode.wants("e", sender, [1, 2, 3])
    assert decode.loaded("e") == {1, 2, 3}
    assert "could not be reached a moment ago" in caplog.text
    decode.step(waiting=[("f", sender)])
    decode.step(released=[("f", sender)])
    port = int(sender.urls[0].rpartition(":")[2])
    successor = make("prefill", True, 120, kind=PushSide, port=port)
    decode.push._unreachable.clear()  # a lease has passed
    successor.announce("u")
    decode.wants("g", successor.sender("u"), [4, 5, 6])
    decode.until(lambda: any(push.agreed for push in list(decode.push._pushed.values())))
    successor.compute("u", [5, 6, 7], 10)
    assert decode.loaded("g") == set()


def test_a_prefilling_worker_that_dies_between_two_chunks_and_its_successor(
    each_pair: tuple[PushSide, PushSide], make: Callable[..., Any]
) -> None:
    prefill, decode = each_pair
    prefill.announce("t")
    sender = prefill.sender("t")
    decode.wants("d", sender, [1, 2, 3])
    decode.until(lambda: any(push.agreed for push in list(decode.push._pushed.values())))
    prefill.compute("t", [5], 4)
    prefill.worker.close()
    assert decode.loaded("d") == {1, 2, 3}
    port = int(sender.urls[0].rpartition(":")[2])
    transport = prefill.push._options.transport
    successor = make("prefill", True, 120, kind=PushSide, port=port, transport=transport)
    successor.announce("u")
    decode.wants("e", successor.sender("u"), [4, 5, 6])
    successor.compute("u", [5, 6, 7], 10)
    assert decode.loaded("e") == set() and (decode.cache[:, 4] == 125).all()


def test_one_of_two_prefilling_workers_dies_between_two_chunks(make: Callable[..., Any]) -> None:
    """What the other one has pushed is no use without its heads."""
    prefills = [
        make("prefill", True, 100, kind=PushSide, total_heads=2, tp_size=2, tp_rank=rank, block=64) for rank in range(2)
    ]
    decode = make("decode", False, kind=PushSide, heads=2, total_heads=2, block=128)
    for prefill in prefills:
        prefill.announce("t")
    decode.wants("d", prefills[0].sender("t", prefills[1]), [1, 2, 3])
    for prefill in prefills:
        prefill.until(lambda: bool(prefill.push._pushes._by_transfer["t"].readers))
        prefill.compute("t", [5], 4)
    prefills[1].worker.close()
    prefills[0].compute("t", [6, 7], 10)
    prefills[0].step(granted=["p-t"])
    assert decode.loaded("d") == {1, 2, 3} and prefills[0].freed() == {"p-t"}


def test_a_worker_with_a_short_lease_is_renewed_at_often_and_others_are_not_for_longer(
    make: Callable[..., Any],
) -> None:
    short, nonsense = (make("prefill", True, kind=PushSide, lease=lease) for lease in (1e-3, float("nan")))
    decode = make("decode", False, kind=PushSide, lease=30.0)
    renewals = decode.push._renewals
    decode.step(waiting=[("d", nonsense.sender("t")), ("e", short.sender("t"))])
    decode.until(lambda: renewals.interval() == LEAST_INTERVAL)
    renewals.let_go("e")
    assert renewals.interval() == 10.0


def test_a_decoding_worker_that_dies_keeps_no_blocks(pair: tuple[PushSide, PushSide]) -> None:
    prefill, decode = pair
    prefill.announce("t")
    decode.wants("d", prefill.sender("t"), [1, 2, 3])
    prefill.until(lambda: bool(prefill.push._pushes._by_transfer["t"].readers))
    decode.worker.close()
    assert decode.worker.finished()[1] == {"d"}
    prefill.compute("t", [5, 6, 7], 10)
    prefill.step(granted=["p-t"])
    assert prefill.freed() == {"p-t"}  # long before the lease


def test_closing_ends_what_is_under_way(pair: tuple[PushSide, PushSide]) -> None:
    prefill, decode = pair
    prefill.announce("t")
    for name in ("t", "never"):
        decode.wants(name, prefill.sender(name), [1, 2, 3])
    prefill.until(lambda: bool(prefill.push._pushes._by_transfer["t"].readers) and bool(prefill.push._pushes._early))
    prefill.compute("t", [5, 6], 8)
    decode.worker.close()
    decode.worker.close()
    assert decode.worker.finished()[1] == {"t", "never"}


@pytest.mark.parametrize("order", ["load", "release", "renewal"])
def test_closing_ends_what_waits_for_the_end_of_a_connection(
    pair: tuple[PushSide, PushSide], order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = pair
    worker, sender = decode.push, prefill.sender("t")
    server = sender.servers()[0]
    held = Signal()

    def disconnect(peer_id: str, link: _Link) -> Any:
        yield held

    monkeypatch.setattr(worker, "_disconnect", disconnect)
    with worker._lock:
        link = worker._links[server.peer_id] = _Link("someone")
        worker._break(server.peer_id, link, "it doesn't answer")
    orders: dict[str, dict[str, Any]] = {
        "load": {"loads": [Load("d", sender, [1, 2, 3], 0, 10)]}, "release": {"released": [("d", sender)]},
        "renewal": {"waiting": [("d", sender)]},
    }  # fmt: skip
    decode.step(**orders[order])
    assert link.broken.waiting
    closing = threading.Thread(target=decode.worker.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()
    assert decode.worker.finished()[1] == ({"d"} if order == "load" else set())
