# SPDX-License-Identifier: Apache-2.0
"""What the two sides tell each other: through the router in ``kv_transfer_params``, and by the channel's side messages.

Needs msgspec, which vLLM brings along, and no vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from .. import SideMessage
from .layout import KvLayout

__all__ = ["LAYOUT", "RELEASE", "RENEW", "Remote", "layout_from", "layout_message", "message", "parse"]

#: Asks for the peer's ``KvLayout``.
LAYOUT = "kvferry.vllm.layout"
#: Asks to keep requests' blocks.
RENEW = "kvferry.vllm.renew"
#: Says that a request's blocks are no longer needed, and asks whether they were the request's until now.
RELEASE = "kvferry.vllm.release"


@dataclass(frozen=True)
class Remote:
    """A request whose KV cache a prefilling instance keeps."""

    engine_id: str
    request_id: str
    #: Where its workers answer, by their rank in tensor parallelism.
    urls: tuple[str, ...]
    block_ids: tuple[int, ...]
    num_tokens: int

    def to_params(self) -> dict[str, Any]:
        """The ``kv_transfer_params`` of the decoding request."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine_id,
            "remote_request_id": self.request_id,
            "remote_urls": list(self.urls),
            "remote_block_ids": list(self.block_ids),
            "remote_num_tokens": self.num_tokens,
        }

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Remote:
        """Raises ValueError for parameters that ``to_params`` doesn't make: they come from outside."""
        names = ("remote_engine_id", "remote_request_id", "remote_urls", "remote_block_ids", "remote_num_tokens")
        found = {name.removeprefix("remote_"): params.get(name) for name in names}
        try:
            made = msgspec.convert(found, cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"kv_transfer_params: {error}") from error
        if not made.urls or made.num_tokens < 0 or any(block < 0 for block in made.block_ids):
            raise ValueError("kv_transfer_params: no url, or a number below 0")
        return made


def message(kind: str, **fields: Any) -> SideMessage:
    """A side message of a kind."""
    return SideMessage(kind, msgspec.msgpack.encode({"type": kind, **fields}))


def parse(received: SideMessage) -> dict[str, Any]:
    """The fields of a message."""
    fields = msgspec.msgpack.decode(received.encoded)
    assert isinstance(fields, dict)
    return fields


def layout_message(engine_id: str, layout: KvLayout) -> SideMessage:
    """The answer to LAYOUT."""
    return message(LAYOUT, engine_id=engine_id, layout=asdict(layout))


def layout_from(answer: SideMessage) -> tuple[str, KvLayout]:
    """The engine and its layout. Raises msgspec.ValidationError for another message."""
    fields = parse(answer)
    return str(fields.get("engine_id")), msgspec.convert(fields.get("layout"), KvLayout)
