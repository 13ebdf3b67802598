# SPDX-License-Identifier: Apache-2.0
"""The connector in vLLM's workers: reads blocks from prefilling workers, and keeps blocks for decoding ones.

A load is confirmed: when its bytes are here, the prefilling worker is asked whether the blocks were the request's until
then. Only its yes makes them count, so a lease that ran out costs time and never a wrong token. Needs no vLLM.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import Access, Addresses, Operation, PeerEvent, Region, SideMessage, TransferError
from .layout import HeadSource, KvLayout, LayoutMismatch, Plan, head_sources, plan, readers_of
from .leases import Leases
from .messages import LAYOUT, RELEASE, RENEW, Remote, Server, layout_from, layout_message, message, parse, parts_of
from .options import Options, channel_class, channel_keywords, url_of
from .renewals import Renewals
from .scheduler import Load, Step
from .steps import Asking, Runner, Steps, Waited

__all__ = ["MOST_ASKED", "RENEWAL_BYTES", "Loading", "Worker"]

_logger = logging.getLogger("kvferry.vllm")

#: Of request ids in one renewal: well below a channel's ``max_handshake_bytes``.
RENEWAL_BYTES = 32 << 10
#: How often one question is asked at most, where the connection is lost each time before the answer comes. A peer that takes
#: none of its size looks like that, too.
MOST_ASKED = 3


@dataclass
class Loading:
    """A load under way."""

    load: Load
    #: What makes its bytes come.
    operations: set[Operation] = field(default_factory=set)
    cancelled: bool = False
    #: Block ids that don't have their bytes.
    failed: set[int] = field(default_factory=set)


class Worker:
    """One worker's channel, and what goes on in it. The engine's thread gives orders and asks for what has ended; a
    thread of its own takes each load from step to step, and another one makes plans.

    name: says which engine this is, for people.
    memory: the (address, size) of each region that ``layout`` numbers; the caller keeps it.
    serving: whether prompts are computed here for others.
    taking: whether what others have computed comes here.
    """

    def __init__(
        self,
        options: Options,
        name: str,
        layout: KvLayout,
        memory: Iterable[tuple[int, int]],
        serving: bool,
        taking: bool = True,
    ) -> None:
        self._options = options
        #: Who this is to others. An engine's id may be a configured one, which its successor and its replicas have too.
        self.instance_id = f"{name}/{layout.tp_rank}/{uuid.uuid4().hex}"
        #: As whom its channel connects.
        self._local_id = options.key_id(layout.tp_rank) or self.instance_id
        self._layout = layout
        access = self._access(serving, taking)
        regions = [Region(part, page_size=part[1], access=access) for part in memory]
        self._bases = np.array([region.address for region in regions], dtype=np.uint64)
        self._leases = Leases(options.lease)
        self._runner = Runner()
        self._queue, self._lock, self._perform = self._runner.queue, self._runner.lock, self._runner.perform
        self._loadings: dict[str, Loading] = {}
        self._received: set[str] = set()
        self._failed: set[int] = set()
        self._reported_failed: set[int] = set()
        #: The layouts of peers, by their ids, each of one incarnation.
        self._peers: dict[str, tuple[int, str, KvLayout]] = {}
        #: Workers that can't be reached, and until when they are not tried again.
        self._unreachable: dict[Server, float] = {}
        self._closing = False  # failures are no news from then on
        self._channel = self._make_channel(regions, serving)
        self._renewals = Renewals(options.lease, self._renew, self._lease_of)
        self._prepare()
        self._runner.start(self._watch())  # ends with the channel

    def _access(self, serving: bool, taking: bool) -> Access:
        """What peers may do here."""
        return "read" if serving else "none"

    def _prepare(self) -> None:
        """What else there is to do before the first operation."""

    def _answers(self) -> Callable[[SideMessage], SideMessage]:
        """What answers side messages, on the channel's thread."""
        return _Answers(self.instance_id, self._layout, self._leases)

    def _make_channel(self, regions: list[Region], serving: bool) -> Any:
        answers = self._answers()
        base = channel_class(self._options.transport)
        made: Any = type("AnsweringChannel", (base,), {"handle_init_side_msg": lambda _, received: answers(received)})
        keywords = channel_keywords(self._options, listening=serving, rank=self._layout.tp_rank)
        return made(regions=regions, **keywords)

    @property
    def url(self) -> str:
        """Where peers are answered, as they are told; empty if they aren't."""
        url: str = self._channel.peer_init_url
        if url and self._options.advertised_host:
            url = url_of(self._options.advertised_host, int(url.rpartition(":")[2]))
        return url

    @property
    def server(self) -> Server:
        """What decoding instances are told of this worker."""
        return Server(self.url, self.instance_id, self._options.key_id(self._layout.tp_rank) or self.url)

    def close(self) -> None:
        """When it returns, nothing lands here any more."""
        with self._lock:
            self._closing = True  # plans that are made from then on come to nothing
        self._renewals.close()
        self._channel.close()
        self._closed()
        self._runner.join()

    def _closed(self) -> None:
        """The channel is."""

    # The engine's orders

    def begin(self, orders: Step) -> None:
        """What can't wait until the engine has computed the step that it begins."""
        if orders.waiting:
            self._renewals.keep(orders.waiting)

    def step(self, orders: Step) -> None:
        for request_id in orders.expected:
            self._leases.expect(request_id)
        for request_id in orders.granted:
            self._leases.grant(request_id)
        for request_id in orders.forgotten:
            self._leases.forget(request_id)
        with self._lock:
            for load in orders.loads:
                self._start(load)
            for request_id in orders.cancelled:
                loading = self._loadings.get(request_id)
                if loading is not None:
                    loading.cancelled = True
                    for operation in loading.operations:
                        operation.cancel()
                    self._cancelled(loading)
            for request_id, remote in orders.released:
                self._renewals.let_go(request_id)
                servers = remote.servers()
                for source, readers in self._sources(remote):
                    self._perform(self._leave(remote, servers[source.rank], readers))

    def finished(self) -> tuple[set[str], set[str]]:
        """Requests whose blocks are no longer kept for others, and those whose loads have ended, each once."""
        with self._lock:
            received, self._received = self._received, set()
            self._reported_failed |= self._failed
            self._failed = set()
        return self._leases.take_ended(), received

    def failed_blocks(self) -> set[int]:
        """Blocks of loads that ``finished`` has named that don't have their bytes, each once."""
        failed, self._reported_failed = self._reported_failed, set()
        return failed

    def _watch(self) -> Steps:
        """News of peers, until the channel is closed."""
        while True:
            operation = self._channel.submit_wait_peer_event(self._queue)
            yield operation
            if operation.error is not None:
                return
            self._news(operation.result())

    def _news(self, event: PeerEvent) -> None:
        if event.kind != "connected":
            self._peers.pop(event.peer_id, None)
            if event.cause != "cancelled":  # from here
                _logger.warning("the worker at %s is %s: %s", event.peer_id, event.kind, event.cause)

    # Loads

    def _sources(self, remote: Any) -> list[tuple[HeadSource, int]]:
        """The peer's ranks that this worker has to do with, each with the number of workers that have to do with it.

        A rank from which nobody takes heads is told by one worker that it isn't needed.
        """
        ours, ranks = self._layout, len(remote.urls)
        readers = readers_of(ours.total_heads, ours.tp_size, ranks)
        found = [
            (source, readers[source.rank])
            for source in head_sources(ours.total_heads, ours.tp_size, ours.tp_rank, ranks)
        ]
        for rank in range(ranks):
            if not readers[rank] and rank % ours.tp_size == ours.tp_rank:
                found.append((HeadSource(rank, 0, 0, 0), 1))
        return found

    def _start(self, load: Load) -> None:
        loading = self._loadings[load.request_id] = Loading(load)
        sources = self._sources(load.remote)
        if not sources:  # the number of urls comes from outside
            _logger.error(
                "request %s is computed here: of %d workers, as kv_transfer_params name, none has heads of rank %d of %d",
                load.request_id, len(load.remote.urls), self._layout.tp_rank, self._layout.tp_size,
            )  # fmt: skip
            self._part_ended(loading, set(load.block_ids), [1])
            return
        left = [len(sources)]
        for source, readers in sources:
            self._perform(self._load_from(loading, source, readers, left))

    def _cancelled(self, loading: Loading) -> None:
        """Its operations have been."""

    def _leave(self, remote: Any, server: Server, readers: int) -> Asking:
        """Nothing is taken of what is kept there."""
        return self._release(remote.request_id, server, readers)

    def _load_from(self, loading: Loading, source: HeadSource, readers: int, left: list[int]) -> Steps:
        load = loading.load
        server = load.remote.servers()[source.rank]
        failed = set(load.block_ids)
        try:
            if source.num_heads:
                failed = yield from self._read(loading, source, server)
            else:
                failed = set()
            release = self._release(load.remote.request_id, server, readers)
            if len(failed) == len(load.block_ids) or not source.num_heads:
                self._perform(release)  # the answer makes no difference
            elif not (yield from release):
                _logger.warning(
                    "request %s is computed here: its blocks were given up at %s before they were read",
                    load.request_id, server.url,
                )  # fmt: skip
                failed = set(load.block_ids)
        except Exception as error:  # a load that fails is computed
            failed = set(load.block_ids)
            if not loading.cancelled and not self._closing:
                _logger.error("request %s is computed here: %s", load.request_id, error)
            self._perform(self._release(load.remote.request_id, server, readers))
        self._part_ended(loading, failed, left)

    def _part_ended(self, loading: Loading, failed: set[int], left: list[int]) -> None:
        request_id = loading.load.request_id
        loading.failed |= failed
        left[0] -= 1
        if left[0] == 0:
            del self._loadings[request_id]
            self._renewals.let_go(request_id)
            self._received.add(request_id)
            if not loading.cancelled:
                self._failed |= loading.failed

    def _read(self, loading: Loading, source: HeadSource, server: Server) -> Generator[Waited, Any, set[int]]:
        load = loading.load
        layout = yield from self._layout_of(loading, server)
        if loading.cancelled or self._closing:
            return set(load.block_ids)
        made, addresses = yield lambda: self._planned(load, layout, source)
        if loading.cancelled or self._closing:
            return set(load.block_ids)
        operation = self._channel.submit_read(
            self._queue, addresses, server.peer_id, remote_ranges=made.remote, statuses=True
        )
        yield from self._ended(loading, operation)
        if operation.error is None:
            return set()
        if not loading.cancelled and not self._closing:
            _logger.error("request %s: reading from %s: %s", load.request_id, server.url, operation.error)
        statuses = operation.statuses
        if len(statuses) != len(made.owners):
            return set(load.block_ids)
        bad = made.owners[np.array([status is not None for status in statuses])]
        return {load.block_ids[owner] for owner in np.unique(bad).tolist()}

    def _planned(self, load: Load, layout: KvLayout, source: HeadSource) -> tuple[Plan, Addresses]:
        remote = load.remote
        found = (layout.tp_rank, layout.tp_size)
        if found != (source.rank, len(remote.urls)):
            raise LayoutMismatch(
                f"at {remote.urls[source.rank]} is rank {found[0]} of {found[1]}, and not {source.rank} of "
                f"{len(remote.urls)} as kv_transfer_params say"
            )
        made = plan(self._layout, layout, load.block_ids, remote.block_ids, load.first_token, load.num_tokens, source)
        addresses = np.stack([self._bases[made.local[:, 0]] + made.local[:, 1], made.local[:, 2]], axis=1)
        return made, Addresses(addresses)

    @staticmethod
    def _ended(loading: Loading, operation: Operation) -> Steps:
        loading.operations.add(operation)
        yield operation
        loading.operations.discard(operation)

    def _layout_of(self, loading: Loading, server: Server) -> Generator[Waited, Any, KvLayout]:
        """Connects, and asks how the peer's cache lies, unless that is known."""
        if self._is_unreachable(server):
            raise ConnectionError(f"{server.instance_id} at {server.url} could not be reached a moment ago")
        known, peer = self._peers.get(server.peer_id), self._channel.peer_info(server.peer_id)
        if known is None or peer is None or known[0] != peer.incarnation:
            operation = yield from self._asked(server, message(LAYOUT), loading)
            error = operation.error
            if error is not None and (error.peer_failed or error.timed_out):
                self._give_up(server)
            instance_id, layout = layout_from(operation.result())
            peer = self._channel.peer_info(server.peer_id)
            known = (peer.incarnation if peer else 0, instance_id, layout)
            self._peers[server.peer_id] = known
            _logger.info("connected to %s: %s", server.url, peer.path if peer else "no longer")
        if known[1] != server.instance_id:
            raise LayoutMismatch(f"at {server.url} is {known[1]}, and no longer {server.instance_id}")
        return known[2]

    def _give_up(self, server: Server) -> None:
        """For a while. The worker's successor has another id, so that there is little to gain from trying again."""
        now = time.monotonic()
        self._unreachable = {key: until for key, until in self._unreachable.items() if until > now}
        self._unreachable[server] = now + self._options.lease

    def _is_unreachable(self, server: Server) -> bool:
        return self._unreachable.get(server, 0.0) > time.monotonic()

    def _release(self, request_id: str, server: Server, readers: int) -> Asking:
        """Whether the blocks were the request's until now."""
        if self._closing or self._is_unreachable(server):
            return False
        try:
            asked = message(
                RELEASE,
                instance_id=server.instance_id,
                request_id=request_id,
                reader=self._layout.tp_rank,
                readers=readers,
            )
            operation = yield from self._asked(server, asked)
            return bool(parse(operation.result()).get("held"))
        except Exception as error:
            if not self._closing:
                _logger.warning("request %s at %s ends with its lease: %s", request_id, server.url, error)
            return False

    def _ask(self, server: Server, asked: SideMessage, local_id: str, timeout: float) -> Operation:
        """On the connection to it, which is made if there is none: with many keys a question needs an addressee."""
        operation: Operation = self._channel.submit_lazy_init_peer_connection(
            self._queue, local_id, server.peer_id, server.url, asked, timeout=timeout
        )
        return operation

    def _asked(
        self, server: Server, asked: SideMessage, loading: Loading | None = None
    ) -> Generator[Waited, Any, Operation]:
        """The question that has ended. It is asked again if it was lost with its connection: one that may be asked twice."""
        until = time.monotonic() + self._options.timeout
        for left in reversed(range(MOST_ASKED)):
            operation = self._ask(server, asked, self._local_id, max(until - time.monotonic(), 0.0))
            if loading is not None:
                yield from self._ended(loading, operation)
            else:
                yield operation
            if not left or not self._is_lost(operation.error) or time.monotonic() >= until:
                break
            if loading is not None and loading.cancelled:
                break
        return operation

    def _is_lost(self, error: Exception | None) -> bool:
        """Whether a question's connection was lost before the answer came."""
        return isinstance(error, TransferError) and error.peer_failed and not error.timed_out and not self._closing

    def _lease_of(self, remote: Any) -> float:
        lease: float = remote.lease
        return lease

    def _renew(self, remotes: list[Remote]) -> None:
        found: dict[Server, dict[str, None]] = {}
        with self._lock:
            for remote in remotes:
                for rank, server in enumerate(remote.servers()):
                    if rank % self._layout.tp_size == self._layout.tp_rank and not self._is_unreachable(server):
                        found.setdefault(server, {})[remote.request_id] = None
            for server, request_ids in found.items():
                self._perform(self._send_renewals(server, request_ids))

    def _send_renewals(self, server: Server, request_ids: Iterable[str]) -> Steps:
        for part in parts_of(request_ids, RENEWAL_BYTES):
            if self._closing:
                return
            try:
                asked = message(RENEW, instance_id=server.instance_id, request_ids=part)
                operation = yield from self._asked(server, asked)
                operation.result()
            except Exception as error:
                if not self._closing:
                    _logger.warning("%d leases at %s are not renewed: %s", len(part), server.url, error)
                if isinstance(error, TransferError) and (error.peer_failed or error.timed_out):
                    return  # so would the others


class _Answers:
    """Answers side messages, on the channel's thread."""

    def __init__(self, instance_id: str, layout: KvLayout, leases: Leases) -> None:
        self._instance_id = instance_id
        self._layout = layout_message(instance_id, layout)
        self._leases = leases

    def __call__(self, received: SideMessage) -> SideMessage:
        if received.type == LAYOUT:
            return self._layout
        fields = parse(received)
        ours = fields.get("instance_id") == self._instance_id  # else the requests are those of a predecessor
        if received.type == RELEASE:
            held = ours and self._leases.release(
                str(fields["request_id"]), int(fields["reader"]), int(fields["readers"])
            )
            return message(RELEASE, held=held)
        if received.type == RENEW:
            return message(RENEW, held=[ours and self._leases.renew(str(name)) for name in fields["request_ids"]])
        raise ValueError(f"no message of type {received.type!r} is known here")
