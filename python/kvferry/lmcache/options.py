# SPDX-License-Identifier: Apache-2.0
"""What LMCache's configuration has no place for, and what is said in its log."""

from __future__ import annotations

import json
import os
from typing import Any

from lmcache.logging import init_logger

from .. import BaseTransferChannel

__all__ = ["VARIABLE", "channel_options", "say_path", "without_scheme"]

_logger = init_logger("kvferry.lmcache")

#: Of the environment: further options of all channels, by the names that kvferry's constructors have, as a JSON object.
VARIABLE = "KVFERRY_LMCACHE_OPTIONS"


def channel_options(**defaults: Any) -> dict[str, Any]:
    """What a channel's constructor is told. Raises ValueError where the variable is no JSON object."""
    text = os.environ.get(VARIABLE, "{}")
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{VARIABLE} is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{VARIABLE} is a JSON object, as {{\"checksums\": true}}, and not {text}")
    return {**defaults, **given}


def without_scheme(url: str) -> str:
    return url.split("://", 1)[-1]


def say_path(channel: BaseTransferChannel, peer_id: str) -> None:
    """How bytes travel."""
    peer = channel.peer_info(peer_id)
    if peer is not None:
        _logger.info("connected to %s: %s", peer_id, peer.path)
