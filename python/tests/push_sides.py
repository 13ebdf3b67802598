# SPDX-License-Identifier: Apache-2.0
"""Workers of either kind where blocks are pushed: real channels, no engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from kvferry.vllm.layout import HeadSource
from kvferry.vllm.messages import parse
from kvferry.vllm.push_messages import Announced, Progress, Sender, Want
from kvferry.vllm.push_worker import PushWorker, _Link
from kvferry.vllm.scheduler import Load, Step
from vllm_sides import LAYERS, Side


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


@pytest.fixture(params=["tcp", "shm", "auto"])
def each_pair(request: pytest.FixtureRequest, make: Callable[..., Any]) -> tuple[PushSide, PushSide]:
    """Over each transport."""
    options = {"kind": PushSide, "transport": request.param}
    return make("prefill", True, 100, **options), make("decode", False, **options)


def want_of(decode: PushSide, sender: Sender, **changed: Any) -> Want:
    """What a decoding worker asks."""
    worker = decode.push
    load = Load("d", sender, [1, 2, 3], 0, 10)
    made = worker._wanted(load, HeadSource(0, 0, 0, 1), sender.servers()[0], 1, _Link("someone"))
    return msgspec.structs.replace(msgspec.convert(parse(made)["want"], Want), **changed)
