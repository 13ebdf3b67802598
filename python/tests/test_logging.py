# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Iterator

import kvferry
import pytest
from conftest import Pair


@pytest.fixture(autouse=True)
def usual_level() -> Iterator[None]:
    yield
    kvferry.set_log_level(logging.INFO)


def test_records_go_to_logging(caplog: pytest.LogCaptureFixture, pair: Pair) -> None:
    with caplog.at_level(logging.INFO, "kvferry"), kvferry.TcpTransferChannel() as third:
        third.lazy_init_peer_connection("third-one", "far", pair.far.peer_init_url)
        kvferry.flush_logs()
    connected = [record for record in caplog.records if getattr(record, "event", "") == "peer_connected"]
    assert {getattr(record, "peer") for record in connected} >= {"far", "third-one"}
    assert {(record.name, record.levelno) for record in connected} == {("kvferry", logging.INFO)}
    assert all(getattr(record, "transport") == "tcp" for record in connected)


def test_what_is_below_the_level_is_not_made(caplog: pytest.LogCaptureFixture, pair: Pair) -> None:
    kvferry.set_log_level(logging.WARNING)
    with caplog.at_level(logging.DEBUG, "kvferry"):
        kvferry.flush_logs()
        caplog.clear()
        with kvferry.TcpTransferChannel() as third:
            third.lazy_init_peer_connection("third", "far", pair.far.peer_init_url)
        kvferry.flush_logs()
        assert not [record for record in caplog.records if record.levelno < logging.WARNING]
