# SPDX-License-Identifier: Apache-2.0
"""What becomes of requests whose blocks another worker pushes while it computes them: real channels, no engine."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kvferry.vllm.push_messages import Progress, Sender
from kvferry.vllm.scheduler import Step
from push_sides import PushSide, each_pair, pair
from vllm_sides import BLOCKS, LAYERS, changing


def test_each_layer_is_pushed_as_soon_as_it_is_computed(pair: tuple[PushSide, PushSide]) -> None:
    prefill, decode = pair
    assert not decode.worker.url
    prefill.announce("t")
    decode.wants("d", prefill.sender("t"), [1, 2, 0])
    orders = Step(progress=[Progress("p-t", [5, 6], 7)])  # one block, and a part of the next one
    prefill.until(lambda: len(prefill.push._pushes._by_transfer["t"].readers) == 1)
    prefill.worker.begin(orders)
    prefill.push.layer_computed("layer 0")
    decode.until(lambda: bool((decode.cache[0, 1] == 105).all()))
    assert not decode.cache[1].any() and not decode.cache[0, 2:].any()
    prefill.push.layer_computed("layer 1")
    prefill.push.step_computed()
    decode.until(lambda: bool((decode.cache[1, 1] == 105).all()))
    assert decode.worker.finished() == (set(), set())
    prefill.compute("t", [7], 10)
    assert decode.loaded("d") == set()
    assert (decode.cache[:, 2] == 106).all() and (decode.cache[:, 0] == 107).all() and not decode.cache[:, 3:].any()
    assert prefill.worker.finished() == (set(), set())  # it hasn't finished there
    prefill.step(granted=["p-t"])
    assert prefill.freed() == {"p-t"}


@pytest.mark.parametrize("transport", ["shm", "auto"])
def test_other_transports(make: Callable[..., Any], transport: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kvferry.vllm")
    prefill = make("prefill", True, 100, kind=PushSide, transport=transport)
    decode = make("decode", False, kind=PushSide, transport=transport)
    prefill.announce("t")
    decode.wants("d", prefill.sender("t"), [1, 2, 3])
    prefill.compute("t", [5, 6, 7], 10)
    assert decode.loaded("d") == set() and (decode.cache[:, 1] == 105).all()
    assert f"connected to {prefill.worker.url}: " in caplog.text


@pytest.mark.parametrize("when", ["before it is announced", "before it is computed", "when it is computed", "finished"])
def test_a_reader_may_come_at_any_time(pair: tuple[PushSide, PushSide], when: str) -> None:
    prefill, decode = pair
    asking = [False]

    def now(moment: str) -> None:
        if moment == when:
            decode.wants("d", prefill.sender("t"), [2, 3], 4)  # the first block is there
            asking[0] = True
            counted = prefill.push._pushes
            prefill.until(lambda: bool(counted._early) or any(push.asked for push in counted._by_transfer.values()))

    now("before it is announced")
    prefill.announce("t")
    now("before it is computed")
    prefill.compute("t", [5, 6], 8)
    prefill.compute("t", [7], 10)
    now("when it is computed")
    prefill.step(granted=["p-t"])
    now("finished")
    assert decode.loaded("d") == set() and prefill.freed() == {"p-t"}
    assert (decode.cache[:, 2] == 106).all() and (decode.cache[:, 3] == 107).all() and not decode.cache[:, :2].any()


@pytest.mark.parametrize("theirs,ours", [(4, 8), (8, 4), (4, 6)])
def test_blocks_of_different_sizes(make: Callable[..., Any], theirs: int, ours: int) -> None:
    size = 16  # bytes of a token
    prefill = make("prefill", True, kind=PushSide, tokens=theirs, block=theirs * size)
    decode = make("decode", False, kind=PushSide, tokens=ours, block=ours * size)
    prefill.cache[...] = np.random.default_rng(1).integers(1, 255, prefill.cache.shape)
    ids = [9, 3, 7, 11, 2, 6]
    tokens = [prefill.cache[:, block].reshape(LAYERS, theirs, size) for block in ids]
    wanted = np.concatenate(tokens, axis=1)[:, :21]
    prefill.announce("t", num_tokens=21)
    blocks = [4, 1, 8, 5, 13, 10]
    decode.wants("d", prefill.sender("t", num_tokens=21), blocks)
    for end in (5, 6, 13, 20, 21):  # as if prompts were computed in chunks
        before = -(-{5: 0, 6: 5, 13: 6, 20: 13, 21: 20}[end] // theirs)
        prefill.compute("t", ids[before : -(-end // theirs)], end)
    assert decode.loaded("d") == set()
    found = np.concatenate([decode.cache[:, block].reshape(LAYERS, ours, size) for block in blocks], axis=1)
    assert (found[:, :21] == wanted).all()


@pytest.mark.parametrize("senders,receivers", [(2, 1), (1, 2), (2, 2)])
def test_different_tensor_parallelism(make: Callable[..., Any], senders: int, receivers: int) -> None:
    def side(name: str, serving: bool, rank: int, size: int) -> Any:
        return make(
            name, serving, kind=PushSide, heads=2 // size, total_heads=2, tp_size=size, tp_rank=rank, block=128 // size
        )

    prefills = [side("prefill", True, rank, senders) for rank in range(senders)]
    decodes = [side("decode", False, rank, receivers) for rank in range(receivers)]
    whole = np.random.default_rng(2).integers(1, 255, (LAYERS, BLOCKS, 2, 64), dtype=np.uint8)
    for rank, prefill in enumerate(prefills):
        shape = prefill.cache.reshape(LAYERS, BLOCKS, 2 // senders, 64).shape
        prefill.cache[...] = whole[:, :, rank * shape[2] : (rank + 1) * shape[2]].reshape(prefill.cache.shape)
        prefill.announce("t")
    sender = prefills[0].sender("t", *prefills[1:])
    for decode in decodes:
        decode.wants("d", sender, [1, 2, 3])
    for prefill in prefills:
        prefill.compute("t", [5, 6, 7], 10)
        prefill.step(granted=["p-t"])
    for rank, decode in enumerate(decodes):
        assert decode.loaded("d") == set()
        heads = 2 // receivers
        found = decode.cache[:, 1:4].reshape(LAYERS, 3, heads, 64)
        kept = whole[:, 5:8, rank * heads : (rank + 1) * heads]
        assert (found[:, :2] == kept[:, :2]).all() and (found[:, 2, :, :32] == kept[:, 2, :, :32]).all()
    for prefill in prefills:
        assert prefill.freed() == {"p-t"}


@pytest.mark.parametrize("how", ["preempted", "forgotten", "lease"])
@pytest.mark.parametrize("transport", ["tcp", "shm", "auto"])
def test_a_prefill_whose_blocks_are_no_longer_its_own(make: Callable[..., Any], how: str, transport: str) -> None:
    lease = 1e-9 if how == "lease" else 30.0
    prefill = make("prefill", True, 100, kind=PushSide, lease=lease, transport=transport)
    decode = make("decode", False, kind=PushSide, transport=transport)
    prefill.announce("t")
    decode.wants("d", prefill.sender("t"), [1, 2, 3])
    prefill.until(lambda: bool(prefill.push._pushes._by_transfer["t"].readers))
    prefill.compute("t", [5, 6], 8)
    if how == "lease":  # it was granted, although it isn't computed: a fault of the engine's, say
        prefill.step(granted=["p-t"])
        assert prefill.freed() == {"p-t"}
    else:
        prefill.step(**{how: ["p-t"]})
    prefill.compute("t", [7], 10)
    assert decode.loaded("d") == {1, 2, 3}
    assert not prefill.push._pushes._by_transfer and len(prefill.worker._leases) == 0


@pytest.mark.parametrize("how", ["preempted", "forgotten"])
@pytest.mark.parametrize("told", ["as the step begins", "before that"])
def test_blocks_that_a_request_has_lost_are_not_pushed_with_what_the_next_step_computes(
    pair: tuple[PushSide, PushSide], how: str, told: str
) -> None:
    """All of it was computed, and not all of it pushed. vLLM starts loads after the layers of a step: that is too late."""
    prefill, decode = pair
    prefill.announce("t")
    decode.wants("d", prefill.sender("t"), [1, 2, 3])
    pushes, held = prefill.push._pushes, threading.Event()
    prefill.until(lambda: bool(pushes._by_transfer["t"].readers))
    prefill.push._runner._planner.submit(held.wait, 60)
    prefill.compute("t", [5, 6, 7], 10)
    orders = Step(preempted=["p-t"]) if how == "preempted" else Step(forgotten=["p-t"])
    (prefill.push.lost if told == "before that" else prefill.worker.begin)(orders)
    prefill.cache[...] = 1
    held.set()
    prefill.until(lambda: "t" not in pushes._by_transfer or not pushes._by_transfer["t"].readers)
    prefill.worker.step(orders)
    assert decode.loaded("d") == {1, 2, 3}


def test_a_cancelled_push_ends_and_nothing_lands_any_more(each_pair: tuple[PushSide, PushSide]) -> None:
    prefill, decode = each_pair
    for turn in range(40):
        name = f"t{turn}"
        prefill.announce(name)
        decode.wants("d", prefill.sender(name), [1, 2, 3])
        if turn % 4:
            prefill.compute(name, [5, 6], 8)
            time.sleep(0.0005 * (turn % 5))
        decode.step(cancelled=["d"])
        computing = threading.Thread(target=prefill.compute, args=(name, [7] if turn % 4 else [5, 6, 7], 10))
        computing.start()
        assert decode.loaded("d") == set()  # the blocks are free, whatever they have
        decode.cache[...] = 1
        computing.join()
        prefill.step(granted=[f"p-{name}"])
        assert prefill.freed() == {f"p-{name}"}  # long before the lease
        assert (decode.cache == 1).all(), turn


@pytest.mark.parametrize("when", ["waiting", "before it comes"])
def test_what_is_not_wanted_is_let_go(pair: tuple[PushSide, PushSide], when: str) -> None:
    prefill, decode = pair
    if when == "waiting":
        prefill.announce("t")
    decode.step(released=[("d", prefill.sender("t"))])
    if when != "waiting":
        prefill.until(lambda: bool(prefill.push._pushes._early))
        prefill.announce("t")
    prefill.compute("t", [5, 6, 7], 10)
    prefill.step(granted=["p-t"])
    assert prefill.freed() == {"p-t"} and not decode.cache.any()


def test_each_block_fails_by_itself(make: Callable[..., Any]) -> None:
    """One changes while it is pushed, which checksums show."""
    large = 1 << 20
    prefill = make("prefill", True, 100, kind=PushSide, block=large)
    decode = make("decode", False, kind=PushSide, checksums=True, block=large)
    until = time.monotonic() + 60
    failed: set[int] = set()
    with changing(prefill.cache[1, 6]):
        for turn in itertools.count():
            assert time.monotonic() < until
            prefill.announce(f"t{turn}")
            decode.wants("d", prefill.sender(f"t{turn}"), [1, 2, 3])
            prefill.compute(f"t{turn}", [5, 6, 7], 10)
            failed = decode.loaded("d")
            if failed:
                break
    assert failed == {2}
    assert (decode.cache[:, 1] == 105).all() and (decode.cache[:, 3] == 107).all()


def test_a_load_from_workers_without_its_heads_fails(make: Callable[..., Any]) -> None:
    decode = make("decode", False, kind=PushSide, tp_size=4, tp_rank=3, total_heads=4)
    urls = tuple(f"tcp://127.0.0.1:{port}" for port in (1, 2, 3))
    decode.wants("d", Sender("t", urls, urls, "of a prompt", 10, 30.0), [1, 2, 3])
    assert decode.loaded("d") == {1, 2, 3}


def test_many_at_once(pair: tuple[PushSide, PushSide]) -> None:
    prefill, decode = pair
    names = [f"t{number}" for number in range(200)]
    for name in names:
        decode.wants(name, prefill.sender(name), [1, 2, 3])
        prefill.announce(name)
    for name in names:
        prefill.compute(name, [5, 6, 7], 10)
        prefill.step(granted=[f"p-{name}"])
    received: set[str] = set()
    freed: set[str] = set()

    def all_ended() -> bool:
        received.update(decode.worker.finished()[1])
        freed.update(prefill.worker.finished()[0])
        return len(received) == len(freed) == len(names)

    decode.until(all_ended)
    assert decode.worker.failed_blocks() == set() and (decode.cache[:, 1] == 105).all()
