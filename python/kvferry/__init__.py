# SPDX-License-Identifier: Apache-2.0
"""kvferry moves KV-cache pages between inference servers: peer to peer, in batches, over TCP, RDMA and within a host.

    import kvferry, numpy as np

    cache = np.zeros((16, 65536), dtype=np.uint8)
    decode = kvferry.TcpTransferChannel(
        regions=[kvferry.Region(cache, page_size=65536)], peer_init_url="tcp://127.0.0.1:0"
    )
    prefill = kvferry.TcpTransferChannel()
    prefill.lazy_init_peer_connection("prefill", "decode", decode.peer_init_url)
    prefill.batched_write([bytes(65536)] * 4, "decode", remote_indexes=[5, 7, 8, 11])

The exit of the interpreter closes all channels. Before that Python waits for the threads that are no daemons: the
program has to end one that waits in a call of kvferry's, by closing its channel, say.
"""

from __future__ import annotations

import atexit
import os

from . import _kvferry

_kvferry.check_interpreter()

from . import _logging  # noqa: E402
from ._channel import (  # noqa: E402
    AutoTransferChannel,
    BaseTransferChannel,
    RdmaTransferChannel,
    ShmTransferChannel,
    TcpTransferChannel,
    to_prometheus,
)
from ._errors import TransferError, TransferTimeout  # noqa: E402
from ._kvferry import Addresses, CompletionQueue, Operation, Pages, Region, SharedRegion, __version__  # noqa: E402
from ._logging import flush_logs, set_log_level  # noqa: E402
from ._types import Access, Notification, PeerEvent, PeerInfo, RdmaRail, RemoteRegion, Road, SideMessage  # noqa: E402

__all__ = [
    "Access",
    "Addresses",
    "AutoTransferChannel",
    "BaseTransferChannel",
    "CompletionQueue",
    "Notification",
    "Operation",
    "Pages",
    "PeerEvent",
    "PeerInfo",
    "RdmaRail",
    "RdmaTransferChannel",
    "Region",
    "RemoteRegion",
    "Road",
    "SharedRegion",
    "ShmTransferChannel",
    "SideMessage",
    "TcpTransferChannel",
    "TransferError",
    "TransferTimeout",
    "__version__",
    "flush_logs",
    "set_log_level",
    "to_prometheus",
]

_kvferry.log_level(20)


def _at_exit() -> None:
    """No thread of the library's may call Python, nor write to its objects' memory, when the interpreter is gone."""
    try:
        _kvferry.close_all()
    finally:
        try:
            _logging.stop()
        finally:
            _kvferry.wait_for_threads()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_kvferry.forget_threads)
