# SPDX-License-Identifier: Apache-2.0
"""What examples/vllm/router.py asks of the two instances."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vllm_sides import example

bodies, both = example("bodies"), example("both")

PARAMS = {"do_remote_prefill": True}


def test_a_prompt_is_computed_once_and_gone_on_with() -> None:
    body = {"prompt": "The ferry", "max_tokens": 16, "n": 64, "stream": True, "stream_options": {}, "best_of": 64}
    assert bodies.prefilling(body) == {
        "prompt": "The ferry", "max_tokens": 1, "n": 1, "stream": False,
        "kv_transfer_params": {"do_remote_decode": True},
    }  # fmt: skip
    assert bodies.decoding(body, PARAMS) == {**body, "kv_transfer_params": PARAMS}
    assert bodies.decoding(body, None) == body
    for whole in ({"prompt": [1, 2, 3]}, {"messages": [{"role": "user", "content": "x"}]}):
        assert bodies.prefilling(whole) is not None


def test_a_prompt_that_is_pushed_is_sent_to_both_at_once() -> None:
    asked = bodies.prefilling({"prompt": "The ferry", "max_tokens": 16})
    asked, params = bodies.pushed(asked, "t", ["tcp://h:1", "tcp://h:2"])
    assert asked["prompt"] == "The ferry" and asked["max_tokens"] == 1
    assert asked["kv_transfer_params"] == {"do_remote_decode": True, "transfer_id": "t"}
    assert params == {"do_remote_prefill": True, "transfer_id": "t", "remote_urls": ["tcp://h:1", "tcp://h:2"]}


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["A", "B"]}, {"prompt": ["A"]}, {"prompt": [[1, 2], [3]]}, {"prompt": None}, {"prompt": 7},
        {"prompt": "A", "echo": True}, {"prompt": "A", "prompt_logprobs": 0}, {"prompt": "A", "use_beam_search": True},
    ],
    ids=str,
)  # fmt: skip
def test_requests_that_are_not_handed_over(body: dict[str, Any]) -> None:
    assert bodies.prefilling(body) is None


@pytest.mark.parametrize("theirs", ["x", {"do_remote_prefill": True, "remote_urls": ["tcp://victim:1"]}], ids=str)
def test_clients_say_nothing_about_transfers(theirs: Any) -> None:
    body = {"prompt": "A", "kv_transfer_params": theirs, "vllm_xargs": {"kv_transfer_params": theirs, "other": 1}}
    clean = {"prompt": "A", "vllm_xargs": {"other": 1}}
    assert bodies.decoding(body, None) == clean
    assert bodies.decoding(body, PARAMS) == {**clean, "kv_transfer_params": PARAMS}
    assert bodies.prefilling(body)["kv_transfer_params"] == {"do_remote_decode": True}
    assert bodies.prefilling(body)["vllm_xargs"] == {"other": 1}
    assert body["kv_transfer_params"] == theirs  # the client's own is left alone


class Decoding:
    """A decoding instance. It answers a prompt that is pushed when it is told to."""

    def __init__(self, answers: bool = False, begins: bool = False) -> None:
        self.begins = begins
        self.asked: list[bool] = []
        self.cancelled = 0
        self.pushed = asyncio.Event()
        if answers:
            self.pushed.set()

    async def __call__(self, is_pushed: bool, begun: asyncio.Event) -> str:
        self.asked.append(is_pushed)
        try:
            if self.begins:
                begun.set()
            if is_pushed:
                await self.pushed.wait()
            return f"pushed: {is_pushed}"
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def run(prefill: Any, **keywords: Any) -> tuple[Any, Decoding]:
    async def both_of_them() -> tuple[Any, Decoding]:
        decode = Decoding(**keywords)
        return await asyncio.wait_for(both.answer_beside(prefill(decode), decode), 60), decode

    return asyncio.run(both_of_them())


def test_a_prompt_that_nobody_pushes_is_asked_for_again_at_once() -> None:
    async def fails(decode: Decoding) -> bool:
        while not decode.asked:
            await asyncio.sleep(0)
        return False

    answer, decode = run(fails)
    assert (answer, decode.asked, decode.cancelled) == ("pushed: False", [True, False], 1)


def test_an_answer_that_has_begun_goes_on() -> None:
    async def fails_late(decode: Decoding) -> bool:
        while not decode.asked:
            await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(decode.pushed.set)
        return False

    answer, decode = run(fails_late, begins=True)
    assert (answer, decode.asked) == ("pushed: True", [True])


def test_a_prompt_that_is_pushed_is_asked_for_once() -> None:
    async def computes(decode: Decoding) -> bool:
        asyncio.get_running_loop().call_soon(decode.pushed.set)
        return True

    answer, decode = run(computes)
    assert (answer, decode.asked) == ("pushed: True", [True])


def test_nothing_goes_on_when_the_answer_is_there_or_the_client_gone() -> None:
    ended = []

    async def never(_: Decoding) -> bool:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("prefill")
        return True

    assert run(never, answers=True)[0] == "pushed: True" and ended == ["prefill"]

    async def client_goes() -> Decoding:
        decode = Decoding()
        asking = asyncio.create_task(both.answer_beside(never(decode), decode))
        while not decode.asked:
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        return decode

    assert asyncio.run(client_goes()).cancelled == 1 and ended == ["prefill", "prefill"]
