# SPDX-License-Identifier: Apache-2.0
"""kvferry in vLLM (0.32).

``KvferryConnector`` hands KV caches from prefilling to decoding instances:

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvferryConnector", "kv_role": "kv_producer",
        "kv_connector_module_path": "kvferry.vllm"}'

``KvferryDataTransport`` moves blocks between the memory tiers of peers.

Names are looked up when they are used, so that what needs no vLLM can be imported without it.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["KvferryConnector", "KvferryDataTransport"]

_HOMES = {"KvferryConnector": ".connector", "KvferryDataTransport": ".data_transport"}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home, __name__), name)
