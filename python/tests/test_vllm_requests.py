# SPDX-License-Identifier: Apache-2.0
"""What becomes of requests whose blocks are loaded from another worker: real channels, no engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from kvferry.vllm.leases import Leases
from kvferry.vllm.messages import Remote
from kvferry.vllm.options import Options
from kvferry.vllm.scheduler import Load, Step
from loopback import own_loopback
from vllm_sides import BLOCKS, Blocks, Output, Request, Side, Status, changing, kept_by, schedulers


def test_leases_end_when_all_have_read_or_nobody_renews() -> None:
    now = 0.0
    leases = Leases(10.0, lambda: now)
    for name in ("read", "half", "kept", "early", "aborted"):
        leases.expect(name)
    now = 100.0  # being computed takes as long as it takes
    assert leases.take_ended() == set()
    assert leases.release("early", 0, 1) and leases.take_ended() == set()  # the engine doesn't know yet that it is done
    leases.forget("aborted")
    for name in ("read", "half", "kept", "early"):
        leases.grant(name)
    assert leases.take_ended() == {"early"}
    assert leases.release("read", 0, 2) and leases.release("half", 1, 2) and leases.release("half", 1, 2)
    assert leases.take_ended() == set()
    assert leases.release("read", 1, 2)
    now = 109.0
    assert leases.renew("kept") and leases.take_ended() == {"read"}
    now = 110.0
    assert leases.take_ended() == {"half"} and leases.expired == 1
    now = 119.0
    assert leases.take_ended() == {"kept"} and leases.expired == 2
    for name in ("read", "half", "kept", "early", "aborted", "never heard of"):
        assert not leases.release(name, 0, 1) and not leases.renew(name)
    assert len(leases) == 0


def test_options_have_known_names_and_values() -> None:
    assert Options.from_config({"lease": 3.0, "transport": "tcp"}) == Options(lease=3.0)
    for extra, match in (
        ({"leese": 1}, "has 'leese', and may have advertised_host"),
        ({"timeout": 0}, "above 0"),
        ({"lease": float("nan")}, "above 0"),
        ({"timeout": float("nan")}, "above 0"),
        ({"lease": float("inf")}, "a lease is up to [0-9]+ seconds"),  # the thread that renews would not begin to wait
        ({"lease": 1e11}, "a lease is up to"),
        ({"transport": "pigeon"}, "no transport 'pigeon', but tcp"),
    ):
        with pytest.raises(ValueError, match=match):
            Options.from_config(extra)


def test_the_scheduler_of_a_prefilling_instance() -> None:
    prefill, _ = schedulers()
    kept, params = kept_by(prefill)
    remote = Remote.from_params(params)
    assert kept and remote == Remote(
        "p", ("tcp://h:1", "tcp://h:2"), ("first", "second"), (5, 6, 7), 10, remote.prompt_digest, 30.0,
        ("tcp://h:1", "two"),
    )  # fmt: skip
    assert prefill.next_step() == Step(expected=["p"], granted=["p"])
    assert kept_by(prefill, status=Status.FINISHED_ABORTED) == (False, None)
    assert prefill.next_step() == Step(expected=["p"], forgotten=["p"])
    assert prefill.request_finished(Request("plain", None), [1]) == (False, None)
    assert prefill.next_step() == Step()
    # More tokens than the prompt's are of no use to others.
    assert kept_by(prefill, num_computed_tokens=12)[1]["remote_num_tokens"] == 10


def test_the_scheduler_of_a_decoding_instance() -> None:
    prefill, decode = schedulers()
    _, params = kept_by(prefill)
    remote = Remote.from_params(params)
    request = Request("d", params)
    decode.on_new_request(request)
    assert decode.get_num_new_matched_tokens(request, 0) == (10, True)
    assert decode.get_num_new_matched_tokens(request, 4) == (6, True)  # twice, and nothing has happened
    decode.update_state_after_alloc(request, Blocks([9, 2, 3, 4]), 6)
    assert decode.next_step() == Step(waiting=[("d", remote)], loads=[Load("d", remote, [2, 3], 4, 10)])
    assert decode.get_num_new_matched_tokens(request, 0) == (0, False)  # what failed is computed
    decode.update_connector_output(Output({"d"}))
    assert decode.request_finished(request, [9, 2, 3, 4]) == (False, None)
    assert decode.next_step() == Step()


@pytest.mark.parametrize("when", ["waiting", "loading", "in the prefix cache"])
def test_a_request_that_ends_lets_go_of_what_is_kept_for_it(when: str) -> None:
    prefill, decode = schedulers()
    _, params = kept_by(prefill)
    remote = Remote.from_params(params)
    request = Request("d", params)
    decode.on_new_request(request)
    assert decode.next_step() == Step(waiting=[("d", remote)])
    if when != "waiting":
        decode.update_state_after_alloc(request, Blocks([1, 2, 3]), 10 if when == "loading" else 0)
    if when == "loading":
        assert len(decode.next_step().loads) == 1
    if when != "in the prefix cache":
        decode.request_finished(request, [1, 2, 3])
    told = Step(cancelled=["d"]) if when == "loading" else Step(released=[("d", remote)])
    assert decode.next_step() == told


@pytest.mark.parametrize(
    "wrong",
    [
        {"remote_urls": None}, {"remote_urls": []}, {"remote_block_ids": [-1]}, {"remote_num_tokens": "many"},
        {"remote_num_tokens": 11}, {"remote_urls": ["tcp://h:1"]}, {"remote_lease": 0.0},
        {"remote_lease": float("nan")}, {"remote_request_id": "\ud800"}, {"remote_prompt_digest": None},
        {"remote_urls": ["tcp://h:1"] * 1025, "remote_instance_ids": ["i"] * 1025, "remote_peer_ids": []},
        {"remote_peer_ids": ["one"]}, {"remote_peer_ids": None}, {"remote_num_tokens": 2**64},
        {"remote_num_tokens": -(2**63) - 1}, {"remote_block_ids": [2**64]}, {"remote_block_ids": [5, -(2**63) - 1]},
    ],
    ids=lambda wrong: ascii(wrong)[:40],
)  # fmt: skip
def test_parameters_that_make_no_sense_are_computed(wrong: dict[str, Any]) -> None:
    prefill, decode = schedulers()
    params = kept_by(prefill)[1]
    request = Request("d", {**params, **wrong})
    decode.on_new_request(request)
    assert decode.get_num_new_matched_tokens(request, 0) == (0, False)
    decode.update_state_after_alloc(request, Blocks([1, 2, 3]), 0)
    decode.request_finished(request, [1, 2, 3])
    assert decode.next_step() == Step()


def test_a_load_brings_blocks_and_frees_them_at_the_other_side(make: Callable[..., Side]) -> None:
    prefill, decode = make("prefill", True, 100), make("decode", False)
    assert prefill.worker.url.startswith(f"tcp://{own_loopback()}:") and not decode.worker.url
    for turn in range(2):  # the second time it is connected
        prefill.step(expected=["p"])
        decode.step(loads=[Load("d", prefill.remote("p"), [1, 0], 4, 10)])
        assert decode.loaded("d") == set()
        assert (decode.cache[:, 1] == 106).all() and (decode.cache[:, 0] == 107).all(), turn
        assert not decode.cache[:, 2:].any()
        assert prefill.worker.finished() == (set(), set())
        prefill.step(granted=["p"])
        assert prefill.freed() == {"p"}
        decode.cache[...] = 0
    assert decode.worker.finished() == (set(), set()) and decode.worker.failed_blocks() == set()


@pytest.mark.parametrize(
    "transport,options,path",
    [
        ("shm", {}, ""), ("auto", {}, "shm"), ("auto", {"roads": ["tcp", "shm"]}, "tcp"),
        ("auto", {"roads": [{"transport": "tcp", "options": {"lanes_per_peer": 2}, "name": "lan"}]}, "tcp"),
    ],
)  # fmt: skip
def test_other_transports(
    make: Callable[..., Side], transport: str, options: dict[str, Any], path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kvferry.vllm")
    made = {"transport": transport, "channel_options": options}
    prefill, decode = make("prefill", True, 100, **made), make("decode", False, **made)
    prefill.step(expected=["p"], granted=["p"])
    decode.step(loads=[Load("d", prefill.remote("p"), [1, 2, 3], 0, 10)])
    assert decode.loaded("d") == set() and prefill.freed() == {"p"}
    assert (decode.cache[:, 1] == 105).all()
    assert f"connected to {prefill.worker.url}: {path}" in caplog.text


@pytest.mark.parametrize("roads", [[7], [{"name": "a"}], [{"transport": "tcp", "lanes": 2}]], ids=str)
def test_roads_that_are_none(make: Callable[..., Side], roads: Any) -> None:
    with pytest.raises(ValueError, match="a road is the name of a transport, or has transport, options, name"):
        make("decode", False, transport="auto", channel_options={"roads": roads})


@pytest.mark.parametrize("how", ["expired", "never", "successor"])
def test_blocks_that_are_no_longer_the_requests_are_not_loaded(make: Callable[..., Side], how: str) -> None:
    prefill, decode = make("prefill", True, 100, lease=1e-9), make("decode", False)
    if how == "expired":
        prefill.step(expected=["p"], granted=["p"])
        assert prefill.freed() == {"p"}
    if how == "successor":
        prefill.step(expected=["p"])
    remote = prefill.remote("p", **({"instance_ids": ("a predecessor",)} if how == "successor" else {}))
    decode.step(loads=[Load("d", remote, [1, 2, 3], 0, 10)])
    assert decode.loaded("d") == {1, 2, 3}


@pytest.mark.parametrize("shorter", ["there", "here"])
def test_leases_are_renewed_without_steps_until_they_are_let_go(make: Callable[..., Side], shorter: str) -> None:
    """A step of the engine's may take longer than a lease."""

    def is_renewed(short: float) -> bool:
        """Whether a lease of so many seconds is, more than three times as long. A busy machine may take a short one's time."""
        prefill = make("prefill", True, 100, lease=short)
        decode = make("decode", False, lease=short if shorter == "here" else 3600.0)
        prefill.step(expected=["kept", "read", "let go"], granted=["kept", "read", "let go"])
        lease = short if shorter == "there" else 3600.0
        remotes = {name: prefill.remote(name, lease=lease) for name in ("kept", "read", "let go")}
        decode.step(waiting=list(remotes.items()))
        decode.step(released=[("let go", remotes["let go"])])
        decode.step(loads=[Load("read", remotes["read"], [1, 2, 3], 0, 10)])
        if decode.loaded("read"):
            return False
        freed: set[str] = set()
        until = time.monotonic() + 3.4 * short
        while time.monotonic() < until:
            freed |= prefill.worker.finished()[0]
            if "kept" in freed:
                return False
            time.sleep(0.02)
        assert freed == {"read", "let go"}
        renewed: list[str] = []
        leases: Any = prefill.worker._leases
        leases.renew = renewed.append
        prefill.until(lambda: len(renewed) > 1)
        assert set(renewed) == {"kept"}
        decode.worker.close()  # and the renewals with it
        assert prefill.freed() == {"kept"}
        return True

    assert any(is_renewed(short) for short in (0.6, 2.4, 9.6))


def test_block_ids_outside_of_the_peers_cache(make: Callable[..., Side]) -> None:
    prefill, decode = make("prefill", True, 100), make("decode", False)
    prefill.step(expected=["p"])
    remote = prefill.remote("p", block_ids=(5, BLOCKS + 3, 7))
    decode.step(loads=[Load("d", remote, [1, 2, 3], 0, 10)])
    assert decode.loaded("d") == {1, 2, 3}
    assert not decode.cache.any()


@pytest.mark.parametrize("url", ["nonsense", "tcp://127.0.0.1", "tcp://[::1:5", ""])
def test_urls_that_are_none(make: Callable[..., Side], url: str) -> None:
    """They come from outside, and must not stop the engine."""
    decode = make("decode", False, timeout=0.5)
    remote = Remote("p", (url,), ("prefill",), (5, 6, 7), 10, "", 30.0)
    decode.step(loads=[Load("d", remote, [1, 2, 3], 0, 10)], released=[("d", remote)], waiting=[("d", remote)])
    assert decode.loaded("d") == {1, 2, 3}


def test_a_peer_that_is_not_there_fails_its_loads(make: Callable[..., Side]) -> None:
    prefill, decode = make("prefill", True, 100), make("decode", False, timeout=3.0)
    gone = prefill.remote("p")
    prefill.step(expected=["p", "q"])
    decode.step(loads=[Load("d", gone, [1, 2, 3], 0, 10)])
    assert decode.loaded("d") == set()
    prefill.worker.close()
    for name in ("e", "f"):
        decode.step(loads=[Load(name, gone, [1, 2, 3], 0, 10)])
        assert decode.loaded(name) == {1, 2, 3}
    # Its successor at the same place, under the same name, has nothing to do with that, and nothing of its requests.
    successor = make("prefill", True, 120, port=int(gone.urls[0].rpartition(":")[2]))
    successor.step(expected=["p"])
    decode.step(loads=[Load("g", successor.remote("p"), [1, 2, 3], 0, 10)])
    assert decode.loaded("g") == set() and (decode.cache[:, 1] == 125).all()
    other = make("decode", False)
    other.step(loads=[Load("h", gone, [1, 2, 3], 0, 10)])
    assert other.loaded("h") == {1, 2, 3}


def test_a_load_from_workers_without_its_heads_fails(make: Callable[..., Side]) -> None:
    """The number of urls comes from outside. Nothing else would ever tell the engine that the load has ended."""
    decode = make("decode", False, tp_size=4, tp_rank=3, total_heads=4)
    urls = tuple(f"tcp://127.0.0.1:{port}" for port in (1, 2, 3))
    remote = Remote("p", urls, ("one", "two", "three"), (5, 6, 7), 10, "", 30.0)
    decode.step(waiting=[("d", remote)], loads=[Load("d", remote, [1, 2, 3], 0, 10)])
    assert decode.loaded("d") == {1, 2, 3}
    assert not decode.worker._renewals._kept


def test_two_decoding_instances_of_one_name_both_load(make: Callable[..., Side]) -> None:
    prefill = make("prefill", True, 100)
    prefill.step(expected=["p", "q"])
    for name in ("p", "q"):
        decode = make("decode", False)
        decode.step(loads=[Load("d", prefill.remote(name), [1, 2, 3], 0, 10)])
        assert decode.loaded("d") == set()


def test_each_block_fails_by_itself(make: Callable[..., Side]) -> None:
    """One changes while it is read, which checksums show."""
    large = 1 << 20
    prefill = make("prefill", True, 100, block=large)
    decode = make("decode", False, checksums=True, block=large)
    until = time.monotonic() + 60
    failed: set[int] = set()
    with changing(prefill.cache[1, 6]):
        while not failed:
            assert time.monotonic() < until
            prefill.step(expected=["p"])
            decode.step(loads=[Load("d", prefill.remote("p"), [1, 2, 3], 0, 10)])
            failed = decode.loaded("d")
    assert failed == {2}
    assert (decode.cache[:, 1] == 105).all() and (decode.cache[:, 3] == 107).all()


def test_a_cancelled_load_ends_and_nothing_lands_any_more(make: Callable[..., Side]) -> None:
    prefill, decode = make("prefill", True, 100), make("decode", False)
    for turn in range(50):
        prefill.step(expected=[f"p{turn}"], granted=[f"p{turn}"])
        name = f"d{turn}"
        decode.step(loads=[Load(name, prefill.remote(f"p{turn}"), [1, 2, 3], 0, 10)])
        if turn % 5:
            time.sleep(0.0005 * (turn % 5))
        decode.step(cancelled=[name])
        assert decode.loaded(name) == set()  # the blocks are free, whatever they have
        decode.cache[...] = 1
        assert prefill.freed() == {f"p{turn}"}  # by a release: the lease is 30 seconds
        assert (decode.cache == 1).all()


def test_closing_ends_what_is_under_way(make: Callable[..., Side]) -> None:
    prefill, decode = make("prefill", True, 100), make("decode", False)
    prefill.step(expected=["p"])
    for name in ("d", "e"):
        decode.step(loads=[Load(name, prefill.remote("p"), [1, 2, 3], 0, 10)])
    decode.worker.close()
    decode.worker.close()
    assert decode.worker.finished()[1] == {"d", "e"}
