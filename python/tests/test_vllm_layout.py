# SPDX-License-Identifier: Apache-2.0
"""Which bytes of two KV caches are the same tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kvferry.vllm.layout import Field, HeadSource, KvLayout, LayoutMismatch, head_sources, plan, readers_of
from numpy.typing import NDArray

HEADS = 4
ITEM = 6  # bytes that a token has in a part of a head
LAYERS = 3


class Cache:
    """A worker's cache in one or more regions, and where each token's bytes lie in it by another reckoning."""

    def __init__(
        self, order: str, blocks: int, tokens: int, tp: tuple[int, int] = (0, 1), run: int = 1, per_id: int = 1,
        apart: bool = False,
    ) -> None:  # fmt: skip
        rank, size = tp
        self.heads = max(1, HEADS // size)
        self.first_head = rank * HEADS // size
        self.tokens, self.per_id = tokens, per_id
        extents = {"l": LAYERS, "b": blocks, "h": self.heads, "p": 2, "r": tokens // run, "i": run * ITEM}
        strides, step = {}, 1
        for axis in reversed(order):
            strides[axis], step = step, step * extents[axis]
        self.memory = np.zeros(step, dtype=np.uint8)
        view: Any = self.memory.reshape([extents[axis] for axis in order])
        self.view = view.transpose([order.index(axis) for axis in "lbhpri"])
        self.run = run
        layer = strides["l"]
        self.layout = KvLayout(
            kind="test",
            layers=tuple((f"layer {i}", i if apart else 0, 0 if apart else i * layer) for i in range(LAYERS)),
            num_blocks=blocks, blocks_per_id=per_id, block_tokens=tokens, block_stride=strides["b"],
            heads=self.heads, head_stride=strides["h"], run_tokens=run,
            fields=(Field(0, 2, strides["p"], run * ITEM, strides["r"]),),
            total_heads=HEADS, tp_rank=rank, tp_size=size,
        )  # fmt: skip
        self.bases = [i * layer if apart else 0 for i in range(LAYERS if apart else 1)]

    def run_of(self, layer: int, ids: list[int], head: int, part: int, token: int) -> Any:
        """The run that has a token of a request: a view."""
        block, within = divmod(token, self.tokens)
        number = ids[block // self.per_id] * self.per_id + block % self.per_id
        return self.view[layer, number, head - self.first_head, part, within // self.run]


def value(layer: int, head: int, part: int, token: int) -> Any:
    return np.random.default_rng([layer, head, part, token])


def fill(cache: Cache, ids: list[int], count: int) -> None:
    for layer, head, part, token in every(cache, 0, count):
        if token % cache.run == 0:
            cache.run_of(layer, ids, head, part, token)[:] = value(layer, head, part, token).integers(
                1, 256, cache.run * ITEM
            )


def every(cache: Cache, first: int, count: int) -> list[tuple[int, int, int, int]]:
    heads = range(cache.first_head, cache.first_head + cache.heads)
    return [(n, h, p, t) for n in range(LAYERS) for h in heads for p in range(2) for t in range(first, count)]


def move(local: Cache, remote: Cache, rows: tuple[NDArray[np.uint64], NDArray[np.uint64]]) -> None:
    for (ours, offset, size), (theirs, remote_offset, remote_size) in zip(rows[0].tolist(), rows[1].tolist()):
        assert size == remote_size
        to, start = local.bases[ours] + offset, remote.bases[theirs] + remote_offset
        assert not local.memory[to : to + size].any(), "bytes are moved twice"
        local.memory[to : to + size] = remote.memory[start : start + size]


@pytest.mark.parametrize(
    "local,remote,rows",
    [
        ({"order": "lbhpri", "blocks": 9, "tokens": 8}, {"order": "lbhpri", "blocks": 12, "tokens": 8}, 15),
        ({"order": "lbhpri", "blocks": 9, "tokens": 8, "apart": True},
         {"order": "blrhpi", "blocks": 12, "tokens": 8}, None),
        ({"order": "lbhpri", "blocks": 9, "tokens": 8}, {"order": "lbhpri", "blocks": 24, "tokens": 4}, None),
        ({"order": "lbhpri", "blocks": 30, "tokens": 4, "run": 2},
         {"order": "lbhpri", "blocks": 9, "tokens": 12, "run": 2}, None),
        ({"order": "lbrhpi", "blocks": 9, "tokens": 8}, {"order": "lbrhpi", "blocks": 24, "tokens": 4}, 30),
        ({"order": "lbhpri", "blocks": 20, "tokens": 4, "per_id": 2},
         {"order": "lbhpri", "blocks": 9, "tokens": 16}, None),
    ],
    ids=["same", "layers-apart", "smaller-remote", "larger-remote-runs", "tokens-first", "blocks-per-id"],
)  # fmt: skip
def test_tokens_find_their_places(local: dict[str, Any], remote: dict[str, Any], rows: int | None) -> None:
    ours, theirs = Cache(**local), Cache(**remote)
    count = 37
    remote_ids = list(reversed(range(theirs.layout.num_blocks // theirs.per_id)))
    fill(theirs, remote_ids, count)
    ids = [7, 0, 3, 8, 2] if len(ours.view[0]) == 9 else list(range(len(ours.view[0]) // ours.per_id))
    made = plan(ours.layout, theirs.layout, ids, remote_ids, 0, count, HeadSource(0, 0, 0, HEADS))
    move(ours, theirs, (made.local, made.remote))
    for layer, head, part, token in every(ours, 0, count):
        if token % ours.run == 0:
            found = ours.run_of(layer, ids, head, part, token)
            assert (found == value(layer, head, part, token).integers(1, 256, ours.run * ITEM)).all()
    assert rows is None or len(made.local) == rows


def test_a_load_may_begin_where_the_prefix_cache_ends() -> None:
    ours, theirs = Cache("lbhpri", 9, 8), Cache("lbhpri", 24, 4)
    remote_ids = list(range(24))
    fill(theirs, remote_ids, 30)
    made = plan(ours.layout, theirs.layout, [4, 6], remote_ids, 16, 30, HeadSource(0, 0, 0, HEADS))
    move(ours, theirs, (made.local, made.remote))
    for layer, head, part, token in every(ours, 16, 30):
        found = ours.run_of(layer, [0, 0, 4, 6], head, part, token)
        assert (found == value(layer, head, part, token).integers(1, 256, ITEM)).all()
    assert not ours.view[:, [0, 1, 2, 3, 5, 7, 8]].any()
    assert sorted(set(made.owners.tolist())) == [0, 1]
    blocks = made.local[:, 1] % ours.layout.layers[1][2] // ours.layout.block_stride
    assert [[4, 6][owner] for owner in made.owners.tolist()] == blocks.tolist()


@pytest.mark.parametrize("tp,remote_tp", [(1, 2), (2, 1), (2, 4), (4, 2), (1, 8), (8, 1), (8, 2), (2, 8), (4, 4)])
def test_heads_find_their_places_whatever_the_tensor_parallelism(tp: int, remote_tp: int) -> None:
    remotes = [Cache("lbhpri", 6, 8, (rank, remote_tp)) for rank in range(remote_tp)]
    ids = [5, 1, 2]
    for remote in remotes:
        fill(remote, ids, 20)
    asked = [0] * remote_tp
    for rank in range(tp):
        ours = Cache("lbhpri", 4, 8, (rank, tp))
        for source in head_sources(HEADS, tp, rank, remote_tp):
            asked[source.rank] += 1
            theirs = remotes[source.rank]
            made = plan(ours.layout, theirs.layout, [3, 0, 1], ids, 0, 20, source)
            move(ours, theirs, (made.local, made.remote))
        for layer, head, part, token in every(ours, 0, 20):
            found = ours.run_of(layer, [3, 0, 1], head, part, token)
            assert (found == value(layer, head, part, token).integers(1, 256, ITEM)).all()
    assert asked == readers_of(HEADS, tp, remote_tp)
    if tp >= remote_tp:
        assert all(asked)


def test_keys_that_lie_by_numbers_and_not_by_tokens() -> None:
    """As the CPU's kernels pack them: of a block, all tokens' first numbers, then their second ones."""

    def made(blocks: int, tokens: int) -> tuple[NDArray[np.uint8], KvLayout]:
        half = tokens * ITEM
        layout = KvLayout(
            kind="test", layers=(("layer", 0, 0),), num_blocks=blocks, blocks_per_id=1, block_tokens=tokens,
            block_stride=2 * half * HEADS, heads=HEADS, head_stride=2 * half, run_tokens=1,
            fields=(Field(0, ITEM, tokens, 1, 1), Field(half, 1, 0, ITEM, ITEM)),
            total_heads=HEADS, tp_rank=0, tp_size=1,
        )  # fmt: skip
        return np.zeros((blocks, HEADS, 2, half), dtype=np.uint8), layout

    def numbers(cache: NDArray[np.uint8], ids: list[int], tokens: int) -> Any:
        """[head, token, keys and values]: views."""
        keys = cache[ids, :, 0].reshape(len(ids), HEADS, ITEM, tokens).transpose(1, 0, 3, 2)
        values = cache[ids, :, 1].reshape(len(ids), HEADS, tokens, ITEM).transpose(1, 0, 2, 3)
        return np.concatenate([side.reshape(HEADS, -1, ITEM) for side in (keys, values)], axis=2)

    (remote, theirs), source = made(9, 12), np.random.default_rng(1)
    remote[...] = source.integers(1, 256, remote.shape)
    for blocks, tokens, ids in ((9, 4, [3, 1, 4, 8, 5, 2]), (5, 8, [4, 0, 2]), (7, 12, [6, 2])):
        local, ours = made(blocks, tokens)
        plan_of = plan(ours, theirs, ids, [7, 3], 0, 24, HeadSource(0, 0, 0, HEADS))
        for (_, offset, size), (_, start, _) in zip(plan_of.local.tolist(), plan_of.remote.tolist()):
            local.reshape(-1)[offset : offset + size] = remote.reshape(-1)[start : start + size]
        assert (numbers(local, ids, tokens) == numbers(remote, [7, 3], 12)).all()
        if tokens == 12:
            assert len(plan_of.local) == 2  # blocks that are alike go whole


def test_what_does_not_fit_together() -> None:
    ours = Cache("lbhpri", 9, 8, run=2).layout

    def refused(match: str, remote: KvLayout, ids: list[int], remote_ids: list[int], first: int, count: int) -> None:
        with pytest.raises(LayoutMismatch, match=match):
            plan(ours, remote, ids, remote_ids, first, count, HeadSource(0, 0, 0, HEADS))

    refused("kind: 'test' here, 'other'", replace(ours, kind="other"), [0], [0], 0, 8)
    refused("lacks 1 layers, one of them 'layer 2'", replace(ours, layers=ours.layers[:2]), [0], [0], 0, 8)
    refused("blocks of 8 tokens here and 7 at the peer split runs", replace(ours, block_tokens=7), [0], [0], 0, 5)
    refused("split runs", replace(ours, run_tokens=4), [0], [0], 0, 8)
    other = replace(ours, fields=(ours.fields[0]._replace(run_bytes=6),))
    refused(r"a head is \[\(2, 12\)\] here, \[\(2, 6\)\] at", other, [0], [0], 0, 8)
    refused(r"a remote block id is not within \[0, 9\)", ours, [0], [9], 0, 8)
    refused(r"a local block id is not within \[0, 9\)", ours, [-1], [0], 0, 8)
    refused("1 local blocks are too few for 9 tokens", ours, [0], [0, 1], 0, 9)
    refused("1 remote blocks are too few for 9 tokens", ours, [0, 1], [0], 0, 9)
    refused("token 4 is not the first of a block", ours, [0], [0], 4, 8)
    nothing = plan(ours, ours, [], [0], 8, 8, HeadSource(0, 0, 0, HEADS))
    assert len(nothing.local) == len(nothing.remote) == len(nothing.owners) == 0


def test_ids_that_stand_for_more_blocks_than_there_is_memory_for() -> None:
    """Who says so is a peer."""
    ours = Cache("lbhpri", 9, 8).layout
    made = plan(ours, replace(ours, blocks_per_id=1 << 40, num_blocks=1 << 50), [4], [0], 0, 8, HeadSource(0, 0, 0, HEADS))
    expected = plan(ours, ours, [4], [0], 0, 8, HeadSource(0, 0, 0, HEADS))
    assert (made.remote == expected.remote).all() and (made.local == expected.local).all()
