# SPDX-License-Identifier: Apache-2.0
"""Where tokens lie in a worker's KV cache, and which bytes of another worker's cache are the same tokens.

Nothing here needs vLLM or a channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MAX_ROWS",
    "Field",
    "HeadSource",
    "KvLayout",
    "LayoutMismatch",
    "Plan",
    "check_spec",
    "head_sources",
    "plan",
    "readers_of",
]


#: Ranges of one read. Beyond them making the plan takes longer than computing the prompt.
MAX_ROWS = 1 << 20


class LayoutMismatch(Exception):
    """Two caches between which nothing can be loaded."""


def check_spec(spec: Any) -> None:
    """Raises ValueError for a kind of KV cache (vLLM's ``KVCacheSpec``) that isn't kept whole.

    With a sliding window vLLM gives blocks back that the window has left, and names block 0 in their place.
    """
    if type(spec).__name__ not in ("FullAttentionSpec", "MLAAttentionSpec"):
        raise ValueError(f"KvferryConnector supports full attention and MLA, and not {type(spec).__name__}")


class Field(NamedTuple):
    """Bytes of a head: ``rows``, ``stride`` apart, each with the runs of a block one after the other."""

    offset: int
    rows: int
    stride: int
    run_bytes: int
    run_stride: int


@dataclass(frozen=True)
class KvLayout:
    """A worker's KV cache. Sizes, strides and offsets are in bytes.

    A layer's cache is made of blocks, a block of heads, a head of fields, a field of runs: tokens whose bytes are stored
    together and can't be told apart from outside.
    """

    #: What has to be equal for bytes to mean the same: the model, types, the format of a run.
    kind: str
    #: For each layer its name, its region, and the offset of its block 0 there.
    layers: tuple[tuple[str, int, int], ...]
    num_blocks: int
    #: How many of these blocks one block id of the scheduler's stands for.
    blocks_per_id: int
    block_tokens: int
    block_stride: int
    heads: int
    head_stride: int
    run_tokens: int
    fields: tuple[Field, ...]
    #: Heads of the whole model, and the share of them that this worker has.
    total_heads: int
    tp_rank: int
    tp_size: int

    def fault(self) -> str:
        """A number that makes no sense; empty if all do. For a layout that comes from outside."""
        if not self.layers or len({name for name, _, _ in self.layers}) < len(self.layers) or not self.fields:
            return "no layer, one of them twice, or no field"
        above = {name: getattr(self, name) for name in (
            "num_blocks", "blocks_per_id", "block_tokens", "block_stride", "heads", "run_tokens", "total_heads", "tp_size",
        )}  # fmt: skip
        for number, field in enumerate(self.fields):
            above[f"rows of field {number}"], above[f"run_bytes of field {number}"] = field.rows, field.run_bytes
        for name, value in above.items():
            if value < 1:
                return f"{name} is {value}"
        if self.block_tokens % self.run_tokens or not 0 <= self.tp_rank < self.tp_size:
            return f"runs of {self.run_tokens} in {self.block_tokens} tokens, rank {self.tp_rank} of {self.tp_size}"
        offsets = [self.head_stride, *(number for _, *numbers in self.layers for number in numbers)]
        offsets += [number for field in self.fields for number in (field.offset, field.stride, field.run_stride)]
        return "" if min(offsets) >= 0 else f"an offset or a stride is {min(offsets)}"

    def with_whole_heads(self) -> KvLayout | None:
        """The same with one field, if a head's bytes have no gaps: fewer ranges, for caches that lie the same way."""
        runs = self.block_tokens // self.run_tokens
        size = sum(field.rows * field.run_bytes * runs for field in self.fields)
        end = max(
            field.offset + (field.rows - 1) * field.stride + (runs - 1) * field.run_stride + field.run_bytes
            for field in self.fields
        )
        if size != end:
            return None
        return replace(self, run_tokens=self.block_tokens, fields=(Field(0, 1, 0, size, size),))


class HeadSource(NamedTuple):
    """Heads that a worker takes from one worker of the other side."""

    rank: int
    local_first: int
    remote_first: int
    num_heads: int


class Plan(NamedTuple):
    """A transfer: row ``i`` of ``local`` and of ``remote`` are the same tokens of the same layer and heads."""

    #: Rows of (region, offset, size).
    local: NDArray[np.uint64]
    remote: NDArray[np.uint64]
    #: For each row, which of the local block ids it belongs to: an index.
    owners: NDArray[np.int64]


def _held(total: int, tp_size: int, rank: int) -> tuple[int, int]:
    """The first head and the number of heads of a rank. With fewer heads than ranks several ranks have the same."""
    return rank * total // tp_size, max(1, total // tp_size)


def head_sources(total: int, tp_size: int, rank: int, remote_tp_size: int) -> list[HeadSource]:
    """Which heads rank ``rank`` of ``tp_size`` takes from which of the other side's ranks. Each head once."""
    first, count = _held(total, tp_size, rank)
    holders: dict[tuple[int, int], list[int]] = {}
    for remote in range(remote_tp_size):
        holders.setdefault(_held(total, remote_tp_size, remote), []).append(remote)
    sources = []
    for (remote_first, remote_count), ranks in holders.items():
        low, high = max(first, remote_first), min(first + count, remote_first + remote_count)
        if low < high:
            # Ranks that have the same heads share the work.
            chosen = ranks[rank * len(ranks) // tp_size]
            sources.append(HeadSource(chosen, low - first, low - remote_first, high - low))
    return sources


def readers_of(total: int, tp_size: int, remote_tp_size: int) -> list[int]:
    """For each rank of the other side, how many of the ``tp_size`` ranks take heads from it."""
    readers = [0] * remote_tp_size
    for rank in range(tp_size):
        for source in head_sources(total, tp_size, rank, remote_tp_size):
            readers[source.rank] += 1
    return readers


def _check(local: KvLayout, remote: KvLayout) -> None:
    for name in ("kind", "total_heads"):
        ours, theirs = getattr(local, name), getattr(remote, name)
        if ours != theirs:
            raise LayoutMismatch(f"{name}: {ours!r} here, {theirs!r} at the peer")
    missing = {name for name, _, _ in local.layers} - {name for name, _, _ in remote.layers}
    if missing:
        raise LayoutMismatch(f"the peer lacks {len(missing)} layers, one of them {min(missing)!r}")


def _in_common(local: KvLayout, remote: KvLayout) -> tuple[KvLayout, KvLayout, int]:
    """How to look at the two caches, and the tokens that are together in both."""
    if (local.block_tokens, local.fields) == (remote.block_tokens, remote.fields):
        ours_whole, theirs_whole = local.with_whole_heads(), remote.with_whole_heads()
        if ours_whole is not None and theirs_whole is not None:
            local, remote = ours_whole, theirs_whole
    step = math.gcd(local.block_tokens, remote.block_tokens)
    if local.run_tokens != remote.run_tokens or step % local.run_tokens:
        raise LayoutMismatch(f"blocks of {local.block_tokens} tokens here and {remote.block_tokens} at the peer split runs")
    ours, theirs = ([(field.rows, field.run_bytes) for field in side.fields] for side in (local, remote))
    if ours != theirs:
        raise LayoutMismatch(f"a head is {ours} here, {theirs} at the peer")
    return local, remote, step


def _blocks(ids: Sequence[int], layout: KvLayout, indexes: NDArray[np.int64], side: str) -> NDArray[np.int64]:
    """Those at some indexes of a request's, and no others: a peer says how many blocks an id stands for."""
    ids_there = np.asarray(ids, dtype=np.int64)[indexes // layout.blocks_per_id]
    blocks: NDArray[np.int64] = ids_there * layout.blocks_per_id + indexes % layout.blocks_per_id
    if blocks.min() < 0 or blocks.max() >= layout.num_blocks:
        raise LayoutMismatch(f"a {side} block id is not within [0, {layout.num_blocks // layout.blocks_per_id})")
    return blocks


def plan(
    local: KvLayout,
    remote: KvLayout,
    local_ids: Sequence[int],
    remote_ids: Sequence[int],
    first_token: int,
    num_tokens: int,
    heads: HeadSource,
) -> Plan:
    """Which bytes tokens [first_token, num_tokens) of a request are, here and at the peer.

    ``local_ids``: the blocks from the one with ``first_token`` on, which is the first of its block. ``remote_ids``: the
    blocks of the request from token 0 on. Whole runs are moved; the last one may have bytes of no token.

    Raises LayoutMismatch where the caches don't fit together, or the blocks are too few.
    """
    _check(local, remote)
    if first_token % (local.block_tokens * local.blocks_per_id):
        raise LayoutMismatch(f"token {first_token} is not the first of a block")
    local, remote, step = _in_common(local, remote)
    # The last step is moved whole.
    tokens = np.arange(first_token, num_tokens, step, dtype=np.int64)
    if len(tokens) == 0:
        empty = np.zeros((0, 3), dtype=np.uint64)
        return Plan(empty, empty, np.zeros(0, dtype=np.int64))
    if (num_tokens - first_token - 1) // local.block_tokens >= len(local_ids) * local.blocks_per_id:
        raise LayoutMismatch(f"{len(local_ids)} local blocks are too few for {num_tokens - first_token} tokens")
    if (num_tokens - 1) // remote.block_tokens >= len(remote_ids) * remote.blocks_per_id:
        raise LayoutMismatch(f"{len(remote_ids)} remote blocks are too few for {num_tokens} tokens")

    for side, first, there in (
        ("here", heads.local_first, local.heads),
        ("at the peer", heads.remote_first, remote.heads),
    ):
        if first < 0 or heads.num_heads < 1 or first + heads.num_heads > there:
            raise LayoutMismatch(f"heads [{first}, {first + heads.num_heads}) of {there} {side}")
    pieces = _pieces(local, remote, step, heads)
    count = len(local.layers) * len(tokens) * len(pieces)
    if count > MAX_ROWS:
        raise LayoutMismatch(f"{count} ranges for {num_tokens - first_token} tokens are more than {MAX_ROWS}")
    at = {name: (region, offset) for name, region, offset in remote.layers}
    local_layers = np.array([(region, offset) for _, region, offset in local.layers], dtype=np.int64)
    remote_layers = np.array([at[name] for name, _, _ in local.layers], dtype=np.int64)
    indexes = (tokens - first_token) // local.block_tokens
    ours = _blocks(local_ids, local, indexes, "local")
    theirs = _blocks(remote_ids, remote, tokens // remote.block_tokens, "remote")

    def rows(
        layout: KvLayout, layers: NDArray[np.int64], blocks: NDArray[np.int64], head: int, side: int
    ) -> NDArray[np.uint64]:
        steps = blocks * layout.block_stride + head * layout.head_stride
        runs = tokens % layout.block_tokens // layout.run_tokens
        offsets = steps[:, None] + runs[:, None] * pieces[:, 3 + side] + pieces[:, side]
        made = np.empty((len(layers), *offsets.shape, 3), dtype=np.uint64)
        made[..., 0] = layers[:, 0, None, None]
        made[..., 1] = layers[:, 1, None, None] + offsets
        made[..., 2] = pieces[:, 2]
        return made.reshape(-1, 3)

    return Plan(
        rows(local, local_layers, ours, heads.local_first, 0),
        rows(remote, remote_layers, theirs, heads.remote_first, 1),
        np.tile(np.repeat(indexes // local.blocks_per_id, len(pieces)), len(local.layers)),
    )


def _pieces(local: KvLayout, remote: KvLayout, step: int, heads: HeadSource) -> NDArray[np.int64]:
    """What a step of tokens in some heads is made of: rows of (local offset, remote offset, size, and how far apart runs are
    here and at the peer)."""
    pieces = []
    for ours, theirs in zip(local.fields, remote.fields):
        size, offsets = _coalesce(
            ours.run_bytes,
            [
                (step // local.run_tokens, ours.run_stride, theirs.run_stride),
                (ours.rows, ours.stride, theirs.stride),
                (heads.num_heads, local.head_stride, remote.head_stride),
            ],
        )
        made = np.empty((len(offsets), 5), dtype=np.int64)
        made[:, :2] = offsets + [ours.offset, theirs.offset]
        made[:, 2:] = size, ours.run_stride, theirs.run_stride
        pieces.append(made)
    return np.concatenate(pieces)


def _coalesce(size: int, dimensions: list[tuple[int, int, int]]) -> tuple[int, NDArray[np.int64]]:
    """The longest runs of bytes that are together on both sides, and the pairs of offsets at which they lie.

    A dimension is (extent, local stride, remote stride).
    """
    rest: list[tuple[int, int, int]] = []
    for extent, ours, theirs in sorted(dimensions, key=lambda dimension: dimension[1]):
        if extent == 1:
            continue
        if not rest and ours == size and theirs == size:
            size *= extent
        else:
            rest.append((extent, ours, theirs))
    offsets = np.zeros((1, 2), dtype=np.int64)
    for extent, ours, theirs in reversed(rest):
        steps = np.arange(extent, dtype=np.int64)[:, None] * np.array([[ours, theirs]], dtype=np.int64)
        offsets = (offsets[:, None, :] + steps[None, :, :]).reshape(-1, 2)
    return size, offsets
