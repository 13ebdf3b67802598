# SPDX-License-Identifier: Apache-2.0
"""What decoding workers have asked a prefilling one before it heard of the request. Needs no vLLM."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from .push_messages import Want

__all__ = ["GIVEN_UP", "MOST_BYTES", "OTHERS", "EarlyWants"]

#: Why a question isn't taken.
OTHERS = "another request of the reader's has asked for it"
GIVEN_UP = "the reader has given it up"

#: Of all questions together, as they are kept. Whoever reaches the port can ask.
MOST_BYTES = 32 << 20
#: What a question takes beside its bytes.
_MORE_BYTES = 1024


@dataclass
class _Transfer:
    since: float
    #: By reader: who it is, and the question. Encoded it takes a tenth of the memory.
    wants: dict[int, tuple[str, bytes]] = field(default_factory=dict)


class EarlyWants:
    """The questions, for a lease each.

    lease: seconds.
    """

    def __init__(self, lease: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease = lease
        self._clock = clock
        #: The oldest first.
        self._transfers: OrderedDict[str, _Transfer] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._transfers)

    def __contains__(self, transfer_id: str) -> bool:
        return transfer_id in self._transfers

    def add(self, want: Want) -> str:
        """Why it isn't kept; empty if it is."""
        found = self._transfers.get(want.transfer_id)
        before = b""
        if found is not None and want.reader in found.wants:
            before = found.wants[want.reader][1]
            known = msgspec.msgpack.decode(before, type=Want)
            if not want.repeats(known.question, known.attempt):
                return OTHERS
            if want.heads.num_heads and not known.heads.num_heads:
                return GIVEN_UP
        encoded = msgspec.msgpack.encode(want)
        more = len(encoded) - len(before) if before else len(encoded) + _MORE_BYTES
        if self._bytes + more > MOST_BYTES:
            return "too many wait for requests that have not come here yet"
        if found is None:
            found = self._transfers[want.transfer_id] = _Transfer(self._clock())
        found.wants[want.reader] = want.peer_id, encoded
        self._bytes += more
        return ""

    def stop(self, transfer_id: str, rank: int, peer_id: str) -> None:
        """The reader wants nothing of it any more."""
        found = self._transfers.get(transfer_id)
        if found is None or found.wants.get(rank, ("", b""))[0] != peer_id:
            return
        before = found.wants[rank][1]
        want = msgspec.msgpack.decode(before, type=Want)
        encoded = msgspec.msgpack.encode(
            msgspec.structs.replace(want, heads=want.heads._replace(num_heads=0), block_ids=())
        )
        found.wants[rank] = peer_id, encoded
        self._bytes += len(encoded) - len(before)

    def take(self, transfer_id: str) -> list[Want]:
        """Those of a transfer, which are forgotten."""
        found = self._transfers.pop(transfer_id, None)
        return self._decoded(found) if found is not None else []

    def take_old(self) -> list[tuple[str, list[Want]]]:
        """Those of transfers for which nothing has come for a lease."""
        old = []
        until = self._clock() - self._lease
        while self._transfers:
            transfer_id, transfer = next(iter(self._transfers.items()))
            if transfer.since > until:
                break
            del self._transfers[transfer_id]
            old.append((transfer_id, self._decoded(transfer)))
        return old

    def _decoded(self, transfer: _Transfer) -> list[Want]:
        self._bytes -= sum(len(encoded) + _MORE_BYTES for _, encoded in transfer.wants.values())
        return [msgspec.msgpack.decode(encoded, type=Want) for _, encoded in transfer.wants.values()]
