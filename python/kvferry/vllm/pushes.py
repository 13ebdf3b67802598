# SPDX-License-Identifier: Apache-2.0
"""A prefilling worker's pushes: each layer's bytes go to the readers as soon as they are computed. Needs no vLLM."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import Addresses, Operation
from .layout import KvLayout, LayoutMismatch, Plan, plan
from .leases import Leases
from .push_messages import ENDED, Announced, Ended, Progress, Want
from .steps import Runner, Steps

__all__ = ["Pushes"]

_logger = logging.getLogger("kvferry.vllm")

#: Transfers that readers have asked for and no request has come for, and those that are over: no more are remembered.
_MOST_REMEMBERED = 1 << 16


@dataclass(eq=False)
class _Reader:
    """Who a transfer is pushed to."""

    want: Want
    #: Of each of the reader's layers, how many tokens are pushed or on their way.
    pushed: dict[str, int]
    operations: set[Operation] = field(default_factory=set)
    #: Writes whose plan is being made, or that are under way.
    writes: int = 0
    #: Indexes of the wanted blocks that don't have their bytes.
    failed: set[int] = field(default_factory=set)
    #: Why nothing more is pushed.
    broken: str = ""
    ended: bool = False
    #: The last plan, of one layer at offset 0, and its first and last token. For the thread that makes plans.
    planned: tuple[tuple[int, int], Plan] | None = None

    @property
    def unit(self) -> int:
        """Tokens of a block of the reader's."""
        return self.want.layout.block_tokens * self.want.layout.blocks_per_id


@dataclass(eq=False)
class _Push:
    announced: Announced
    #: Of each layer, how many tokens are computed.
    computed: dict[str, int]
    block_ids: list[int] = field(default_factory=list)
    readers: dict[int, _Reader] = field(default_factory=dict)
    #: All who have asked.
    asked: set[int] = field(default_factory=set)


class Pushes:
    """The pushes of one worker. Its methods want the runner's lock held."""

    def __init__(
        self, runner: Runner, channel: Any, layout: KvLayout, bases: NDArray[np.uint64], leases: Leases,
        timeout: float, lease: float, checksums: bool | None,
    ) -> None:  # fmt: skip
        self._runner = runner
        self._channel = channel
        self._layout = layout
        self._layers = {name: (region, offset) for name, region, offset in layout.layers}
        self._bases = bases
        self._leases = leases
        self._timeout = timeout
        self._lease = lease
        self._checksums = checksums
        self._by_request: dict[str, _Push] = {}
        self._by_transfer: dict[str, _Push] = {}
        #: What the step that is being computed adds: pushes, and how many tokens they have then.
        self._current: list[tuple[_Push, int]] = []
        #: Transfers that were asked for before their request came, and when.
        self._early: OrderedDict[str, tuple[float, list[Want]]] = OrderedDict()
        #: Transfers whose requests are gone.
        self._over: OrderedDict[str, None] = OrderedDict()

    # The engine's orders

    def announce(self, announced: Announced) -> None:
        self._leases.expect(announced.request_id)
        push = _Push(announced, dict.fromkeys(self._layers, 0))
        self._by_request[announced.request_id] = self._by_transfer[announced.transfer_id] = push
        for want in self._early.pop(announced.transfer_id, (0.0, []))[1]:
            reason = self._attach(push, want)
            if reason and want.heads.num_heads:
                self._runner.perform(self._tell(want, Ended(transfer_id=want.transfer_id, failed=(), reason=reason)))

    def proceed(self, progress: Progress) -> None:
        """A step that is about to be computed."""
        push = self._by_request.get(progress.request_id)
        if push is not None:
            push.block_ids += progress.block_ids
            self._current.append((push, progress.num_tokens))

    def layer_computed(self, name: str) -> None:
        """Of the step, in this layer."""
        for push, tokens in self._current:
            if name in push.computed:
                push.computed[name] = max(push.computed[name], tokens)
                self._advance_all(push, (name,))

    def step_computed(self) -> None:
        """Also layers that have no attention of their own."""
        current, self._current = self._current, []
        for push, tokens in current:
            for name, before in push.computed.items():
                push.computed[name] = max(before, tokens)
            self._advance_all(push, push.computed)

    def drop(self, request_id: str, reason: str) -> None:
        """The request's blocks are no longer its own."""
        push = self._by_request.pop(request_id, None)
        if push is None:
            return
        transfer_id = push.announced.transfer_id
        del self._by_transfer[transfer_id]
        self._over[transfer_id] = None
        while len(self._over) > _MOST_REMEMBERED:
            self._over.popitem(last=False)
        self._current = [(other, tokens) for other, tokens in self._current if other is not push]
        for reader in list(push.readers.values()):
            self._break(push, reader, reason)

    # Readers' messages

    def want(self, want: Want) -> str:
        """Why a transfer isn't pushed; empty if it is, or will be."""
        push = self._by_transfer.get(want.transfer_id)
        if push is not None:
            return self._attach(push, want)
        if want.transfer_id in self._over:
            return "its request has ended, or was taken the blocks of"
        since, wants = self._early.setdefault(want.transfer_id, (time.monotonic(), []))
        wants.append(want)
        while len(self._early) > _MOST_REMEMBERED:
            self._early.popitem(last=False)
        return ""

    def stop(self, transfer_id: str, rank: int) -> None:
        """Nothing of the transfer is begun any more, and what is under way ends."""
        push = self._by_transfer.get(transfer_id)
        if push is not None:
            reader = push.readers.get(rank)
            if reader is not None:
                self._break(push, reader, "the reader has given it up")
        elif transfer_id in self._early:
            since, wants = self._early[transfer_id]
            nothing = [msgspec.structs.replace(one, heads=one.heads._replace(num_heads=0)) for one in wants]
            self._early[transfer_id] = since, [new if new.reader == rank else old for new, old in zip(nothing, wants)]

    def renew(self, transfer_id: str) -> bool:
        """Whether anything of it is still to be expected."""
        push = self._by_transfer.get(transfer_id)
        if push is not None:
            return self._leases.renew(push.announced.request_id)
        since, _ = self._early.get(transfer_id, (float("-inf"), None))
        if time.monotonic() - since < self._lease:
            return True
        self._early.pop(transfer_id, None)
        return False

    def _attach(self, push: _Push, want: Want) -> str:
        """A reader more. Why it isn't one; empty if it is."""
        announced = push.announced
        if want.reader in push.asked:
            return "another request of the reader's has asked for it"
        if want.heads.num_heads == 0:
            push.asked.add(want.reader)
            self._leases.release(announced.request_id, want.reader, want.readers)
            return ""
        if (want.prompt_digest, want.num_tokens) != (announced.prompt_digest, announced.num_tokens):
            return "its prompt, adapter or images are not those of the request here"
        ours = self._layout
        if (want.asked_rank, want.asked_ranks) != (ours.tp_rank, ours.tp_size):
            return f"here is rank {ours.tp_rank} of {ours.tp_size}, and not {want.asked_rank} of {want.asked_ranks}"
        missing = {name for name, _, _ in want.layout.layers} - set(self._layers)
        if missing:
            return f"{len(missing)} of its layers are not here, one of them {min(missing)!r}"
        push.asked.add(want.reader)
        reader = push.readers[want.reader] = _Reader(
            want, {name: want.first_token for name, _, _ in want.layout.layers}
        )
        self._advance(push, reader, push.computed)
        self._end_if_done(push, reader)
        return ""

    # Pushing

    def _advance_all(self, push: _Push, names: Iterable[str]) -> None:
        for reader in list(push.readers.values()):
            self._advance(push, reader, names)

    def _advance(self, push: _Push, reader: _Reader, names: Iterable[str]) -> None:
        """Pushes what is computed of some layers: whole blocks of the reader's, and at the end the rest."""
        if reader.broken:
            return
        parts: dict[tuple[int, int], list[str]] = {}
        for name in names:
            first, end = reader.pushed.get(name), push.computed[name]
            if first is None:
                continue
            end = reader.want.num_tokens if end >= reader.want.num_tokens else end - end % reader.unit
            if end > first:
                reader.pushed[name] = end
                parts.setdefault((first, end), []).append(name)
        for (first, end), layers in parts.items():
            reader.writes += 1
            self._runner.perform(self._write(push, reader, first, end, layers))

    def _write(self, push: _Push, reader: _Reader, first: int, end: int, names: list[str]) -> Steps:
        want, blocks = reader.want, tuple(push.block_ids)
        try:
            made = yield lambda: self._plan(reader, blocks, first, end, names)
            if not reader.broken:
                sources, targets, owners = made
                operation = self._channel.submit_write(
                    self._runner.queue, Addresses(sources), want.peer_id, remote_ranges=targets, statuses=True,
                    timeout=self._timeout, checksums=self._checksums if want.checksums is None else want.checksums,
                )  # fmt: skip
                reader.operations.add(operation)
                yield operation
                reader.operations.discard(operation)
                self._written(push, reader, operation, owners + (first - want.first_token) // reader.unit)
        except Exception as error:
            self._break(push, reader, str(error))
        reader.writes -= 1
        self._end_if_done(push, reader)

    def _written(self, push: _Push, reader: _Reader, operation: Operation, owners: NDArray[np.int64]) -> None:
        error = operation.error
        if error is None:
            return
        if len(operation.statuses) == len(owners) and not error.peer_failed:
            bad = owners[np.array([status is not None for status in operation.statuses])]
            reader.failed.update(np.unique(bad).tolist())
        else:
            self._break(push, reader, str(error))
        if not reader.broken:
            _logger.error("request %s: pushing to %s: %s", push.announced.request_id, reader.want.peer_id, error)

    def _plan(
        self, reader: _Reader, blocks: tuple[int, ...], first: int, end: int, names: list[str]
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]]:
        """Addresses here, ranges there, and the block of each. Layers lie alike: one's plan does for all."""
        want = reader.want
        if reader.planned is None or reader.planned[0] != (first, end):
            theirs, ours = (replace(side, layers=(("", 0, 0),)) for side in (want.layout, self._layout))
            ids = want.block_ids[(first - want.first_token) // reader.unit :]
            reader.planned = (first, end), plan(theirs, ours, ids, blocks, first, end, want.heads)
        there, here, owners = reader.planned[1]
        if len(owners) == 0:
            raise LayoutMismatch(f"tokens [{first}, {end}) are none")
        at = {name: (region, offset) for name, region, offset in want.layout.layers}
        sources = np.empty((len(names), len(owners), 2), dtype=np.uint64)
        targets = np.empty((len(names), len(owners), 3), dtype=np.uint64)
        for index, name in enumerate(names):
            region, offset = self._layers[name]
            sources[index, :, 0] = self._bases[region] + np.uint64(offset) + here[:, 1]
            sources[index, :, 1] = here[:, 2]
            region, offset = at[name]
            targets[index] = there
            targets[index, :, 0] = region
            targets[index, :, 1] += np.uint64(offset)
        return sources.reshape(-1, 2), targets.reshape(-1, 3), np.tile(owners, len(names))

    def _break(self, push: _Push, reader: _Reader, reason: str) -> None:
        if not reader.broken:
            reader.broken = reason
            for operation in reader.operations:
                operation.cancel()
        self._end_if_done(push, reader)

    def _end_if_done(self, push: _Push, reader: _Reader) -> None:
        """The reader is told, and the blocks are no longer needed for it."""
        want = reader.want
        done = reader.broken or all(pushed >= want.num_tokens for pushed in reader.pushed.values())
        if not done or reader.writes or reader.ended:
            return
        reader.ended = True
        push.readers.pop(want.reader, None)
        self._leases.release(push.announced.request_id, want.reader, want.readers)
        ended = Ended(transfer_id=want.transfer_id, failed=tuple(sorted(reader.failed)), reason=reader.broken)
        self._runner.perform(self._tell(want, ended))

    def _tell(self, want: Want, ended: Ended) -> Steps:
        try:
            operation = self._channel.submit_notify(
                self._runner.queue, want.peer_id, msgspec.msgpack.encode(ended), ENDED, timeout=self._timeout
            )
            yield operation
            operation.result()
        except Exception as error:
            _logger.warning("%s isn't told that transfer %s has ended: %s", want.peer_id, want.transfer_id, error)
