# SPDX-License-Identifier: Apache-2.0
"""The options of C++ are those of Python."""

from __future__ import annotations

import re
from pathlib import Path

import kvferry
import pytest
from kvferry._options import ChannelOptions, RdmaOptions, TcpOptions

HEADERS = Path(__file__).parents[2] / "include" / "kvferry"

#: What Python has another way for, or can't have: an executor, a context of ZeroMQ.
ELSEWHERE = {"regions", "hold_side_messages", "executor", "log_sink", "log_level", "zmq_context"}


def names_of(header: str, struct: str) -> set[str]:
    text = (HEADERS / header).read_text()
    found = re.search(rf"^struct {struct}\b.*?\{{\n(.*?)^\}};", text, re.MULTILINE | re.DOTALL)
    assert found
    members = re.findall(r"^  (?!///)[\w:<> ]+?[ *](\w+)(?: = [^;]*|\{[^;]*\})?;", found[1], re.MULTILINE)
    return set(members) - ELSEWHERE


def renamed(names: set[str]) -> set[str]:
    return {"poll_spin" if name == "poll" else name for name in names}


def test_every_option_is_there() -> None:
    common = renamed(names_of("channel_options.hpp", "ChannelOptions"))
    assert set(ChannelOptions.__annotations__) == common
    assert set(TcpOptions.__annotations__) == common | names_of("tcp_transfer_channel.hpp", "TcpOptions")
    assert set(RdmaOptions.__annotations__) == common | names_of("rdma_transfer_channel.hpp", "RdmaOptions")


def test_every_option_is_taken() -> None:
    kvferry.TcpTransferChannel(**dict.fromkeys(TcpOptions.__annotations__)).close()  # type: ignore[arg-type]
    with pytest.raises(kvferry.TransferError):
        # No device, or no library; on a host with one, the address is nobody's.
        kvferry.RdmaTransferChannel(
            **{**dict.fromkeys(RdmaOptions.__annotations__), "peer_init_url": "nonsense://"}  # type: ignore[arg-type]
        )
