# SPDX-License-Identifier: Apache-2.0
"""What a prefilling worker that pushes takes from others, and what it doesn't."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from kvferry.vllm import early_wants, pushes
from kvferry.vllm.early_wants import EarlyWants
from kvferry.vllm.options import Options
from kvferry.vllm.push_messages import Announced, Ended, Sender
from kvferry.vllm.push_worker import PushWorker
from kvferry.vllm.pushes import _Reader
from push_sides import PushSide, pair, want_of
from vllm_sides import LAYERS


def test_a_worker_that_listens_offers_nothing_for_writing(pair: tuple[PushSide, PushSide]) -> None:
    """Else who has lost the connection to it connects anew, and writes into blocks that are free."""
    layout = pair[0].worker._layout
    with pytest.raises(ValueError, match="listens"):
        PushWorker(Options(mode="push"), "both", layout, [], True, True)


@pytest.mark.parametrize("other", ["prompt", "number of tokens", "rank", "transfer"])
def test_pushes_that_are_refused(make: Callable[..., Any], other: str) -> None:
    prefill = make("prefill", True, 100, kind=PushSide, tp_size=2 if other == "rank" else 1)
    decode = make("decode", False, kind=PushSide)
    prefill.announce("t")
    prefill.compute("t", [5, 6, 7], 10)
    changes: dict[str, dict[str, Any]] = {
        "prompt": {"prompt_digest": "of another"}, "number of tokens": {"num_tokens": 9},
    }  # fmt: skip
    changed = changes.get(other, {})
    if other == "transfer":  # it has been aborted
        prefill.step(forgotten=["p-t"])
    decode.wants("d", prefill.sender("t", **changed), [1, 2, 3])
    assert decode.loaded("d") == {1, 2, 3} and not decode.cache.any()


def test_the_first_of_two_requests_with_one_transfer_has_it(
    pair: tuple[PushSide, PushSide], make: Callable[..., Any]
) -> None:
    prefill, decode = pair
    other = make("decode", False, kind=PushSide)
    prefill.announce("t")
    sender = prefill.sender("t")
    decode.wants("d", sender, [1, 2, 3])
    prefill.until(lambda: bool(prefill.push._pushes._by_transfer["t"].asked))
    decode.wants("e", sender, [4, 5, 6])
    other.wants("f", sender, [1, 2, 3])
    assert decode.loaded("e") == {4, 5, 6} and other.loaded("f") == {1, 2, 3}
    prefill.compute("t", [5, 6, 7], 10)
    assert decode.loaded("d") == set() and not decode.cache[:, 4:7].any()


@pytest.mark.parametrize("first", ["the former", "the later"])
@pytest.mark.parametrize("ending", ["forgotten", "granted", "preempted"])
def test_a_transfer_that_is_known_is_not_pushed_again(
    pair: tuple[PushSide, PushSide], first: str, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither order in which the two requests end harms the engine, or the other one."""
    prefill, decode = pair
    prefill.announce("t")
    prefill.announce("t", request_id="again")
    assert "request again is not pushed" in caplog.text
    decode.wants("d", prefill.sender("t"), [1, 2, 3])
    prefill.until(lambda: bool(prefill.push._pushes._by_transfer["t"].readers))
    if first == "the later":
        prefill.step(**{ending: ["again"]})
        if ending == "granted":
            assert prefill.freed() == {"again"}  # long before the lease
        prefill.compute("t", [5, 6, 7], 10)
        assert decode.loaded("d") == set() and (decode.cache[:, 1] == 105).all()
        prefill.step(granted=["p-t"])
        assert prefill.freed() == {"p-t"}
    else:
        prefill.step(forgotten=["p-t"], announced=[Announced("in the same step", "t", "of a prompt", 10)])
        assert decode.loaded("d") == {1, 2, 3}
        prefill.step(**{ending: ["again", "in the same step"]})
    prefill.announce("t", request_id="and again")
    assert prefill.worker.finished()[1] == set() and not prefill.push._pushes._by_transfer
    assert not prefill.push._pushes._by_request


@pytest.mark.parametrize("early", [True, False])
def test_only_the_reader_itself_ends_a_push(pair: tuple[PushSide, PushSide], early: bool) -> None:
    prefill, decode = pair
    pushes, asked = prefill.push._pushes, [False]

    def stop() -> None:
        prefill.until(lambda: bool(pushes._early) or bool(pushes._by_transfer and pushes._by_transfer["t"].readers))
        with prefill.push._lock:
            pushes.stop("t", 0, "another")
        asked[0] = True

    if not early:
        prefill.announce("t")
    decode.wants("d", prefill.sender("t"), [1, 2, 3])
    stop()
    if early:
        prefill.announce("t")
    prefill.compute("t", [5, 6, 7], 10)
    assert decode.loaded("d") == set() and asked[0]


WRONG_LAYOUTS: dict[str, Any] = {
    "block_tokens": 0, "blocks_per_id": 0, "num_blocks": -1, "run_tokens": 3, "layers": (), "fields": (),
    "heads": 0, "tp_size": 0, "head_stride": -1,
}  # fmt: skip
WRONG_WANTS: dict[str, Any] = {
    "first_token": 2, "num_tokens": 0, "block_ids": (1, 2), "reader": -1, "readers": 4096, "transfer_id": "",
}  # fmt: skip


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("name", [*WRONG_LAYOUTS, *WRONG_WANTS])
def test_wants_that_make_no_sense(pair: tuple[PushSide, PushSide], name: str, announced: bool) -> None:
    prefill, decode = pair
    if announced:
        prefill.announce("t")
    want = want_of(decode, prefill.sender("t"))
    if name in WRONG_WANTS:
        want = msgspec.structs.replace(want, **{name: WRONG_WANTS[name]})
    else:
        want = msgspec.structs.replace(want, layout=replace(want.layout, **{name: WRONG_LAYOUTS[name]}))
    with prefill.push._lock:
        assert prefill.push._pushes.want(want)
    if not announced:
        prefill.announce("t")
    assert not prefill.push._pushes._by_transfer["t"].readers
    prefill.compute("t", [5, 6, 7], 10)


def test_a_reader_that_cannot_be_served_fails_alone(
    pair: tuple[PushSide, PushSide], make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = pair
    prefill.announce("t")
    prefill.announce("u")
    decode.wants("d", prefill.sender("t"), [1, 2, 3])
    other = make("decode", False, kind=PushSide)
    other.wants("e", prefill.sender("u"), [1, 2, 3])
    transfers = prefill.push._pushes._by_transfer
    prefill.until(lambda: all(push.readers for push in transfers.values()))
    reader, unit = transfers["t"].readers[0], _Reader.unit.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(_Reader, "unit", property(lambda one: 1 // 0 if one is reader else unit(one)))
    prefill.compute("t", [5, 6], 8)
    assert decode.loaded("d") == {1, 2, 3}
    prefill.compute("u", [5, 6, 7], 10)
    assert other.loaded("e") == set()


@pytest.mark.parametrize("late", [True, False])
def test_more_ranges_than_are_worth_it(
    pair: tuple[PushSide, PushSide], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of all layers and steps count together, whenever the reader comes."""
    monkeypatch.setattr(pushes, "MAX_ROWS", LAYERS * 2)
    prefill, decode = pair
    prefill.announce("t")
    prefill.announce("u", num_tokens=8)
    if late:
        prefill.compute("t", [5, 6, 7], 10)
        prefill.compute("u", [5, 6], 8)
    decode.wants("d", prefill.sender("t"), [1, 2, 3])
    if not late:
        prefill.until(lambda: bool(prefill.push._pushes._by_transfer["t"].readers))
        prefill.compute("t", [5], 4)
    assert decode.loaded("d") == {1, 2, 3} and not decode.cache.any()
    decode.wants("e", prefill.sender("u", num_tokens=8), [1, 2])
    if not late:
        prefill.compute("u", [5, 6], 8)
    assert decode.loaded("e") == set()


def test_early_questions_are_bounded(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    decode = make("decode", False, kind=PushSide)
    now = [0.0]
    early = EarlyWants(30.0, lambda: now[0])
    sender = Sender("t", ("tcp://h:1",), ("tcp://h:1",), "of a prompt", 10, 30.0)
    want = want_of(decode, sender)
    assert early.add(want) == "" and all(early.add(want) for _ in range(100))
    taken = early._bytes
    monkeypatch.setattr(early_wants, "MOST_BYTES", 4 * taken)
    early.stop("t", 0, "another")
    assert early._bytes == taken
    now[0] = 1.0
    refused = [early.add(msgspec.structs.replace(want, transfer_id=f"{number:03}")) for number in range(100)]
    assert refused.count("") in (2, 3) and early._bytes <= 4 * taken
    assert early.take("000") and not early.take("000")
    early.stop("t", 0, "someone")
    now[0] = 30.0
    [[name, [nothing]]] = early.take_old()
    assert name == "t" and nothing.heads.num_heads == 0
    now[0] = 31.0
    assert len(early.take_old()) + 2 == refused.count("") + 1
    assert early._bytes == 0 and not early


@pytest.mark.parametrize("early", [True, False])
def test_who_asked_for_a_request_that_is_refused_is_told(pair: tuple[PushSide, PushSide], early: bool) -> None:
    prefill, decode = pair
    if early:
        decode.wants("d", prefill.sender("t"), [1, 2, 3])
        prefill.until(lambda: bool(prefill.push._pushes._early))
    prefill.step(refused=[("t", "its prompt is of another kind")])
    if not early:
        decode.wants("d", prefill.sender("t"), [1, 2, 3])
    assert decode.loaded("d") == {1, 2, 3}


def test_who_asked_for_a_request_that_does_not_come_is_told(make: Callable[..., Any]) -> None:
    """Also who doesn't ask again. A request that comes later is not pushed to nobody for a lease."""
    prefill, decode = make("prefill", True, 100, kind=PushSide, lease=0.3), make("decode", False, kind=PushSide)
    decode.wants("d", prefill.sender("t"), [1, 2, 3])  # no renewals
    prefill.until(lambda: bool(prefill.push._pushes._early))
    received: set[str] = set()

    def told() -> bool:
        prefill.worker.finished()
        received.update(decode.worker.finished()[1])
        return bool(received)

    decode.until(told)
    assert decode.worker.failed_blocks() == {1, 2, 3}
    prefill.announce("t")
    prefill.compute("t", [5, 6, 7], 10)
    prefill.step(granted=["p-t"])
    assert prefill.freed() == {"p-t"} and prefill.worker._leases.expired == 0


@pytest.mark.parametrize("failed", [(3,), (-1,), (0, 1 << 40)])
def test_a_last_word_on_blocks_that_nobody_wanted_makes_no_other_count(
    pair: tuple[PushSide, PushSide], failed: tuple[int, ...]
) -> None:
    prefill, decode = pair
    prefill.announce("t")
    decode.wants("d", prefill.sender("t"), [1, 2, 3])
    pushes = prefill.push._pushes
    prefill.until(lambda: bool(pushes._by_transfer["t"].readers))
    with prefill.push._lock:
        want = pushes._by_transfer["t"].readers[0].want
        prefill.push._perform(pushes._tell(want, Ended(transfer_id="t", failed=failed, reason="")))
    assert decode.loaded("d") == {1, 2, 3}
