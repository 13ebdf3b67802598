# SPDX-License-Identifier: Apache-2.0
"""The connector in vLLM's workers where prefilling ones push.

The decoding worker connects, and says which blocks it wants filled. What has been pushed counts once the prefilling
worker has said that all of it has ended well. A push that ends otherwise is settled before its blocks are free: the
prefilling worker says that it begins no more, and a fence that what it had begun has ended. Where it doesn't answer,
the connection is ended, and the next one is under another id, to which nothing is pushed that was asked for under the
former. Needs no vLLM.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
import uuid
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .. import Access, Notification, Operation, PeerEvent, SideMessage, TransferError
from .layout import HeadSource
from .messages import RENEW, Server, message, parse, parts_of
from .push_messages import ENDED, STOP, WANT, Ended, Sender, Want
from .pushes import Pushes
from .scheduler import Load, Step
from .steps import Asking, Signal, Steps, Waited
from .worker import MOST_ASKED, RENEWAL_BYTES, Loading, Worker

__all__ = ["PushWorker"]

_logger = logging.getLogger("kvferry.vllm")

#: Errors of a question that has not come to the one that answers it.
_NOT_ASKED = ("resource_limit", "identity_conflict", "authentication_failed")
#: Renewals in a row after whose deadlines a prefilling worker is taken for one that stands still.
_MOST_UNANSWERED = 3


@dataclass(eq=False)
class _Link:
    """A connection to a prefilling worker, and those that come in its place when it was lost and is made anew."""

    #: As whom this side connected. Who was asked under this id pushes to it alone.
    local_id: str
    connected: bool = False
    #: How bytes travel, once that was said.
    path: str = ""
    #: Renewals in a row that were not answered in time.
    unanswered: int = 0
    #: The prefilling worker's, in seconds, once it was said.
    lease: float = math.inf
    breaking: bool = False
    #: Nothing lands any more over it.
    broken: Signal = field(default_factory=Signal)


@dataclass(eq=False)
class _Push:
    """What a prefilling worker pushes for a request here."""

    loading: Loading
    link: _Link
    #: An ``Ended``; or a text that says why it isn't waited for any more.
    ended: Signal = field(default_factory=Signal)
    #: Whether the other side has said that it will.
    agreed: bool = False
    #: Whether it has said that nothing is to be expected. Its last word may be here, and be heard only next.
    doubted: bool = False


class PushWorker(Worker):
    """One worker's channel, and what goes on in it; see ``Worker``."""

    def _access(self, serving: bool, taking: bool) -> Access:
        # All of a given up connection's writes have ended because nobody can connect to its id again.
        if serving and taking:
            raise ValueError("a worker that listens offers nothing for writing")
        return "write" if taking else "none"

    def _prepare(self) -> None:
        self._links: dict[str, _Link] = {}
        self._numbers = itertools.count()
        #: By the prefilling worker's peer id, and the transfer.
        self._pushed: dict[tuple[str, str], _Push] = {}
        with self._lock:
            self._pushes.channel = self._channel
            self._perform(self._listen())

    def _answers(self) -> Callable[[SideMessage], SideMessage]:
        options = self._options
        self._pushes = Pushes(
            self._runner, self._layout, self._bases, self._leases, options.timeout, options.lease, options.checksums
        )
        return self._answer

    # The engine's orders

    def lost(self, orders: Step) -> None:
        """Blocks are no longer those of the requests whose they were. Before the step writes into any of them: what is
        pushed of them from then on doesn't count."""
        with self._lock:
            self._drop_lost(orders)

    def _drop_lost(self, orders: Step) -> None:
        for request_ids, reason in (
            (orders.preempted, "its blocks were taken from it"),
            (orders.forgotten, "its request has ended there"),
        ):
            for request_id in request_ids:
                self._leases.forget(request_id)
                self._pushes.drop(request_id, reason)

    def begin(self, orders: Step) -> None:
        super().begin(orders)
        with self._lock:
            for announced in orders.announced:
                self._pushes.announce(announced)
            for transfer_id, reason in orders.refused:
                self._pushes.refuse(transfer_id, reason)
            self._drop_lost(orders)  # also what has been announced in the same step
            for progress in orders.progress:
                self._pushes.proceed(progress)
        if orders.waiting:
            self._renew([sender for _, sender in orders.waiting])

    def layer_computed(self, name: str) -> None:
        """The step's tokens are in a layer's cache."""
        with self._lock:
            self._pushes.layer_computed(name)

    def step_computed(self) -> None:
        """They are in all layers' caches."""
        with self._lock:
            self._pushes.step_computed()

    def step(self, orders: Step) -> None:
        super().step(orders)
        with self._lock:
            for request_id in orders.granted:
                if not self._pushes.knows(request_id):
                    self._leases.release(request_id, 0, 1)  # nobody can come for its blocks

    def finished(self) -> tuple[set[str], set[str]]:
        sent, received = super().finished()
        with self._lock:
            for request_id in sent:
                self._pushes.drop(request_id, "its lease has run out")
            self._pushes.sweep()
        return sent, received

    # Of a prefilling worker

    def _answer(self, received: SideMessage) -> SideMessage:
        """On the channel's thread."""
        if received.type == WANT:
            want = msgspec.convert(parse(received)["want"], Want)
            with self._lock:
                refused = self._pushes.want(want)
            return message(WANT, refused=refused)
        fields = parse(received)
        if received.type == STOP:
            with self._lock:
                self._pushes.stop(str(fields["transfer_id"]), int(fields["reader"]), str(fields["peer_id"]))
            return message(STOP)
        if received.type == RENEW:
            with self._lock:
                held = [self._pushes.renew(str(name)) for name in fields["transfer_ids"]]
            return message(RENEW, held=held, lease=self._options.lease)
        raise ValueError(f"no message of type {received.type!r} is known here")

    # Of a decoding worker

    def _load_from(self, loading: Loading, source: HeadSource, readers: int, left: list[int]) -> Steps:
        load = loading.load
        server = load.remote.servers()[source.rank]
        failed = set(load.block_ids)
        try:
            if source.num_heads and not loading.cancelled:
                failed = yield from self._take(loading, source, server, readers)
            else:
                self._perform(self._leave(load.remote, server, readers))
                failed = set()
        except Exception as error:  # what fails is computed
            self._say(loading, str(error))
        self._part_ended(loading, failed, left)

    def _say(self, loading: Loading, why: str) -> None:
        if not loading.cancelled and not self._closing:
            _logger.error("request %s is computed here: %s", loading.load.request_id, why)

    def _take(
        self, loading: Loading, source: HeadSource, server: Server, readers: int
    ) -> Generator[Waited, Any, set[int]]:
        """Waits until a worker has pushed, or can't any more. Returns the blocks that don't have their bytes."""
        load = loading.load
        every = set(load.block_ids)
        link = yield from self._link_to(server)
        key = server.peer_id, load.remote.transfer_id
        if key in self._pushed:
            raise ValueError(f"another request here has the transfer {load.remote.transfer_id!r}")
        if loading.cancelled:
            self._perform(self._leave(load.remote, server, readers))
            return every
        push = self._pushed[key] = _Push(loading, link)
        try:
            refused = yield from self._ask_for(push, source, server, readers)
            link = push.link
            if refused is None:  # whether it has begun isn't known
                yield from self._end(server, link)
                return every
            if refused:
                return every
            push.agreed = True
            self._say_path(server, link)
            if loading.cancelled:
                self._runner.tell(push.ended, "cancelled")
            if link.breaking:  # which was said before there was anybody to tell
                self._runner.tell(push.ended, "its connection was ended")
            ended = yield push.ended
        finally:
            del self._pushed[key]
        if isinstance(ended, Ended) and not ended.failed and not ended.reason:
            return set()
        yield from self._settle(load, server, link)
        if not isinstance(ended, Ended):
            self._say(loading, f"{server.url}: {ended}")
            return every
        if ended.reason:
            self._say(loading, f"{server.url} has not pushed all of it: {ended.reason}")
            return every
        self._say(loading, f"{server.url} could not push {len(ended.failed)} of its blocks, and what follows them")
        if not all(0 <= index < len(load.block_ids) for index in ended.failed):
            return every  # which blocks it means isn't known
        return {load.block_ids[index] for index in ended.failed}

    def _ask_for(
        self, push: _Push, source: HeadSource, server: Server, readers: int
    ) -> Generator[Waited, Any, str | None]:
        """Why it isn't pushed; empty if it will be, or its end has been heard; None if nothing is known.

        What was lost with its connection is asked again, over the next one if need be, until ``timeout`` has passed.
        """
        load, question = push.loading.load, uuid.uuid4().hex
        until = time.monotonic() + self._options.timeout
        lost: _Link | None = None  # the one over which it was asked in vain
        refused = ""
        for attempt in range(MOST_ASKED):
            if push.link.breaking and lost is push.link:  # nothing that was asked for over it lands any more
                yield lost.broken
                push.link = yield from self._link_to(server)
            if attempt and push.loading.cancelled:
                return None if lost is push.link else "it was cancelled"
            if attempt and time.monotonic() >= until:
                self._say(push.loading, f"no time to ask {server.url} again: {refused or 'its connection was lost'}")
                return None if lost is push.link else "it was not asked in time"
            operation = None
            try:
                wanted = self._wanted(load, source, server, readers, push.link, question, attempt)
                operation = self._ask_over(push.link, server, wanted, max(until - time.monotonic(), 0.0))
                yield operation
                refused = str(parse(operation.result())["refused"])
            except Exception as error:
                if push.ended.told:
                    return ""
                refused = str(error) or repr(error)
                is_known = isinstance(error, TransferError) and (error.invalid_argument or error.name in _NOT_ASKED)
                if operation is not None and not is_known:
                    # This side may have ended the connection, because it has heard of the end of the former one meanwhile.
                    is_lost = self._is_lost(error) or (push.link.breaking and not self._closing)
                    if is_lost and attempt + 1 < MOST_ASKED:
                        lost = push.link
                        continue
                    self._unanswered(server, push.link, error)
                    self._say(push.loading, refused)
                    return None
            if not refused and push.link.breaking and not push.ended.told and attempt + 1 < MOST_ASKED:
                lost = push.link  # it goes on over the next one
                continue
            if push.ended.told or not refused:
                return ""
            self._say(push.loading, f"{server.url} does not push: {refused}")
            # What was lost may still arrive there, and find that it can be done.
            return None if lost is push.link else refused
        raise AssertionError("the last attempt returns")

    def _wanted(
        self, load: Load, source: HeadSource, server: Server, readers: int, link: _Link,
        question: str = "", attempt: int = 0,
    ) -> SideMessage:  # fmt: skip
        sender: Sender = load.remote
        want = Want(
            transfer_id=sender.transfer_id, reader=self._layout.tp_rank, readers=readers, peer_id=link.local_id,
            asked_rank=source.rank, asked_ranks=len(sender.urls), heads=source, layout=self._layout,
            block_ids=tuple(load.block_ids), first_token=load.first_token, num_tokens=load.num_tokens,
            prompt_digest=sender.prompt_digest, checksums=self._options.checksums, question=question, attempt=attempt,
        )  # fmt: skip
        return message(WANT, want=want)

    def _settle(self, load: Load, server: Server, link: _Link) -> Steps:
        """Until nothing of a transfer lands any more."""
        if not link.breaking and not self._closing:
            try:
                asked = message(
                    STOP, transfer_id=load.remote.transfer_id, reader=self._layout.tp_rank, peer_id=link.local_id
                )
                for left in reversed(range(MOST_ASKED)):
                    operation = self._ask_over(link, server, asked)
                    yield operation
                    if link.breaking or not left or not self._is_lost(operation.error):
                        break
                operation.result()
                operation = self._channel.submit_fence(self._queue, server.peer_id, self._options.timeout)
                yield operation
                operation.result()
                if not link.breaking:
                    return
            except Exception as error:
                if not self._closing:
                    _logger.warning("the connection to %s is ended: %s", server.url, error)
        yield from self._end(server, link)

    def _leave(self, remote: Any, server: Server, readers: int) -> Asking:
        nothing = HeadSource(remote.servers().index(server), 0, 0, 0)
        try:
            load, question = Load("", remote, [], 0, remote.num_tokens), uuid.uuid4().hex
            until = time.monotonic() + self._options.timeout
            for attempt in range(MOST_ASKED):
                link = yield from self._link_to(server)
                wanted = self._wanted(load, nothing, server, readers, link, question, attempt)
                operation = self._ask_over(link, server, wanted, max(until - time.monotonic(), 0.0))
                yield operation
                if not self._is_lost(operation.error) or time.monotonic() >= until:
                    break
            try:
                operation.result()
            except TransferError as error:
                self._unanswered(server, link, error)
                raise
            return True
        except Exception as error:
            if not self._closing and not self._is_unreachable(server):
                _logger.warning("transfer %s at %s ends with its lease: %s", remote.transfer_id, server.url, error)
            return False

    def _cancelled(self, loading: Loading) -> None:
        for push in list(self._pushed.values()):
            if push.loading is loading and push.agreed:
                self._runner.tell(push.ended, "cancelled")

    # Connections

    def _link_to(self, server: Server) -> Generator[Waited, Any, _Link]:
        """The one that there is; or a new one, when nothing lands over the former any more.

        Raises ConnectionError when the channel is closed, and for a worker that could not be reached a moment ago.
        """
        while True:
            if self._closing:
                raise ConnectionError("the channel is closed")
            if self._is_unreachable(server):
                raise ConnectionError(f"{server.url} could not be reached a moment ago")
            link = self._links.get(server.peer_id)
            if link is None:
                link = self._links[server.peer_id] = _Link(f"{self._local_id}/{next(self._numbers)}")
                return link
            if not link.breaking:
                return link
            yield link.broken

    def _ask_over(self, link: _Link, server: Server, asked: SideMessage, timeout: float | None = None) -> Operation:
        return self._ask(server, asked, link.local_id, self._options.timeout if timeout is None else timeout)

    def _unanswered(self, server: Server, link: _Link, error: Exception) -> None:
        """Nobody who asks next has to wait for a worker that isn't there."""
        if isinstance(error, TransferError) and (error.peer_failed or error.timed_out) and not link.connected:
            self._give_up(server)

    def _say_path(self, server: Server, link: _Link) -> None:
        peer = self._channel.peer_info(server.peer_id)
        if peer is not None and not link.path:
            link.path = peer.path
            _logger.info("connected to %s: %s", server.url, peer.path)

    def _end(self, server: Server, link: _Link) -> Steps:
        """Ends a connection, and with it what is pushed over it. Until nothing lands over it any more."""
        self._break(server.peer_id, link, "its connection was ended")
        yield link.broken

    def _break(self, peer_id: str, link: _Link, why: str) -> None:
        if link.breaking:
            return
        link.breaking = True
        if not self._closing:  # else the channel's end is that of all connections
            self._perform(self._disconnect(peer_id, link))
        for push in list(self._pushed.values()):
            if push.link is link and push.agreed:
                self._runner.tell(push.ended, why)

    def _disconnect(self, peer_id: str, link: _Link) -> Steps:
        try:
            operation = self._channel.submit_disconnect(self._queue, peer_id)
            yield operation
            operation.result()
        except Exception as error:  # it isn't known, or the channel is closed
            _logger.debug("disconnecting %s: %s", peer_id, error)
        if self._links.get(peer_id) is link:
            del self._links[peer_id]
        self._runner.tell(link.broken)

    def _news(self, event: PeerEvent) -> None:
        link = self._links.get(event.peer_id)
        if link is None or link.breaking:
            return
        if event.kind == "connected" or (event.kind == "restarted" and not link.connected):
            link.connected = True
            for server in [server for server in self._unreachable if server.peer_id == event.peer_id]:
                del self._unreachable[server]
        elif link.connected and event.cause != "cancelled":
            _logger.warning("the worker at %s is %s: %s", event.peer_id, event.kind, event.cause)
            self._break(event.peer_id, link, f"it is {event.kind}: {event.cause}")
        if event.missed:  # what, nobody knows
            for peer_id, other in list(self._links.items()):
                if other.connected and not self._channel.remote_xfer_handler_exists(peer_id):
                    self._break(peer_id, other, "its connection has ended")

    def _listen(self) -> Steps:
        """Takes what prefilling workers say of transfers that have ended."""
        while True:
            operation = self._channel.submit_receive_notifications(self._queue, ENDED, 1)
            yield operation
            if operation.error is not None:
                return
            for notification in operation.result():
                self._hear(notification)

    def _hear(self, notification: Notification) -> None:
        try:
            ended = msgspec.msgpack.decode(notification.payload, type=Ended)
        except ValueError as error:
            _logger.error("%s says what makes no sense: %s", notification.peer_id, error)
            return
        push = self._pushed.get((notification.peer_id, ended.transfer_id))
        if push is not None:
            self._runner.tell(push.ended, ended)

    # Renewals

    def _lease_of(self, remote: Any) -> float:
        links = [self._links.get(server.peer_id) for server in remote.servers()]
        leases: list[float] = [remote.lease, *(link.lease for link in links if link is not None)]
        return min(leases)

    def _renew(self, remotes: list[Any]) -> None:
        found: dict[Server, dict[str, None]] = {}
        with self._lock:
            for sender in remotes:
                servers = sender.servers()
                for source, _ in self._sources(sender):  # who doesn't push here has nothing to say of it
                    found.setdefault(servers[source.rank], {})[sender.transfer_id] = None
            for server, transfer_ids in found.items():
                self._perform(self._send_renewals(server, transfer_ids))

    def _send_renewals(self, server: Server, request_ids: Iterable[str]) -> Steps:
        for part in parts_of(request_ids, RENEWAL_BYTES):
            for left in reversed(range(MOST_ASKED)):
                # The other side knows of a transfer from the moment that it has agreed.
                agreed = [self._pushed.get((server.peer_id, name)) for name in part]
                agreed = [push if push is not None and push.agreed else None for push in agreed]
                try:
                    link = yield from self._link_to(server)
                except ConnectionError:
                    return
                try:
                    operation = self._ask_over(link, server, message(RENEW, transfer_ids=part))
                    yield operation
                    self._renewed(link, agreed, parse(operation.result()))
                except Exception as error:
                    if left and self._is_lost(error):
                        continue
                    if self._closing:
                        return
                    _logger.warning("%d leases at %s are not renewed: %s", len(part), server.url, error)
                    self._unanswered(server, link, error)
                    if isinstance(error, TransferError) and (error.peer_failed or error.timed_out):
                        link.unanswered += 1
                        if error.peer_failed or link.unanswered >= _MOST_UNANSWERED:
                            self._break(server.peer_id, link, f"it does not answer: {error}")
                        return  # nor would it answer the others
                break

    def _renewed(self, link: _Link, agreed: list[_Push | None], answer: dict[str, Any]) -> None:
        link.unanswered = 0
        lease = float(answer["lease"])
        if link.lease != lease > 0:
            link.lease = lease
            self._renewals.reckon()
        for push, held in zip(agreed, answer["held"]):
            if push is None:
                continue
            if not held and push.doubted:
                self._runner.tell(push.ended, "nothing is known of it there any more")
            push.doubted = not held

    def _closed(self) -> None:
        with self._lock:
            for push in list(self._pushed.values()):
                self._runner.tell(push.ended, "closed")
            links, self._links = self._links, {}
            for link in links.values():
                self._runner.tell(link.broken)
