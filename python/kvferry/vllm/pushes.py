# SPDX-License-Identifier: Apache-2.0
"""A prefilling worker's pushes: each layer's bytes go to the readers as soon as they are computed. Needs no vLLM."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import Addresses, Operation
from .early_wants import GIVEN_UP, OTHERS, EarlyWants
from .layout import MAX_ROWS, KvLayout, LayoutMismatch, Plan, plan
from .leases import Leases
from .push_messages import ENDED, MOST_REMEMBERED, Announced, Ended, Progress, Want
from .steps import Runner, Steps

__all__ = ["Pushes"]

_logger = logging.getLogger("kvferry.vllm")


@dataclass
class _Asked:
    """A reader's question, as it was asked last."""

    peer_id: str
    question: str
    attempt: int
    given_up: bool = False


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
    asked: dict[int, _Asked] = field(default_factory=dict)


class Pushes:
    """The pushes of one worker. Its methods want the runner's lock held."""

    def __init__(
        self, runner: Runner, layout: KvLayout, bases: NDArray[np.uint64], leases: Leases,
        timeout: float, lease: float, checksums: bool | None,
    ) -> None:  # fmt: skip
        self._runner = runner
        #: Readers may ask before it is here.
        self.channel: Any = None
        self._layout = layout
        self._layers = {name: (region, offset) for name, region, offset in layout.layers}
        self._bases = bases
        self._leases = leases
        self._timeout = timeout
        self._checksums = checksums
        self._by_request: dict[str, _Push] = {}
        self._by_transfer: dict[str, _Push] = {}
        #: What the step that is being computed adds: pushes, and how many tokens they have then.
        self._current: list[tuple[_Push, int]] = []
        #: Questions whose request hasn't come yet.
        self._early = EarlyWants(lease)
        #: Transfers to which nobody is added any more, and why.
        self._over: OrderedDict[str, str] = OrderedDict()
        #: Transfers whose readers are being told of their end, and how many of them.
        self._telling: Counter[str] = Counter()

    # The engine's orders

    def announce(self, announced: Announced) -> None:
        request_id, transfer_id = announced.request_id, announced.transfer_id
        known = self._over.get(transfer_id, "")
        if request_id in self._by_request or transfer_id in self._by_transfer:
            known = "another request has it"
        if known:  # the other's readers and its end would be taken for this one's
            _logger.error("request %s is not pushed: of transfer %r is known: %s", request_id, transfer_id, known)
            return
        self._leases.expect(request_id)
        push = _Push(announced, dict.fromkeys(self._layers, 0))
        self._by_request[request_id] = self._by_transfer[transfer_id] = push
        for want in self._early.take(transfer_id):
            reason = self._attach(push, want)
            if reason:
                self._tell_refused(want, reason)

    def knows(self, request_id: str) -> bool:
        """Whether the request is pushed, or can be."""
        return request_id in self._by_request

    def refuse(self, transfer_id: str, reason: str) -> None:
        """Its request has come, and is not pushed."""
        self._note_over(transfer_id, reason)
        for want in self._early.take(transfer_id):
            self._tell_refused(want, reason)

    def sweep(self) -> None:
        """Readers whose request hasn't come for a lease are told that it doesn't."""
        for transfer_id, wants in self._early.take_old():
            reason = "no request has come for it"
            self._note_over(transfer_id, reason)
            for want in wants:
                self._tell_refused(want, reason)

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
        if self._by_transfer.get(transfer_id) is push:
            del self._by_transfer[transfer_id]
        self._note_over(transfer_id, "its request has ended, or was taken the blocks of")
        self._current = [(other, tokens) for other, tokens in self._current if other is not push]
        for reader in list(push.readers.values()):
            self._break(push, reader, reason)

    def _note_over(self, transfer_id: str, reason: str) -> None:
        self._over[transfer_id] = reason
        while len(self._over) > MOST_REMEMBERED:
            self._over.popitem(last=False)

    # Readers' messages

    def want(self, want: Want) -> str:
        """Why a transfer isn't pushed; empty if it is, or will be."""
        wrong = want.fault()
        if wrong:
            return wrong
        self.sweep()
        push = self._by_transfer.get(want.transfer_id)
        if push is not None:
            return self._attach(push, want)
        return self._over.get(want.transfer_id) or self._early.add(want)

    def stop(self, transfer_id: str, rank: int, peer_id: str) -> None:
        """Nothing of the transfer to this reader is begun any more, and what is under way ends."""
        push = self._by_transfer.get(transfer_id)
        if push is None:
            self._early.stop(transfer_id, rank, peer_id)
            return
        asked = push.asked.get(rank)
        if asked is None or asked.peer_id != peer_id:
            return
        asked.given_up = True
        reader = push.readers.get(rank)
        if reader is not None:
            self._break(push, reader, GIVEN_UP)

    def renew(self, transfer_id: str) -> bool:
        """Whether anything of it is still to be expected."""
        push = self._by_transfer.get(transfer_id)
        if push is not None:
            return self._leases.renew(push.announced.request_id)
        self.sweep()
        return transfer_id in self._early or transfer_id in self._telling

    def _attach(self, push: _Push, want: Want) -> str:
        """A reader more. Why it isn't one; empty if it is."""
        announced = push.announced
        asked = _Asked(want.peer_id, want.question, want.attempt)
        before = push.asked.get(want.reader)
        if before is not None:
            if not want.repeats(before.question, before.attempt):
                return OTHERS
            if before.given_up or want.heads.num_heads == 0:
                return GIVEN_UP
        if want.heads.num_heads == 0:
            push.asked[want.reader] = replace(asked, given_up=True)
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
        if before is not None and before.peer_id != want.peer_id:
            former = push.readers.pop(want.reader, None)
            if former is None:
                return "it has ended, and over another connection"
            former.ended = True  # nobody is told, and the blocks are needed on
            self._break(push, former, "it is wanted over another connection")
        push.asked[want.reader] = asked
        if want.reader in push.readers or before is not None and before.peer_id == want.peer_id:
            return ""  # it goes on, or the last word on it has been said
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
        try:
            self._write_new(push, reader, names)
        except Exception as error:  # one reader's, and no matter of the engine's
            _logger.exception("request %s is not pushed to %s", push.announced.request_id, reader.want.peer_id)
            self._break(push, reader, str(error))

    def _write_new(self, push: _Push, reader: _Reader, names: Iterable[str]) -> None:
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
                operation = self.channel.submit_write(
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
        want, is_first = reader.want, reader.planned is None
        if reader.planned is None or reader.planned[0] != (first, end):
            theirs, ours = (replace(side, layers=(("", 0, 0),)) for side in (want.layout, self._layout))
            ids = want.block_ids[(first - want.first_token) // reader.unit :]
            reader.planned = (first, end), plan(theirs, ours, ids, blocks, first, end, want.heads)
        there, here, owners = reader.planned[1]
        if len(owners) == 0:
            raise LayoutMismatch(f"tokens [{first}, {end}) are none")
        if is_first:  # these are whole blocks, or all
            ranges = len(owners) * len(reader.pushed) * (want.num_tokens - want.first_token) // (end - first)
            if ranges > MAX_ROWS:
                raise LayoutMismatch(f"some {ranges} ranges in all layers are more than {MAX_ROWS}")
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

    def _tell_refused(self, want: Want, reason: str) -> None:
        if want.heads.num_heads:
            self._runner.perform(self._tell(want, Ended(transfer_id=want.transfer_id, failed=(), reason=reason)))

    def _tell(self, want: Want, ended: Ended) -> Steps:
        self._telling[want.transfer_id] += 1
        try:
            operation = self.channel.submit_notify(
                self._runner.queue, want.peer_id, msgspec.msgpack.encode(ended), ENDED, timeout=self._timeout
            )
            yield operation
            operation.result()
        except Exception as error:
            _logger.warning("%s isn't told that transfer %s has ended: %s", want.peer_id, want.transfer_id, error)
        self._telling -= Counter([want.transfer_id])
