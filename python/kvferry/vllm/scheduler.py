# SPDX-License-Identifier: Apache-2.0
"""The connector in vLLM's scheduler: which requests' blocks are to be loaded, kept and let go.

Needs no vLLM: it has to do with requests' attributes only.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from .messages import Remote, Server
from .options import Options, is_allowed
from .prompts import digest_of
from .push_messages import Announced, Progress

__all__ = ["Load", "Scheduler", "Step", "has_completed", "params_of"]

_logger = logging.getLogger("kvferry.vllm")


@dataclass
class Load:
    """Blocks of a request that wait for their bytes."""

    request_id: str
    #: A ``Remote``, or a ``Sender`` where blocks are pushed.
    remote: Any
    block_ids: list[int]
    #: The tokens that are loaded.
    first_token: int
    num_tokens: int


@dataclass
class Step:
    """What the scheduler tells the workers in a step."""

    # Of a decoding instance:
    loads: list[Load] = field(default_factory=list)
    #: Loads whose request has ended.
    cancelled: list[str] = field(default_factory=list)
    #: Requests that have arrived, each with what is kept for it until it is loaded or released.
    waiting: list[tuple[str, Any]] = field(default_factory=list)
    #: Requests that will not be loaded.
    released: list[tuple[str, Any]] = field(default_factory=list)
    # Of a prefilling instance:
    expected: list[str] = field(default_factory=list)
    granted: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    # Of a prefilling instance that pushes:
    announced: list[Announced] = field(default_factory=list)
    #: Transfers that are not pushed, each with the reason.
    refused: list[tuple[str, str]] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    #: Requests whose blocks are taken from them; they are computed anew later.
    preempted: list[str] = field(default_factory=list)


def params_of(request: Any) -> dict[str, Any] | None:
    """Clients can have vLLM put anything there."""
    params = request.kv_transfer_params
    return params if isinstance(params, dict) else None


def has_completed(request: Any) -> bool:
    return request.status.name in ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED")


class Scheduler:
    """The scheduler's side. One thread."""

    def __init__(self, options: Options, block_size: int) -> None:
        self._options = options
        self._block_size = block_size
        self._secret = options.secret()
        self._workers: tuple[Server, ...] = ()
        self._next = Step()
        #: Requests that a prefilling instance keeps for this one, from their arrival until they are loaded.
        self._remotes: dict[str, Any] = {}
        self._loading: set[str] = set()
        self._expected: set[str] = set()

    def set_workers(self, workers: dict[int, Server]) -> None:
        """By rank. With empty urls if they don't answer."""
        answering = all(worker.url for worker in workers.values())
        self._workers = tuple(workers[rank] for rank in sorted(workers)) if answering else ()

    def on_new_request(self, request: Any) -> None:
        params = params_of(request)
        if not params or not params.get("do_remote_prefill"):
            return
        try:
            remote = self._checked(request, params)
        except ValueError as error:
            _logger.error("request %s is computed here: %s", request.request_id, error)
            params["do_remote_prefill"] = False
            return
        self._remotes[request.request_id] = remote
        self._next.waiting.append((request.request_id, remote))

    def _check_hosts(self, urls: tuple[str, ...]) -> None:
        hosts = self._options.allowed_hosts
        for url in urls:
            if hosts and not is_allowed(url, hosts):
                raise ValueError(f"the host of {url!r} is not in allowed_hosts")

    def _checked(self, request: Any, params: dict[str, Any]) -> Any:
        """Raises ValueError for parameters that aren't of this request."""
        remote = Remote.from_params(params, self._secret)
        self._check_hosts(remote.urls)
        # The router may have mixed up requests, and both sides may make different tokens of one text.
        if digest_of(request, remote.num_tokens) != remote.prompt_digest:
            raise ValueError(f"its prompt, adapter or images are not those of request {remote.request_id!r} there")
        return remote

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        count = self._to_load(request) - num_computed_tokens
        return (count, True) if count > 0 else (0, False)

    def _to_load(self, request: Any) -> int:
        """How many tokens from the first on the prefilling instance has."""
        params = params_of(request)
        remote = self._remotes.get(request.request_id)
        if not params or not params.get("do_remote_prefill") or remote is None:
            return 0
        return min(int(remote.num_tokens), int(request.num_prompt_tokens))

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        params = params_of(request)
        if not params:
            return
        if params.get("do_remote_decode"):
            self._expect(request.request_id)
        if not params.get("do_remote_prefill"):
            return
        until = self._to_load(request)
        params["do_remote_prefill"] = False  # what fails is computed here
        remote = self._remotes.get(request.request_id)
        if remote is None:
            return
        if num_external_tokens == 0:  # all of it is in this instance's prefix cache
            self._release(request.request_id)
            return
        first = until - num_external_tokens
        [ids] = blocks.get_block_ids()
        ids = ids[first // self._block_size : -(-until // self._block_size)]
        self._loading.add(request.request_id)
        self._next.loads.append(Load(request.request_id, remote, list(ids), first, until))

    def _expect(self, request_id: str) -> None:
        self._expected.add(request_id)
        self._next.expected.append(request_id)

    def _release(self, request_id: str) -> None:
        remote = self._remotes.pop(request_id, None)
        if remote is not None:
            self._next.released.append((request_id, remote))

    def next_step(self, scheduled: Any = None) -> Step:
        """scheduled: what vLLM's scheduler has put into the step."""
        made, self._next = self._next, Step()
        return made

    def update_connector_output(self, output: Any) -> None:
        for request_id in output.finished_recving or ():
            self._loading.discard(request_id)
            self._remotes.pop(request_id, None)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        request_id = request.request_id
        if request_id in self._loading:
            # Its blocks are freed when the worker says that nothing lands in them any more.
            self._next.cancelled.append(request_id)
        else:
            self._release(request_id)
        return self._kept(request, block_ids)

    def _kept(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        request_id = request.request_id
        params = params_of(request)
        if not params or not params.get("do_remote_decode"):
            return False, None
        expected = request_id in self._expected
        self._expected.discard(request_id)
        completed = has_completed(request)
        tokens = min(int(request.num_computed_tokens), int(request.num_prompt_tokens))
        digest = digest_of(request, tokens) if completed else None
        if digest is None or not block_ids or not self._workers:
            if expected:
                self._next.forgotten.append(request_id)
            return False, None
        self._next.granted.append(request_id)
        urls, instance_ids, peer_ids = zip(*self._workers)
        remote = Remote(request_id, urls, instance_ids, tuple(block_ids), tokens, digest, self._options.lease, peer_ids)
        return True, remote.to_params(self._secret)
