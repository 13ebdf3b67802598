# SPDX-License-Identifier: Apache-2.0
"""What examples/vllm/router.py asks of the two instances."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_FILE = Path(__file__).parents[2] / "examples" / "vllm" / "bodies.py"
_SPEC = importlib.util.spec_from_file_location("bodies", _FILE)
assert _SPEC is not None and _SPEC.loader is not None
bodies: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bodies)

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
