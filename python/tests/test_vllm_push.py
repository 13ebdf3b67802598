# SPDX-License-Identifier: Apache-2.0
"""What becomes of requests whose blocks another worker pushes while it computes them: real channels, no engine."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvferry
import msgspec
import numpy as np
import pytest
from kvferry import Operation, TransferError
from kvferry.vllm import early_wants, pushes
from kvferry.vllm.early_wants import EarlyWants
from kvferry.vllm.layout import HeadSource
from kvferry.vllm.messages import RENEW, message, parse
from kvferry.vllm.options import Options
from kvferry.vllm.push_messages import WANT, Announced, Progress, Sender, Want
from kvferry.vllm.push_scheduler import PushScheduler
from kvferry.vllm.push_worker import PushWorker, _Link
from kvferry.vllm.pushes import _Reader
from kvferry.vllm.scheduler import Load, Step
from kvferry.vllm.steps import Signal
from vllm_sides import BLOCKS, LAYERS, TOKENS, Blocks, Output, Request, Side, Status, changing, example

TO_DECODE = {"do_remote_prefill": True, "transfer_id": "t", "remote_urls": ["tcp://h:1"]}
TO_PREFILL = {"do_remote_decode": True, "transfer_id": "t"}


class PushSide(Side):
    """A worker of either kind."""

    make = PushWorker

    def sender(self, transfer_id: str, *others: Side, **changed: Any) -> Sender:
        """What a decoding worker is told of a transfer from here, and from others of this instance."""
        urls = tuple(side.worker.url for side in (self, *others))
        made = {"prompt_digest": "of a prompt", "num_tokens": 10, "lease": 30.0, **changed}
        return Sender(transfer_id, urls, urls, **made)

    def announce(self, name: str, **changed: Any) -> None:
        self.step(announced=[Announced(**{"request_id": f"p-{name}", "transfer_id": name,
                                          "prompt_digest": "of a prompt", "num_tokens": 10, **changed})])  # fmt: skip

    def compute(self, name: str, blocks: list[int], tokens: int) -> None:
        """A step of the engine's."""
        orders = Step(progress=[Progress(f"p-{name}", blocks, tokens)])
        self.worker.begin(orders)
        for layer in range(LAYERS):
            self.push.layer_computed(f"layer {layer}")
        self.push.step_computed()
        self.worker.step(orders)

    @property
    def push(self) -> PushWorker:
        assert isinstance(self.worker, PushWorker)
        return self.worker

    def wants(self, name: str, sender: Sender, blocks: list[int], first: int = 0) -> None:
        self.step(loads=[Load(name, sender, blocks, first, sender.num_tokens)])


@pytest.fixture
def pair(make: Callable[..., Any]) -> tuple[PushSide, PushSide]:
    return make("prefill", True, 100, kind=PushSide), make("decode", False, kind=PushSide)


def schedulers() -> tuple[PushScheduler, PushScheduler]:
    """Of a prefilling and of a decoding instance."""
    return PushScheduler(Options(mode="push"), TOKENS, True), PushScheduler(Options(mode="push"), TOKENS, False)


def scheduled(
    new: dict[str, Any] | None = None, known: dict[str, Any] | None = None, preempted: set[str] | None = None,
    tokens: dict[str, int] | None = None,
) -> Any:  # fmt: skip
    """What vLLM's scheduler hands over: blocks and computed tokens by request."""
    fresh = [
        SimpleNamespace(req_id=name, block_ids=(ids,), num_computed_tokens=n) for name, (ids, n) in (new or {}).items()
    ]
    cached = SimpleNamespace(
        req_ids=list(known or {}),
        new_block_ids=[None if ids is None else (ids,) for ids, _ in (known or {}).values()],
        num_computed_tokens=[computed for _, computed in (known or {}).values()],
    )
    return SimpleNamespace(
        scheduled_new_reqs=fresh, scheduled_cached_reqs=cached, preempted_req_ids=preempted,
        num_scheduled_tokens=tokens or {},
    )  # fmt: skip


def test_the_scheduler_of_a_prefilling_instance() -> None:
    prefill, _ = schedulers()
    request = Request("p", TO_PREFILL)
    prefill.on_new_request(request)
    step = prefill.next_step(scheduled(new={"p": ([5, 6], 4), "other": ([1], 0)}, tokens={"p": 4, "other": 3}))
    [announced] = step.announced
    assert (announced.request_id, announced.transfer_id, announced.num_tokens) == ("p", "t", 10)
    assert step.progress == [Progress("p", [5, 6], 8)]
    prefill.update_state_after_alloc(request, Blocks([5, 6]), 0)
    step = prefill.next_step(scheduled(known={"p": ([7], 8)}, tokens={"p": 2}))
    assert step == Step(progress=[Progress("p", [7], 10)])
    assert prefill.next_step(scheduled(known={"p": (None, 10)}, tokens={"p": 1})) == Step(
        progress=[Progress("p", [], 11)]
    )
    assert prefill.request_finished(request, [5, 6, 7]) == (True, None)
    assert prefill.next_step(scheduled()) == Step(granted=["p"])
    assert prefill.request_finished(request, [5, 6, 7]) == (False, None)


@pytest.mark.parametrize("how", ["aborted", "preempted", "not computed"])
def test_a_request_that_is_not_computed_in_one_go_is_not_pushed(how: str) -> None:
    prefill, _ = schedulers()
    request = Request("p", TO_PREFILL, status=Status.FINISHED_ABORTED if how == "aborted" else Status.FINISHED_STOPPED)
    request.num_computed_tokens = 9 if how == "not computed" else 10
    prefill.on_new_request(request)
    prefill.next_step(scheduled(new={"p": ([5, 6, 7], 0)}, tokens={"p": 10}))
    if how == "preempted":
        assert prefill.next_step(scheduled(preempted={"p", "other"})) == Step(preempted=["p"])
        assert prefill.next_step(scheduled(new={"p": ([1], 0)}, tokens={"p": 4})) == Step()
    assert prefill.request_finished(request, [5, 6, 7]) == (False, None)
    assert prefill.next_step(scheduled()) == Step(forgotten=[] if how == "preempted" else ["p"])


def test_what_cannot_be_pushed() -> None:
    prefill, decode = schedulers()
    prefill.on_new_request(Request("first", TO_PREFILL))
    assert len(prefill.next_step(scheduled()).announced) == 1
    for wrong in (
        TO_PREFILL,
        {"do_remote_decode": True},
        {**TO_PREFILL, "transfer_id": 7},
        {**TO_PREFILL, "transfer_id": ""},
    ):
        request = Request("p", wrong)
        prefill.on_new_request(request)
        prefill.update_state_after_alloc(request, Blocks([5]), 0)
        assert prefill.request_finished(request, [5]) == (False, None)
    prefill.on_new_request(Request("p", {**TO_PREFILL, "transfer_id": "u"}, prompt_token_ids=None))
    assert prefill.next_step(scheduled()) == Step(refused=[("u", "prompts that are embeddings are not handed over")])
    changes: list[dict[str, Any]] = [
        {"transfer_id": None}, {"remote_urls": None}, {"remote_urls": []}, {"remote_urls": [1]},
        {"remote_peer_ids": ["a", "b"]}, {"remote_urls": ["\ud800"]}, {"transfer_id": "a\n"},
        {"remote_urls": ["u"] * 1025},
    ]  # fmt: skip
    for change in changes:
        request = Request("d", {**TO_DECODE, **change})
        decode.on_new_request(request)
        assert decode.get_num_new_matched_tokens(request, 0) == (0, False), change
    allowed = PushScheduler(Options(mode="push", allowed_hosts=("10.0.0.0/8",)), TOKENS, False)
    request = Request("d", dict(TO_DECODE))
    allowed.on_new_request(request)
    assert allowed.get_num_new_matched_tokens(request, 0) == (0, False)


def test_the_scheduler_of_a_decoding_instance() -> None:
    prefill, decode = schedulers()
    prefill.on_new_request(Request("p", TO_PREFILL))
    [announced] = prefill.next_step(scheduled()).announced
    request = Request("d", dict(TO_DECODE))
    decode.on_new_request(request)
    sender = Sender("t", ("tcp://h:1",), ("tcp://h:1",), announced.prompt_digest, 10, 30.0)
    assert decode.get_num_new_matched_tokens(request, 4) == (6, True)
    decode.update_state_after_alloc(request, Blocks([9, 2, 3]), 6)
    assert decode.next_step(scheduled()) == Step(waiting=[("d", sender)], loads=[Load("d", sender, [2, 3], 4, 10)])
    assert decode.get_num_new_matched_tokens(request, 0) == (0, False)  # what failed is computed
    decode.update_connector_output(Output({"d"}))
    assert decode.request_finished(request, [9, 2, 3]) == (False, None)
    assert decode.next_step(scheduled()) == Step()


def test_options_of_instances_that_push() -> None:
    assert Options.from_config({"mode": "push"}).mode == "push"
    for extra, match in (({"mode": "shove"}, "'pull' or 'push'"), ({"mode": "push", "id": "a"}, "there is no id")):
        with pytest.raises(ValueError, match=match):
            Options.from_config(extra)


@pytest.mark.parametrize(
    ("extra", "is_taken"),
    [
        ({}, False), ({"allowed_hosts": ["10.1.0.0/16"]}, False), ({"allowed_hosts": ["h"]}, True),
        ({"channel_options": {"keyring": "k"}}, True),
        ({"allowed_hosts": ["g"], "channel_options": {"keyring": "k"}}, False),
    ],
    ids=str,
)  # fmt: skip
def test_who_is_connected_to_writes_so_it_is_not_anybody(extra: dict[str, Any], is_taken: bool) -> None:
    decode = PushScheduler(Options.from_config({"mode": "push", **extra}), TOKENS, False)
    request = Request("d", dict(TO_DECODE))
    decode.on_new_request(request)
    assert decode.get_num_new_matched_tokens(request, 0) == ((10, True) if is_taken else (0, False))
    if not extra:
        for number, url in enumerate(("tcp://127.0.0.1:1", "tcp://[::1]:1", "tcp://localhost:1")):
            request = Request(str(number), {**TO_DECODE, "remote_urls": [url]})
            decode.on_new_request(request)
            assert decode.get_num_new_matched_tokens(request, 0) == (10, True)


def test_transfers_that_the_router_has_sealed(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"sixteen or more bytes\n")
    file.chmod(0o600)
    decode = PushScheduler(Options.from_config({"mode": "push", "secret_file": str(file)}), TOKENS, False)
    _, params = example("bodies").pushed({}, "t", ["tcp://h:1", "tcp://h:2"], b"sixteen or more bytes")
    changes: list[dict[str, Any]] = [
        {}, {"transfer_id": "u"}, {"remote_urls": ["tcp://h:1", "tcp://evil:2"]}, {"remote_seal": None},
        {"remote_peer_ids": ["a", "b"]}, {"remote_seal": "\ud800"}, {"remote_urls": ["tcp://h:1"]},
    ]  # fmt: skip
    for number, change in enumerate(changes):
        request = Request(str(number), {**params, **change})
        decode.on_new_request(request)
        assert decode.get_num_new_matched_tokens(request, 0) == ((0, False) if change else (10, True)), change


@pytest.mark.parametrize(
    ("port", "role", "match"),
    [
        (7100, (True, True), "not 'kv_both'"), (0, (True, False), "has a port"),
        (7100, (True, False, 2), "data_parallel_size"),
    ],
)  # fmt: skip
def test_roles_that_instances_that_push_cannot_have(port: int, role: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Options(mode="push", port=port).check_role(*role)
    Options(mode="push", port=7100).check_role(True, False)
    Options(mode="push").check_role(False, True, 2)
    Options(port=port).check_role(*role)


def test_a_worker_that_listens_offers_nothing_for_writing(pair: tuple[PushSide, PushSide]) -> None:
    """Else who has lost the connection to it connects anew, and writes into blocks that are free."""
    layout = pair[0].worker._layout
    with pytest.raises(ValueError, match="listens"):
        PushWorker(Options(mode="push"), "both", layout, [], True, True)


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


def test_who_does_not_push_keeps_no_blocks_and_who_does_takes_none() -> None:
    prefill, decode = schedulers()
    request = Request("d", dict(TO_PREFILL))
    decode.on_new_request(request)
    assert decode.request_finished(request, [5, 6, 7]) == (False, None)
    assert decode.next_step(scheduled()) == Step()
    request = Request("p", dict(TO_DECODE))
    prefill.on_new_request(request)
    assert prefill.get_num_new_matched_tokens(request, 0) == (0, False)
    assert prefill.next_step(scheduled()) == Step()


def test_a_scheduler_names_a_transfer_once() -> None:
    prefill, _ = schedulers()
    first = Request("first", TO_PREFILL)
    prefill.on_new_request(first)
    assert prefill.request_finished(first, [5, 6, 7]) == (True, None)
    prefill.next_step(scheduled())
    prefill.on_new_request(Request("second", TO_PREFILL))
    assert prefill.next_step(scheduled()) == Step()


def want_of(decode: PushSide, sender: Sender, **changed: Any) -> Want:
    """What a decoding worker asks."""
    worker = decode.push
    load = Load("d", sender, [1, 2, 3], 0, 10)
    made = worker._wanted(load, HeadSource(0, 0, 0, 1), sender.servers()[0], 1, _Link("someone"))
    return msgspec.structs.replace(msgspec.convert(parse(made)["want"], Want), **changed)


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


@pytest.mark.parametrize("how", ["preempted", "forgotten", "lease"])
def test_a_prefill_whose_blocks_are_no_longer_its_own(make: Callable[..., Any], how: str) -> None:
    prefill = make("prefill", True, 100, kind=PushSide, lease=1e-9 if how == "lease" else 30.0)
    decode = make("decode", False, kind=PushSide)
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


def test_a_request_that_never_comes_is_waited_for_no_longer_than_a_lease(make: Callable[..., Any]) -> None:
    prefill = make("prefill", True, 100, kind=PushSide, lease=0.5)
    decode = make("decode", False, kind=PushSide)
    sender = prefill.sender("t")
    decode.step(waiting=[("d", sender)], loads=[Load("d", sender, [1, 2, 3], 0, 10)])
    assert decode.loaded("d") == {1, 2, 3} and not prefill.push._pushes._early


def test_a_cancelled_push_ends_and_nothing_lands_any_more(pair: tuple[PushSide, PushSide]) -> None:
    prefill, decode = pair
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


def test_a_peer_that_does_not_answer_pushes_nothing_into_blocks_that_are_free(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = make("prefill", True, 100, kind=PushSide)
    decode = make("decode", False, kind=PushSide, timeout=1.0, lease=1.0)
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
        assert decode.loaded("d") == set()  # after a second, by the end of the connection
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


def test_a_prefilling_worker_that_dies_and_its_successor(
    pair: tuple[PushSide, PushSide], make: Callable[..., Any]
) -> None:
    prefill, decode = pair
    prefill.announce("t")
    sender = prefill.sender("t")
    decode.wants("d", sender, [1, 2, 3])
    prefill.until(lambda: bool(prefill.push._pushes._by_transfer["t"].readers))
    prefill.compute("t", [5], 4)
    prefill.worker.close()
    assert decode.loaded("d") == {1, 2, 3}
    port = int(sender.urls[0].rpartition(":")[2])
    successor = make("prefill", True, 120, kind=PushSide, port=port)
    successor.announce("u")
    decode.wants("e", successor.sender("u"), [4, 5, 6])
    successor.compute("u", [5, 6, 7], 10)
    assert decode.loaded("e") == set() and (decode.cache[:, 4] == 125).all()


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
