# SPDX-License-Identifier: Apache-2.0
"""LMCache with one of the backends that have a transfer channel, on memory of the CPU. Takes orders as JSON lines on
stdin and answers each on stdout.

    python lmcache_instance.py BASE '{"transfer_channel": "kvferry", "p2p_init_ports": [7000], ...}'

What is given are members of LMCache's configuration; with "pd_role" the backend is the one for prefill and decode, else
the one for peers. An order is [METHOD, ARGUMENT...]. Keys of the cache are numbers here, to which BASE is added, and a
chunk is full of one number.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import kvferry.lmcache  # noqa: F401
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.cache_engine import LMCacheEngine
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.token_database import ChunkedTokenDatabase

#: Layers, keys and values, tokens, heads, numbers of a head: 64 KiB.
SHAPE = (4, 2, 16, 2, 64)
METADATA = LMCacheMetadata("model", 1, 1, 0, 0, torch.float32, SHAPE, chunk_size=SHAPE[2])


def key_of(number: int | str) -> CacheEngineKey:
    return CacheEngineKey("model", 1, 0, int(sys.argv[1]) + int(number), torch.float32)


def values_of(memory: Any) -> list[float]:
    return sorted(set(memory.tensor.flatten().tolist()))


class Peer:
    """An engine that shares its chunks. ``orders`` are its methods."""

    def __init__(self, given: dict[str, Any]) -> None:
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=SHAPE[2], local_cpu=True, max_local_cpu_size=1 / 256, enable_controller=True, enable_p2p=True,
            p2p_host="127.0.0.1", **given,
        )  # fmt: skip
        database = ChunkedTokenDatabase(config, METADATA)
        self._engine = LMCacheEngine(config, METADATA, database, None, lambda *_: None, lambda given, _: given)
        self._engine.post_init()
        manager = self._engine.storage_manager
        assert manager is not None
        self._here, self._peers = manager.storage_backends["LocalCPUBackend"], manager.storage_backends["P2PBackend"]
        self._loop: asyncio.AbstractEventLoop = manager.loop
        self._finds = 0

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def free(self) -> int:
        """Chunks."""
        return len(self._here.memory_allocator.cpu_allocator.free_blocks)

    def put(self, chunks: dict[str, float]) -> None:
        for number, value in chunks.items():
            made = self._here.allocate(self._peers.full_size_shapes, self._peers.dtypes, self._peers.fmt)
            made.tensor.fill_(value)
            self._here.submit_put_task(key_of(number), made)
            made.ref_count_down()

    def drop(self, numbers: list[int]) -> int:
        return sum(self._here.remove(key_of(number)) for number in numbers)

    def find(self, numbers: list[int]) -> int:
        """How many a peer has, from the first on."""
        self._finds += 1
        keys = [key_of(number) for number in numbers]
        found: int = self._run(self._peers.batched_async_contains(str(self._finds), keys))
        return found

    def get(self, numbers: list[int]) -> Any:
        """The values of what was found last; a text that says what went wrong."""
        keys = [key_of(number) for number in numbers]
        lengths = [SHAPE[2] * index for index in range(len(keys) + 1)]
        coroutine = self._peers.batched_get_non_blocking(str(self._finds), keys, {"cum_chunk_lengths": lengths})
        try:
            objects = self._run(coroutine)
        except Exception as error:
            return str(error)
        values = [values_of(each) for each in objects]
        for each in objects:
            each.unpin()
            each.ref_count_down()
        return values

    def move(self, numbers: list[int], to: str) -> int:
        """How many chunks the peer at a url has read from here."""
        objects = [self._here.get_blocking(key_of(number)) for number in numbers]
        spec = {"target_peer_init_url": to, "offsets": [SHAPE[2]] * len(numbers)}
        keys = [key_of(number) for number in numbers]
        moved: int = self._run(self._peers.async_batched_submit_put_task(keys, objects, spec))
        for each in objects:
            each.ref_count_down()
        return moved

    def local(self, numbers: list[int]) -> list[Any]:
        """The values of the chunks that are here; None for one that isn't."""
        found = [self._here.get_blocking(key_of(number)) for number in numbers]
        values = [None if each is None else values_of(each) for each in found]
        for each in found:
            if each is not None:
                each.ref_count_down()
        return values


class Side:
    """Prefill's or decode's. ``orders`` are its methods."""

    def __init__(self, given: dict[str, Any]) -> None:
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=SHAPE[2], enable_pd=True, pd_buffer_size=1 << 22, pd_buffer_device="cpu", **given,
        )  # fmt: skip
        if given["pd_backend_mode"] == "async":
            from lmcache.v1.storage_backend.pd_backend_async import PDBackendAsync as Backend
        else:
            from lmcache.v1.storage_backend.pd_backend import PDBackend as Backend
        self._backend = Backend(config, METADATA)

    def hand_over(self, chunks: dict[str, float], host: str, init_port: int, alloc_port: int, last: int) -> None:
        """The proxy hears of it when they are there. Of the last chunk these are some tokens."""
        objects = []
        for index, value in enumerate(chunks.values()):
            shape = list(SHAPE)
            if index == len(chunks) - 1:
                shape[2] = last
            made = self._backend.allocate(torch.Size(shape), torch.float32)
            made.tensor.fill_(value)
            objects.append(made)
        spec = SimpleNamespace(
            req_id=f"request of {sorted(chunks)}", receiver_host=host, receiver_init_port=[init_port],
            receiver_alloc_port=[alloc_port], is_last_prefill=True, total_chunks=len(chunks),
        )  # fmt: skip
        self._backend.batched_submit_put_task([key_of(number) for number in chunks], objects, spec)

    def local(self, numbers: list[int]) -> list[Any]:
        """The values of the chunks that are here, and how many numbers each has."""
        found = [self._backend.get_blocking(key_of(number)) for number in numbers]
        return [[values_of(each), each.tensor.numel()] for each in found]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, it is no answer
    given = json.loads(sys.argv[2])
    instance = (Side if "pd_role" in given else Peer)(given)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(instance, name)(*arguments)), file=answers, flush=True)
    os._exit(0)  # LMCache's threads don't end


if __name__ == "__main__":
    main()
