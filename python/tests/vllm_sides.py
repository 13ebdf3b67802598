# SPDX-License-Identifier: Apache-2.0
"""Schedulers and workers of kvferry.vllm with real channels, and no engine."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from kvferry.vllm.layout import Field, KvLayout
from kvferry.vllm.messages import Remote, Server
from kvferry.vllm.options import Options
from kvferry.vllm.scheduler import Scheduler, Step
from kvferry.vllm.worker import Worker
from loopback import own_loopback
from numpy.typing import NDArray

TOKENS = 4  # of a block
BLOCK = 64  # bytes
BLOCKS = 16
LAYERS = 2
PROMPT = list(range(100, 110))


Status = Enum("Status", ["FINISHED_STOPPED", "FINISHED_ABORTED"])


@dataclass
class Request:
    """What a scheduler's request has for the connector."""

    request_id: str
    kv_transfer_params: Any
    num_prompt_tokens: int = 10
    num_computed_tokens: int = 10
    status: Status = Status.FINISHED_STOPPED
    prompt_token_ids: list[int] | None = field(default_factory=lambda: list(PROMPT))
    prompt_embeds: Any = None
    lora_request: Any = None
    mm_features: list[Any] = field(default_factory=list)


@dataclass
class Blocks:
    ids: list[int]

    def get_block_ids(self) -> tuple[list[int], ...]:
        return (self.ids,)


@dataclass
class Output:
    finished_recving: set[str] = field(default_factory=set)


def kept_by(scheduler: Scheduler, name: str = "p", **changed: Any) -> Any:
    """The parameters that a prefilling instance's request ends with."""
    request = Request(name, {"do_remote_decode": True}, **changed)
    scheduler.update_state_after_alloc(request, Blocks([5, 6, 7]), 0)
    return scheduler.request_finished(request, [5, 6, 7])


def schedulers() -> tuple[Scheduler, Scheduler]:
    prefill, decode = (Scheduler(Options(), TOKENS) for _ in range(2))
    prefill.set_workers({1: Server("tcp://h:2", "second", "two"), 0: Server("tcp://h:1", "first", "tcp://h:1")})
    return prefill, decode


def example(name: str) -> Any:
    """A module of examples/vllm."""
    file = Path(__file__).parents[2] / "examples" / "vllm" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@contextmanager
def changing(block: NDArray[np.uint8]) -> Iterator[None]:
    """Its bytes change all the time."""
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            block[...] += 1

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Side:
    """A worker with a cache of its own."""

    make: Any = Worker

    def __init__(
        self, name: str, serving: bool, fill: int = 0, block: int = BLOCK, tp_size: int = 1, tp_rank: int = 0,
        heads: int = 1, total_heads: int = 1, tokens: int = TOKENS, **options: Any,
    ) -> None:  # fmt: skip
        self.cache = np.full((LAYERS, BLOCKS, block), fill, dtype=np.uint8)
        self.cache[...] += np.arange(BLOCKS, dtype=np.uint8)[None, :, None] * bool(fill)
        layers = tuple((f"layer {i}", 0, i * BLOCKS * block) for i in range(LAYERS))
        layout = KvLayout(
            kind="test", layers=layers, num_blocks=BLOCKS, blocks_per_id=1, block_tokens=tokens, block_stride=block,
            heads=heads, head_stride=block // heads, run_tokens=1,
            fields=(Field(0, 1, 0, block // heads // tokens, block // heads // tokens),),
            total_heads=total_heads, tp_rank=tp_rank, tp_size=tp_size,
        )  # fmt: skip
        chosen = Options(**{"timeout": 20.0, "host": own_loopback(), **options})
        memory = [(self.cache.ctypes.data, self.cache.nbytes)]
        self.worker: Worker = self.make(chosen, name, layout, memory, serving, not serving)

    def remote(self, request_id: str, **changed: Any) -> Remote:
        """What is kept for a request here."""
        made: dict[str, Any] = {
            "peer_ids": (self.worker.server.peer_id,), "urls": (self.worker.url,),
            "instance_ids": (self.worker.instance_id,), "block_ids": (5, 6, 7),
            "num_tokens": 10, "prompt_digest": "", "lease": 30.0, **changed,
        }  # fmt: skip
        return Remote(request_id, **made)

    def step(self, **orders: Any) -> None:
        """What the engine does in a step."""
        made = Step(**orders)
        self.worker.begin(made)
        self.worker.step(made)

    def until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def loaded(self, request_id: str) -> set[int]:
        """Waits until the load has ended, and returns the blocks that failed."""
        received: set[str] = set()

        def ended() -> bool:
            received.update(self.worker.finished()[1])
            return bool(received)

        self.until(ended)
        assert received == {request_id}
        return self.worker.failed_blocks()

    def freed(self) -> set[str]:
        sent: set[str] = set()

        def some() -> bool:
            sent.update(self.worker.finished()[0])
            return bool(sent)

        self.until(some)
        return sent
