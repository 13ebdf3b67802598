# SPDX-License-Identifier: Apache-2.0
"""What the two sides tell each other where prefilling workers push: by ``kv_transfer_params``, which the router makes,
side messages, and notifications. Needs no vLLM."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from .layout import HeadSource, KvLayout
from .messages import MAX_WORKERS, Server

__all__ = ["ENDED", "MOST_REMEMBERED", "STOP", "WANT", "Announced", "Ended", "Progress", "Sender", "Want", "seal_of",
           "transfer_id_of"]  # fmt: skip

#: Asks to push a transfer to who asks.
WANT = "kvferry.vllm.want"
#: Says that nothing of a transfer is to be pushed any more.
STOP = "kvferry.vllm.stop"
#: The key of notifications of transfers that have ended.
ENDED = 1

#: Transfers that are over: no more are remembered.
MOST_REMEMBERED = 1 << 16

#: Characters.
_LONGEST_ID = 256


def seal_of(secret: bytes, transfer_id: str, urls: Sequence[str], peer_ids: Sequence[str]) -> str:
    """What only a router that has the secret can make."""
    sealed = json.dumps([transfer_id, list(urls), list(peer_ids)])
    return hmac.new(secret, sealed.encode(), hashlib.sha256).hexdigest()


def transfer_id_of(params: Mapping[str, Any]) -> str:
    """Raises ValueError for parameters without one."""
    found = params.get("transfer_id")
    if not isinstance(found, str) or not 0 < len(found) <= _LONGEST_ID or not found.isprintable():
        raise ValueError(f"kv_transfer_params: the transfer_id is a text of 1 to {_LONGEST_ID} characters")
    return found


@dataclass(frozen=True)
class Sender:
    """A request whose KV cache a prefilling instance pushes while it computes it."""

    transfer_id: str
    #: Where its workers answer, by their rank in tensor parallelism.
    urls: tuple[str, ...]
    peer_ids: tuple[str, ...]
    #: Whose tokens are wanted; see ``digest_of``.
    prompt_digest: str
    num_tokens: int
    #: Seconds between two signs of this side's.
    lease: float

    def servers(self) -> list[Server]:
        """The workers, by their rank. Who they are doesn't matter: a transfer has one id, for ever."""
        return [Server(url, "", peer_id) for url, peer_id in zip(self.urls, self.peer_ids)]

    @classmethod
    def from_params(
        cls, params: Mapping[str, Any], prompt_digest: str, num_tokens: int, lease: float, secret: bytes = b""
    ) -> Sender:
        """Raises ValueError for parameters that make no sense, or aren't sealed with the secret: they come from outside."""
        try:
            urls = msgspec.convert(params.get("remote_urls"), tuple[str, ...])
            peer_ids = msgspec.convert(params.get("remote_peer_ids") or urls, tuple[str, ...])
            msgspec.msgpack.encode([urls, peer_ids])  # no halves of surrogate pairs
        except ValueError as error:
            raise ValueError(f"kv_transfer_params: {error}") from error
        if not 0 < len(urls) <= MAX_WORKERS or len(urls) != len(peer_ids):
            raise ValueError(
                f"kv_transfer_params: {len(urls)} urls and {len(peer_ids)} peer ids, of up to {MAX_WORKERS} workers"
            )
        transfer_id = transfer_id_of(params)
        if secret:
            seal = seal_of(secret, transfer_id, urls, peer_ids)
            if not hmac.compare_digest(seal.encode(), str(params.get("remote_seal")).encode(errors="replace")):
                raise ValueError("kv_transfer_params: not sealed with the secret of secret_file")
        return cls(transfer_id, urls, peer_ids, prompt_digest, num_tokens, lease)


@dataclass
class Announced:
    """A request that is to be pushed. To the prefilling instance's workers."""

    request_id: str
    transfer_id: str
    prompt_digest: str
    num_tokens: int


@dataclass
class Progress:
    """What a step computes of one."""

    request_id: str
    #: Those that come to the request's blocks.
    block_ids: list[int]
    #: How many tokens there are when the step has been computed.
    num_tokens: int


class Want(msgspec.Struct, frozen=True, kw_only=True):
    """A decoding worker's question to a prefilling one. Without heads: it wants nothing of the transfer."""

    transfer_id: str
    #: The rank of who asks, and how many ranks ask the same worker.
    reader: int
    readers: int
    #: How the prefilling worker knows who asks.
    peer_id: str
    #: Which of how many workers it takes the other one for.
    asked_rank: int
    asked_ranks: int
    heads: HeadSource
    layout: KvLayout
    block_ids: tuple[int, ...]
    first_token: int
    num_tokens: int
    prompt_digest: str
    checksums: bool | None
    #: Which question of all there are. Whoever isn't answered asks it again. Empty: it is asked once.
    question: str = ""
    #: How often it had been asked before.
    attempt: int = 0

    def fault(self) -> str:
        """What makes no sense in it; empty if all does. It comes from outside."""
        layout = self.layout
        unit = layout.block_tokens * layout.blocks_per_id
        if not 0 <= self.reader < MAX_WORKERS or not 0 < self.readers <= MAX_WORKERS:
            return f"reader {self.reader}, one of {self.readers}, and there are at most {MAX_WORKERS}"
        if not 0 < len(self.transfer_id) <= _LONGEST_ID or self.heads.num_heads < 0:
            return f"a transfer_id of {len(self.transfer_id)} characters, {self.heads.num_heads} heads"
        if len(self.question) > _LONGEST_ID or self.attempt < 0:
            return f"a question with a name of {len(self.question)} characters, asked {self.attempt} times before"
        if not self.heads.num_heads:
            return ""
        wrong = layout.fault()
        if wrong:
            return f"its layout: {wrong}"
        if not 0 <= self.first_token < self.num_tokens or self.first_token % unit:
            return f"tokens [{self.first_token}, {self.num_tokens}) in blocks of {unit}"
        blocks = -(-(self.num_tokens - self.first_token) // unit)
        if len(self.block_ids) < blocks:
            return f"{len(self.block_ids)} blocks, and tokens [{self.first_token}, {self.num_tokens}) are in {blocks}"
        return ""


    def repeats(self, question: str, attempt: int) -> bool:
        """Whether it is this question, asked later. One that was overtaken is none."""
        return bool(question) and self.question == question and self.attempt > attempt


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A prefilling worker's last word on a transfer to one reader."""

    transfer_id: str
    #: Which of the wanted blocks don't have their bytes: indexes.
    failed: tuple[int, ...]
    #: Why none has; empty otherwise.
    reason: str
