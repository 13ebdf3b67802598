# SPDX-License-Identifier: Apache-2.0
"""kvferry as a transfer channel of LMCache's (0.5): "kvferry" over TCP, "kvferry_shm" within a host, and "kvferry_auto"
over the better one of the two. All sides have the same.

Importing this registers it, for LMCache's multi-process mode and for its P2P and prefill/decode backends. LMCache makes
its channels before it imports plug-ins, so this is imported first, by a launcher, which runs any other module:

    python -m kvferry.lmcache lmcache.tools.transfer_channel_benchmark --transfer-channel-type kvferry ...
"""

from __future__ import annotations

from lmcache.v1.distributed.transfer_channel.factory import register_transfer_channel_factory

from .context import KvferryAutoContext, KvferryClient, KvferryContext, KvferryServer, KvferryShmContext
from .storage_channel import KvferryAutoChannel, KvferryChannel, KvferryShmChannel, offer

__all__ = [
    "KvferryAutoChannel",
    "KvferryAutoContext",
    "KvferryChannel",
    "KvferryClient",
    "KvferryContext",
    "KvferryServer",
    "KvferryShmChannel",
    "KvferryShmContext",
]

for _name, _context in (
    ("kvferry", KvferryContext), ("kvferry_shm", KvferryShmContext), ("kvferry_auto", KvferryAutoContext)
):  # fmt: skip
    register_transfer_channel_factory(_name, _context)
offer({"kvferry": KvferryChannel, "kvferry_shm": KvferryShmChannel, "kvferry_auto": KvferryAutoChannel})
