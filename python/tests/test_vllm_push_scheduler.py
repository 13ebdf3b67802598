# SPDX-License-Identifier: Apache-2.0
"""What schedulers and options say where blocks are pushed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kvferry.vllm.options import Options
from kvferry.vllm.push_messages import Progress, Sender
from kvferry.vllm.push_scheduler import PushScheduler
from kvferry.vllm.scheduler import Load, Step
from vllm_sides import TOKENS, Blocks, Output, Request, Status, example

TO_DECODE = {"do_remote_prefill": True, "transfer_id": "t", "remote_urls": ["tcp://h:1"]}
TO_PREFILL = {"do_remote_decode": True, "transfer_id": "t"}


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
