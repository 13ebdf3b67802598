# SPDX-License-Identifier: Apache-2.0
"""What the two sides tell each other: through the router in ``kv_transfer_params``, and by the channel's side messages.

Needs msgspec, which vLLM brings along, and no vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import msgspec

from .. import SideMessage
from .layout import KvLayout

__all__ = ["LAYOUT", "RELEASE", "RENEW", "Remote", "layout_from", "layout_message", "message", "parse", "parts_of"]

#: Asks for the peer's ``KvLayout``.
LAYOUT = "kvferry.vllm.layout"
#: Asks to keep requests' blocks.
RENEW = "kvferry.vllm.renew"
#: Says that a request's blocks are no longer needed, and asks whether they were the request's until now.
RELEASE = "kvferry.vllm.release"


#: Workers that one request may name. A decoding instance speaks to each of them.
_MAX_WORKERS = 1024


@dataclass(frozen=True)
class Remote:
    """A request whose KV cache a prefilling instance keeps."""

    request_id: str
    #: Where its workers answer, by their rank in tensor parallelism.
    urls: tuple[str, ...]
    #: Who they are, by rank: a worker that is started again has another id, wherever it answers.
    instance_ids: tuple[str, ...]
    block_ids: tuple[int, ...]
    num_tokens: int
    #: Whose tokens these are; see ``digest_of``.
    prompt_digest: str
    #: Seconds for which the blocks are kept after a renewal.
    lease: float

    def to_params(self) -> dict[str, Any]:
        """The ``kv_transfer_params`` of the decoding request."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_request_id": self.request_id,
            "remote_urls": list(self.urls),
            "remote_instance_ids": list(self.instance_ids),
            "remote_block_ids": list(self.block_ids),
            "remote_num_tokens": self.num_tokens,
            "remote_prompt_digest": self.prompt_digest,
            "remote_lease": self.lease,
        }

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Remote:
        """Raises ValueError for parameters that ``to_params`` doesn't make: they come from outside."""
        found = {option.name: params.get(f"remote_{option.name}") for option in fields(cls)}
        try:
            made = msgspec.convert(found, cls)
            msgspec.msgpack.encode([made.request_id, made.urls, made.instance_ids])  # no halves of surrogate pairs
        except ValueError as error:
            raise ValueError(f"kv_transfer_params: {error}") from error
        if not made.urls or made.num_tokens < 0 or any(block < 0 for block in made.block_ids):
            raise ValueError("kv_transfer_params: no url, or a number below 0")
        if len(made.urls) > _MAX_WORKERS or len(made.instance_ids) != len(made.urls):
            raise ValueError(
                f"kv_transfer_params: {len(made.urls)} urls of {len(made.instance_ids)} workers, and at most "
                f"{_MAX_WORKERS} may be named"
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
