# SPDX-License-Identifier: Apache-2.0
"""What kvferry.lmcache does that takes no LMCache: its base classes and records are declared here, as 0.5.6 has them.
tests/engines.sh has the tests with LMCache itself."""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import becomes, each_step_of

SIZE = 16 << 20


@dataclass
class L1MemoryDesc:
    ptr: int
    size: int
    align_bytes: int = 4096


@dataclass
class TransferChannelAddress:
    offset: int
    size: int


@dataclass
class TransferChannelReadResult:
    finished: bool
    succeeded_mask: list[bool] = field(default_factory=list)


class Base:
    """Nothing of what LMCache's base classes have is called."""


class Message(msgspec.Struct):
    pass


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module kvferry.lmcache."""

    def declare(name: str, **names: Any) -> None:
        made = ModuleType(f"lmcache{name}")
        made.__dict__.update(names)
        monkeypatch.setitem(sys.modules, made.__name__, made)
        parent, _, last = made.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, made)

    declare("")
    declare(".logging", init_logger=logging.getLogger)
    declare(".v1")
    declare(".v1.memory_management", MemoryObj=type("MemoryObj", (), {}))
    declare(".v1.transfer_channel", CreateTransferChannel=lambda **_: None)
    declare(".v1.transfer_channel.abstract", BaseTransferChannel=Base)
    declare(".v1.transfer_channel.transfer_utils", InitSideMsgBase=Message, InitSideRetMsgBase=Message, SideMsg=Message)
    declare(".v1.distributed")
    declare(".v1.distributed.internal_api", L1MemoryDesc=L1MemoryDesc)
    declare(".v1.distributed.transfer_channel")
    declare(
        ".v1.distributed.transfer_channel.abstract",
        TransferChannelClient=Base, TransferChannelContext=Base, TransferChannelServer=Base,
    )  # fmt: skip
    declare(
        ".v1.distributed.transfer_channel.api",
        TransferChannelAddress=TransferChannelAddress, TransferChannelReadResult=TransferChannelReadResult,
    )  # fmt: skip
    declare(".v1.distributed.transfer_channel.factory", register_transfer_channel_factory=lambda *_: None)
    yield importlib.import_module("kvferry.lmcache")
    for name in [name for name in sys.modules if name.startswith("kvferry.lmcache")]:
        del sys.modules[name]


@pytest.fixture
def context(ours: Any) -> Iterator[Callable[[], Any]]:
    made: list[tuple[Any, Any]] = []

    def make() -> Any:
        memory = np.zeros(SIZE, dtype=np.uint8)
        url = "tcp://127.0.0.1:0"
        made.append((ours.KvferryContext(L1MemoryDesc(memory.ctypes.data, SIZE), url, ""), memory))
        return made[-1][0]

    yield make
    for each, _ in made:
        each.close()


def test_a_read_fails_well_before_lmcache_frees_its_memory(ours: Any) -> None:
    load_timeout_s = 10.0  # the default of LMCache's P2PL2AdapterConfig
    for context in (ours.KvferryContext, ours.KvferryShmContext, ours.KvferryAutoContext):
        assert inspect.signature(context).parameters["read_timeout"].default <= load_timeout_s / 2


def test_a_client_is_closed_while_another_one_is_polled(context: Callable[[], Any]) -> None:
    near, first, second = context(), context(), context()
    closed, polled = (near.get_transfer_channel_client(each.channel.peer_init_url) for each in (first, second))
    whole = near.get_transfer_channel_address([(0, SIZE)])
    queue = near.queue
    overtaken = threading.Event()

    class Overtaken:
        """The queue, where the thread that polls the other client always comes first."""

        def drain(self) -> Any:
            return queue.drain()

        def wait(self, timeout: float | None = None) -> bool:
            while not all(operation.done() for operation in closed._tasks.values()):
                pass
            with suppress(KeyError):
                polled.query_read_status(0)
            overtaken.set()
            return bool(queue.wait(timeout))

    def close() -> None:
        while not overtaken.is_set():  # or it has ended at once
            near.queue = queue
            closed.submit_read(whole, whole)
            near.queue = Overtaken()
            closed.close()

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(60)
    assert overtaken.is_set() and not closing.is_alive()
    near.queue = queue


def test_each_read_has_a_number_of_its_own_whoever_else_begins_one(context: Callable[[], Any]) -> None:
    near, first, second = context(), context(), context()
    ours, others = (near.get_transfer_channel_client(each.channel.peer_init_url) for each in (first, second))
    page = near.get_transfer_channel_address([(0, 4096)])
    numbers: list[int] = []

    def read(client: Any) -> None:
        numbers.append(client.submit_read(page, page))
        assert becomes(lambda: client.query_read_status(numbers[-1]).finished)

    for read_interrupted in each_step_of("submit_read", lambda: read(ours), lambda: read(others)):
        read_interrupted()  # by what another thread may do just then
    assert len(set(numbers)) == len(numbers) and not ours._tasks and not others._tasks


def test_event_loops_that_are_over_leave_nothing(ours: Any) -> None:
    memory = [np.zeros(8192, dtype=np.uint8) for _ in range(2)]
    far, near = (
        ours.KvferryChannel(True, "both", each.ctypes.data, each.nbytes, 4096, peer_init_url="127.0.0.1:0")
        for each in memory
    )
    near.lazy_init_peer_connection("near", "far", far.channel.peer_init_url)
    spec = {"receiver_id": "far", "remote_indexes": [1]}

    def write() -> int:
        assert asyncio.run(near.async_batched_write([b"written"], spec)) == 1
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    write()
    before = write()
    assert all(write() <= before for _ in range(8))
    assert bytes(memory[0][4096:4103]) == b"written"
    near.close()
    far.close()
    gc.collect()
    assert not near._in_loops
