# SPDX-License-Identifier: Apache-2.0
"""Questions that are lost with their connection are asked again, and what was lost harms nobody when it comes late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from kvferry.vllm.messages import LAYOUT, RELEASE, RENEW
from kvferry.vllm.push_messages import STOP, WANT, Sender, Want
from kvferry.vllm.pushes import Pushes
from kvferry.vllm.scheduler import Load
from lossy_road import LossyRoad, lossy_road
from push_sides import PushSide, pair, want_of


@pytest.fixture
def road(pair: tuple[PushSide, PushSide]) -> Iterator[LossyRoad]:
    with lossy_road(pair[0].worker.url) as made:
        yield made


def over(road: LossyRoad, sender: Sender) -> Sender:
    return replace(sender, urls=(road.url,), peer_ids=(road.url,))


def meets(prefill: PushSide, decode: PushSide, road: LossyRoad) -> None:
    """Connects them."""
    prefill.announce("first")
    decode.wants("first", over(road, prefill.sender("first")), [1, 2, 3])
    prefill.compute("first", [5, 6, 7], 10)
    assert decode.loaded("first") == set()
    decode.cache[...] = 0


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("when", ["asked", "answered"])
@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("times", [1, 2])
def test_a_want_that_is_lost_is_asked_again(
    pair: tuple[PushSide, PushSide], road: LossyRoad, announced: bool, when: str, connected: bool, times: int
) -> None:
    prefill, decode = pair
    if connected:
        meets(prefill, decode, road)
    if announced:
        prefill.announce("t")
    road.lose(WANT, times, when)
    decode.wants("d", over(road, prefill.sender("t")), [1, 2, 3])
    decode.until(lambda: any(push.agreed for push in list(decode.push._pushed.values())))
    if not announced:
        prefill.announce("t")
    prefill.compute("t", [5, 6, 7], 10)
    assert decode.loaded("d") == set() and road.lost == times
    assert (decode.cache[:, 1] == 105).all() and (decode.cache[:, 2] == 106).all()
    prefill.step(granted=["p-t"])
    assert prefill.freed() == {"p-t"}  # long before the lease
    assert len(prefill.push._pushes._early) == 0


def test_a_want_that_is_lost_each_time_ends_the_load(pair: tuple[PushSide, PushSide], road: LossyRoad) -> None:
    prefill, decode = pair
    prefill.announce("t")
    road.lose(WANT, 1000, "answered")
    decode.wants("d", over(road, prefill.sender("t")), [1, 2, 3])
    assert decode.loaded("d") == {1, 2, 3} and road.lost == 3
    decode.cache[...] = 1
    prefill.compute("t", [5, 6, 7], 10)
    prefill.until(lambda: not prefill.push._pushes._by_transfer["t"].readers)
    assert (decode.cache == 1).all()


def test_what_has_been_pushed_when_the_answer_is_lost_is_used(
    pair: tuple[PushSide, PushSide], road: LossyRoad
) -> None:
    """Its end is heard before the question is asked again, and there nothing is known of it any more."""
    prefill, decode = pair
    meets(prefill, decode, road)
    prefill.announce("t")
    prefill.compute("t", [5, 6, 7], 10)
    prefill.step(granted=["p-t"])

    def until_heard(_: bytes) -> None:
        decode.until(lambda: any(push.ended.told for push in list(decode.push._pushed.values())))
        assert prefill.freed() == {"p-t"}

    road.lose(WANT, 1, "answered", until_heard)
    decode.wants("d", over(road, prefill.sender("t")), [1, 2, 3])
    assert decode.loaded("d") == set() and road.lost == 1
    assert (decode.cache[:, 1] == 105).all()


@pytest.mark.parametrize("announced", [True, False])
def test_a_want_whose_connection_is_made_anew_is_asked_over_the_new_one(
    pair: tuple[PushSide, PushSide], road: LossyRoad, announced: bool
) -> None:
    """The prefilling worker has heard the first one, and pushes to who asked last."""
    prefill, decode = pair
    meets(prefill, decode, road)
    if announced:
        prefill.announce("t")
    worker = decode.push

    def lost(_: bytes) -> None:
        with worker._lock:
            worker._break(road.url, worker._links[road.url], "it is lost")
        decode.until(lambda: road.url not in worker._links)

    before = worker._links[road.url].local_id
    road.lose(WANT, 1, "answered", lost)
    decode.wants("d", over(road, prefill.sender("t")), [1, 2, 3])
    decode.until(lambda: any(push.agreed for push in list(worker._pushed.values())))
    assert worker._links[road.url].local_id != before
    if not announced:
        prefill.announce("t")
    prefill.step(granted=["p-t"])
    assert prefill.worker.finished() == (set(), set())  # the blocks are kept for who asked last
    prefill.compute("t", [5, 6, 7], 10)
    assert decode.loaded("d") == set()
    assert (decode.cache[:, 1] == 105).all() and (decode.cache[:, 2] == 106).all()
    assert prefill.freed() == {"p-t"}


def test_a_want_that_is_answered_when_its_connection_is_lost_already_is_asked_over_the_next(
    pair: tuple[PushSide, PushSide], road: LossyRoad, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the worker is another one by then."""
    prefill, decode = pair
    meets(prefill, decode, road)
    prefill.announce("t")
    worker = decode.push
    link, ask = worker._links[road.url], worker._ask_over

    def ask_over(of: Any, *arguments: Any) -> Any:
        operation = ask(of, *arguments)
        if of is link:
            decode.until(operation.done)
            worker._break(road.url, link, "it is lost")
        return operation

    monkeypatch.setattr(worker, "_ask_over", ask_over)
    decode.wants("d", over(road, prefill.sender("t")), [1, 2, 3])
    decode.until(lambda: any(push.agreed for push in list(worker._pushed.values())))
    prefill.compute("t", [5, 6, 7], 10)
    assert decode.loaded("d") == set() and (decode.cache[:, 1] == 105).all()


def test_a_want_that_is_lost_as_its_worker_is_started_again(
    pair: tuple[PushSide, PushSide], make: Callable[..., Any]
) -> None:
    prefill, decode = pair
    with lossy_road(prefill.worker.url) as road:
        meets(prefill, decode, road)
        successors: list[Any] = []

        def start_again(_: bytes) -> None:
            prefill.worker.close()
            port = int(prefill_url.rpartition(":")[2])
            successors.append(make("prefill", True, 120, kind=PushSide, port=port))

        prefill_url = prefill.worker.url
        sender = over(road, prefill.sender("t"))
        road.lose(WANT, 1, "asked", start_again)
        decode.wants("d", sender, [1, 2, 3])
        decode.until(lambda: any(push.agreed for push in list(decode.push._pushed.values())))
        successors[0].announce("t")
        successors[0].compute("t", [5, 6, 7], 10)
        assert decode.loaded("d") == set()
        assert (decode.cache[:, 1] == 125).all()


@pytest.mark.parametrize("when", ["asked", "answered"])
def test_that_nothing_is_wanted_is_said_again(
    pair: tuple[PushSide, PushSide], road: LossyRoad, when: str
) -> None:
    prefill, decode = pair
    meets(prefill, decode, road)
    prefill.announce("t")
    road.lose(WANT, 2, when)
    decode.step(released=[("d", over(road, prefill.sender("t")))])
    prefill.compute("t", [5, 6, 7], 10)
    prefill.step(granted=["p-t"])
    assert prefill.freed() == {"p-t"} and not decode.cache.any()
    decode.until(lambda: road.lost == 2)


@pytest.mark.parametrize("when", ["asked", "answered"])
def test_a_renewal_that_is_lost_is_asked_again_and_ends_nothing(
    pair: tuple[PushSide, PushSide], road: LossyRoad, when: str
) -> None:
    prefill, decode = pair
    prefill.announce("t")
    sender = over(road, prefill.sender("t"))
    decode.wants("d", sender, [1, 2, 3])
    decode.until(lambda: any(push.agreed for push in list(decode.push._pushed.values())))
    link = decode.push._links[road.url]
    link.unanswered = 1
    road.lose(RENEW, 2, when)
    with decode.push._lock:
        decode.push._perform(decode.push._send_renewals(sender.servers()[0], ["t"]))
    decode.until(lambda: link.unanswered == 0 or link.breaking)
    assert road.lost == 2 and not link.breaking
    prefill.compute("t", [5, 6, 7], 10)
    assert decode.loaded("d") == set()


@pytest.mark.parametrize("when", ["asked", "answered"])
def test_a_stop_that_is_lost_is_asked_again_and_ends_no_other_push(
    pair: tuple[PushSide, PushSide], road: LossyRoad, when: str
) -> None:
    prefill, decode = pair
    for name, blocks in (("t", [1, 2, 3]), ("u", [4, 5, 6])):
        prefill.announce(name)
        decode.wants(name, over(road, prefill.sender(name)), blocks)
    decode.until(lambda: [push.agreed for push in list(decode.push._pushed.values())] == [True, True])
    road.lose(STOP, 2, when)
    decode.step(cancelled=["t"])
    assert decode.loaded("t") == set() and road.lost == 2  # the blocks are free
    for name in ("t", "u"):
        prefill.compute(name, [5, 6, 7], 10)
    assert decode.loaded("u") == set() and (decode.cache[:, 4] == 105).all() and not decode.cache[:, 1:4].any()


class Held:
    """Holds the first question back until it is let through: as one that waits in the network."""

    def __init__(self, prefill: PushSide, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: list[Want] = []
        self._want = prefill.push._pushes.want
        self._lock = prefill.push._lock
        monkeypatch.setattr(prefill.push._pushes, "want", self._answer)

    def _answer(self, want: Want) -> str:
        if not self.kept:
            self.kept.append(want)
            return ""
        return self._want(want)

    def let_through(self) -> str:
        with self._lock:
            return self._want(self.kept[0])


@pytest.mark.parametrize("announced", ["before", "after the late one", "between"])
def test_a_late_want_revives_nothing_that_was_stopped(
    pair: tuple[PushSide, PushSide], road: LossyRoad, announced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was lost from the reader's view, asked again, agreed to, and given up. Then it comes."""
    prefill, decode = pair
    meets(prefill, decode, road)
    pushes = prefill.push._pushes
    held = Held(prefill, monkeypatch)
    if announced == "before":
        prefill.announce("t")
    road.lose(WANT, 1, "answered")
    decode.wants("d", over(road, prefill.sender("t")), [1, 2, 3])
    decode.until(lambda: any(push.agreed for push in list(decode.push._pushed.values())))
    decode.step(cancelled=["d"])
    assert decode.loaded("d") == set()  # the blocks are free
    assert not decode.push._links[road.url].breaking  # by a question, and not by the connection's end
    decode.cache[...] = 1
    if announced == "between":
        prefill.announce("t")
    assert held.let_through()
    if announced == "after the late one":
        prefill.announce("t")
    prefill.compute("t", [5, 6, 7], 10)
    assert not pushes._by_transfer["t"].readers
    prefill.step(granted=["p-t"])
    assert prefill.freed() == {"p-t"}  # long before the lease
    assert (decode.cache == 1).all()


@pytest.mark.parametrize("answer", ["refused", "cancelled"])
def test_a_want_that_may_still_come_ends_the_connection_of_a_load_that_is_given_up(
    pair: tuple[PushSide, PushSide], road: LossyRoad, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody there has heard of it: there is nothing that could be stopped. Then it comes."""
    prefill, decode = pair
    meets(prefill, decode, road)
    prefill.announce("t")
    held = Held(prefill, monkeypatch)
    if answer == "refused":
        monkeypatch.setattr(held, "_want", lambda _: "too much is asked")
        road.lose(WANT, 1, "answered")
    else:
        road.lose(WANT, 1, "answered", lambda _: decode.step(cancelled=["d"]))
    decode.wants("d", over(road, prefill.sender("t")), [1, 2, 3])
    decode.loaded("d")
    decode.cache[...] = 1
    monkeypatch.undo()
    with prefill.push._lock:
        prefill.push._pushes.want(held.kept[0])
    prefill.compute("t", [5, 6, 7], 10)
    prefill.until(lambda: not prefill.push._pushes._by_transfer["t"].readers)
    assert (decode.cache == 1).all()


def test_a_reader_that_has_stopped_is_not_taken_for_one_that_asks_again(pair: tuple[PushSide, PushSide]) -> None:
    prefill, decode = pair
    pushes = prefill.push._pushes
    asked = want_of(decode, prefill.sender("t"), question="q", attempt=1)
    earlier, later = (msgspec.structs.replace(asked, attempt=attempt) for attempt in (0, 2))
    elsewhere = msgspec.structs.replace(later, peer_id="another connection")
    with prefill.push._lock:
        assert pushes.want(asked) == ""
        pushes.stop("t", 0, "someone")
        for late in (earlier, asked, later, elsewhere):
            assert pushes.want(late)
    prefill.announce("t")
    with prefill.push._lock:
        for late in (earlier, asked, later, elsewhere):
            assert pushes.want(late)
    prefill.announce("u")
    with prefill.push._lock:
        of_u = [msgspec.structs.replace(want, transfer_id="u") for want in (earlier, asked, later, elsewhere)]
        assert pushes.want(of_u[1]) == "" and pushes._by_transfer["u"].readers
        pushes.stop("u", 0, "someone")
        for late in of_u:
            assert pushes.want(late)
        assert not pushes._by_transfer["u"].readers


def test_only_the_same_question_is_asked_again(pair: tuple[PushSide, PushSide]) -> None:
    prefill, decode = pair
    pushes: Pushes = prefill.push._pushes
    asked = want_of(decode, prefill.sender("t"), question="q")
    others = [
        msgspec.structs.replace(asked, attempt=1, question="another's"),
        msgspec.structs.replace(asked, attempt=1, question=""),
        msgspec.structs.replace(asked, peer_id="another"),
    ]
    for announced in (False, True):
        if announced:
            prefill.announce("t")
        with prefill.push._lock:
            assert pushes.want(asked) == ("another request of the reader's has asked for it" if announced else "")
            for other in others:
                assert pushes.want(other) == "another request of the reader's has asked for it"
    before = len(pushes._early)
    with prefill.push._lock:
        assert pushes.want(msgspec.structs.replace(asked, question="q" * 1000, transfer_id="u"))
        assert pushes.want(msgspec.structs.replace(asked, attempt=-1, transfer_id="u"))
    assert len(pushes._early) == before


@pytest.mark.parametrize("kind", [LAYOUT, RELEASE, RENEW])
@pytest.mark.parametrize("when", ["asked", "answered"])
def test_questions_of_loads_that_are_read_are_asked_again(
    make: Callable[..., Any], kind: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = make("prefill", True, 100), make("decode", False)
    renewed: list[str] = []
    renew = prefill.worker._leases.renew

    def counted(name: str) -> bool:
        renewed.append(name)
        return bool(renew(name))

    monkeypatch.setattr(prefill.worker._leases, "renew", counted)
    with lossy_road(prefill.worker.url) as road:
        remote = prefill.remote("p", urls=(road.url,), peer_ids=(road.url,))
        prefill.step(expected=["p"], granted=["p"])
        road.lose(kind, 2, when)
        if kind == RENEW:
            with decode.worker._lock:
                decode.worker._perform(decode.worker._send_renewals(remote.servers()[0], ["p"]))
            decode.until(lambda: len(renewed) == (1 if when == "asked" else 3))
        decode.step(loads=[Load("d", remote, [1, 2, 3], 0, 10)])
        assert decode.loaded("d") == set() and road.lost == 2
        assert prefill.freed() == {"p"}
