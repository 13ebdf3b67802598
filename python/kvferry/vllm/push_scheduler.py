# SPDX-License-Identifier: Apache-2.0
"""The connector in vLLM's scheduler where prefilling instances push. Needs no vLLM."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

from .options import Options
from .prompts import digest_of
from .push_messages import MOST_REMEMBERED, Announced, Progress, Sender, transfer_id_of
from .scheduler import Scheduler, Step, has_completed, params_of

__all__ = ["PushScheduler"]

_logger = logging.getLogger("kvferry.vllm")


class PushScheduler(Scheduler):
    """The scheduler's side. A request goes to both instances at once, with one ``transfer_id``: the decoding one gives
    it blocks, and the prefilling one fills them while it computes."""

    def __init__(self, options: Options, block_size: int, prefilling: bool) -> None:
        super().__init__(options, block_size)
        self._prefilling = prefilling
        #: A prefilling instance's requests that are pushed, and the last transfers there were.
        self._pushes: set[str] = set()
        self._used: OrderedDict[str, None] = OrderedDict()

    def on_new_request(self, request: Any) -> None:
        params = params_of(request)
        if params and params.get("do_remote_decode"):
            self._announce(request, params)
        super().on_new_request(request)

    def _announce(self, request: Any, params: dict[str, Any]) -> None:
        try:
            if not self._prefilling:  # nobody could ask for its blocks
                raise ValueError("this instance doesn't push: its kv_role is 'kv_consumer'")
            transfer_id = transfer_id_of(params)
            if transfer_id in self._used:
                raise ValueError(f"another request here has or had the transfer_id {transfer_id!r}")
            self._used[transfer_id] = None
            if len(self._used) > MOST_REMEMBERED:
                self._used.popitem(last=False)
            digest = digest_of(request, request.num_prompt_tokens)
            if digest is None:
                self._next.refused.append((transfer_id, "prompts that are embeddings are not handed over"))
                raise ValueError(self._next.refused[-1][1])
        except ValueError as error:
            _logger.error("request %s is not pushed: %s", request.request_id, error)
            return
        self._pushes.add(request.request_id)
        self._next.announced.append(Announced(request.request_id, transfer_id, digest, int(request.num_prompt_tokens)))

    def _checked(self, request: Any, params: dict[str, Any]) -> Sender:
        if self._prefilling:  # nobody may write here
            raise ValueError("nothing is pushed to this instance: its kv_role is 'kv_producer'")
        tokens = int(request.num_prompt_tokens)
        digest = digest_of(request, tokens)
        if digest is None:
            raise ValueError("prompts that are embeddings are not handed over")
        sender = Sender.from_params(params, digest, tokens, self._options.lease, self._secret)
        self._check_hosts(sender.urls)
        return sender

    def next_step(self, scheduled: Any = None) -> Step:
        if scheduled is not None:
            for request_id in scheduled.preempted_req_ids or ():
                if request_id in self._pushes:
                    self._pushes.remove(request_id)
                    self._next.preempted.append(request_id)
            counts = scheduled.num_scheduled_tokens
            for new in scheduled.scheduled_new_reqs:
                self._progress(new.req_id, new.block_ids, new.num_computed_tokens, counts)
            known = scheduled.scheduled_cached_reqs
            for request_id, blocks, computed in zip(known.req_ids, known.new_block_ids, known.num_computed_tokens):
                self._progress(request_id, blocks, computed, counts)
        return super().next_step(scheduled)

    def _progress(self, request_id: str, blocks: Any, computed: int, counts: dict[str, int]) -> None:
        if request_id in self._pushes:
            [ids] = blocks or ([],)
            self._next.progress.append(Progress(request_id, list(ids), int(computed) + counts.get(request_id, 0)))

    def _expect(self, request_id: str) -> None:
        """Those that are pushed have been announced."""

    def _kept(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        request_id = request.request_id
        if request_id not in self._pushes:
            return False, None
        self._pushes.remove(request_id)
        if has_completed(request) and block_ids and request.num_computed_tokens >= request.num_prompt_tokens:
            self._next.granted.append(request_id)
            return True, None
        self._next.forgotten.append(request_id)
        return False, None
