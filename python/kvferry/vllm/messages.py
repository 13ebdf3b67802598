# SPDX-License-Identifier: Apache-2.0
"""What the two sides tell each other: through the router in ``kv_transfer_params``, and by the channel's side messages.

Needs msgspec, which vLLM brings along, and no vLLM.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import msgspec

from .. import SideMessage
from .layout import KvLayout

__all__ = ["LAYOUT", "MAX_WORKERS", "RELEASE", "RENEW", "Remote", "Server", "layout_from", "layout_message", "message",
           "parse", "parts_of"]  # fmt: skip

#: Asks for the peer's ``KvLayout``.
LAYOUT = "kvferry.vllm.layout"
#: Asks to keep requests' blocks.
RENEW = "kvferry.vllm.renew"
#: Says that a request's blocks are no longer needed, and asks whether they were the request's until now.
RELEASE = "kvferry.vllm.release"


#: Workers that one request may name. A decoding instance speaks to each of them.
MAX_WORKERS = 1024


class Server(NamedTuple):
    """A prefilling worker."""

    url: str
    #: Who it is: a worker that is started again has another id, wherever it answers.
    instance_id: str
    #: As which the channel knows it, and a keyring has its key.
    peer_id: str


@dataclass(frozen=True)
class Remote:
    """A request whose KV cache a prefilling instance keeps."""

    request_id: str
    #: Where its workers answer, by their rank in tensor parallelism.
    urls: tuple[str, ...]
    #: Who they are, by rank; see ``Server``.
    instance_ids: tuple[str, ...]
    block_ids: tuple[int, ...]
    num_tokens: int
    #: Whose tokens these are; see ``digest_of``.
    prompt_digest: str
    #: Seconds for which the blocks are kept after a renewal.
    lease: float
    #: By rank; empty: the urls.
    peer_ids: tuple[str, ...] = ()

    def servers(self) -> list[Server]:
        """The workers, by their rank."""
        return [Server(*server) for server in zip(self.urls, self.instance_ids, self.peer_ids or self.urls)]

    def _seal(self, secret: bytes) -> str:
        """What only who has the secret can make of all members."""
        members = [getattr(self, option.name) for option in fields(self)]
        return hmac.new(secret, msgspec.msgpack.encode(members), hashlib.sha256).hexdigest()

    def to_params(self, secret: bytes = b"") -> dict[str, Any]:
        """The ``kv_transfer_params`` of the decoding request. With a secret they are sealed by it."""
        made = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_request_id": self.request_id,
            "remote_urls": list(self.urls),
            "remote_instance_ids": list(self.instance_ids),
            "remote_block_ids": list(self.block_ids),
            "remote_num_tokens": self.num_tokens,
            "remote_prompt_digest": self.prompt_digest,
            "remote_lease": self.lease,
            "remote_peer_ids": list(self.peer_ids),
        }
        if secret:
            made["remote_seal"] = self._seal(secret)
        return made

    @classmethod
    def from_params(cls, params: Mapping[str, Any], secret: bytes = b"") -> Remote:
        """Raises ValueError for parameters that ``to_params`` with this secret doesn't make: they come from outside."""
        names = [option.name for option in fields(cls)]
        try:
            made = msgspec.convert({name: params.get(f"remote_{name}") for name in names}, cls)
            seal = made._seal(secret)  # and the encoding finds halves of surrogate pairs, and numbers that are too large
        except (ValueError, OverflowError) as error:
            raise ValueError(f"kv_transfer_params: {error}") from error
        if secret and not hmac.compare_digest(seal.encode(), str(params.get("remote_seal")).encode(errors="replace")):
            raise ValueError("kv_transfer_params: not sealed with the secret of secret_file")
        if not made.urls or made.num_tokens < 0 or any(block < 0 for block in made.block_ids):
            raise ValueError("kv_transfer_params: no url, or a number below 0")
        counts = len(made.urls), len(made.instance_ids), len(made.peer_ids or made.urls)
        if counts[0] > MAX_WORKERS or len(set(counts)) > 1:
            raise ValueError(
                f"kv_transfer_params: {counts[0]} urls, {counts[1]} instance ids and {counts[2]} peer ids, and at most "
                f"{MAX_WORKERS} of each"
            )
        if not math.isfinite(made.lease) or made.lease <= 0:
            raise ValueError(f"kv_transfer_params: a lease of {made.lease} seconds")
        return made


def message(kind: str, **members: Any) -> SideMessage:
    """A side message of a kind. Raises for text that is no UTF-8."""
    return SideMessage(kind, msgspec.msgpack.encode({"type": kind, **members}))


def parts_of(names: Iterable[str], most: int) -> Iterator[list[str]]:
    """Lists of names that take up to ``most`` bytes in a message; a longer name is alone."""
    part: list[str] = []
    size = 0
    for name in names:
        length = len(name.encode(errors="surrogatepass")) + 5
        if part and size + length > most:
            yield part
            part, size = [], 0
        part.append(name)
        size += length
    if part:
        yield part


def parse(received: SideMessage) -> dict[str, Any]:
    """The fields of a message."""
    found = msgspec.msgpack.decode(received.encoded)
    assert isinstance(found, dict)
    return found


def layout_message(instance_id: str, layout: KvLayout) -> SideMessage:
    """The answer to LAYOUT."""
    return message(LAYOUT, instance_id=instance_id, layout=asdict(layout))


def layout_from(answer: SideMessage) -> tuple[str, KvLayout]:
    """The worker's instance id and its layout. Raises msgspec.ValidationError for another message."""
    found = parse(answer)
    return str(found.get("instance_id")), msgspec.convert(found.get("layout"), KvLayout)
