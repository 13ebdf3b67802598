# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Iterator

import kvferry
import pytest
from conftest import TWO_CHANNELS, Pair, run_python


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


def check(program: str) -> None:
    ran = run_python(TWO_CHANNELS + "import logging\n" + program)
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "done", ""), ran.stderr


@pytest.mark.parametrize("raised", ["AttributeError", "SystemExit"])
def test_a_filter_that_raises_loses_its_record_alone(raised: str) -> None:
    check(
        f"""
logging.raiseExceptions = False
filtered = []
def careless(record):
    filtered.append(record.peer)
    raise {raised}("careless")
logger = logging.getLogger("kvferry")
logger.setLevel(logging.INFO)
logger.addFilter(careless)
with kvferry.TcpTransferChannel() as third:
    third.lazy_init_peer_connection("third", "far", far.peer_init_url)
kvferry.flush_logs()
logger.removeFilter(careless)
seen = []
logger.addFilter(lambda record: seen.append(record.peer))
with kvferry.TcpTransferChannel() as fourth:
    fourth.lazy_init_peer_connection("fourth", "far", far.peer_init_url)
kvferry.flush_logs()
print("done" if "third" in filtered and "fourth" in seen else (filtered, seen))
"""
    )


def test_what_a_filter_raises_is_shown() -> None:
    ran = run_python(
        """
import logging
import kvferry
def careless(record):
    raise RuntimeError("careless")
logger = logging.getLogger("kvferry")
logger.setLevel(logging.INFO)
logger.addFilter(careless)
with kvferry.TcpTransferChannel():
    kvferry.flush_logs()
print("done")
"""
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "done") and "RuntimeError: careless" in ran.stderr


def test_a_handler_that_does_not_return_can_be_left() -> None:
    check(
        """
class Slow(logging.Handler):
    def __init__(self):
        super().__init__()
        self.entered, self.go_on = threading.Event(), threading.Event()
    def emit(self, record):
        self.entered.set()
        self.go_on.wait(600)
class Interruption(Exception):
    pass
def interrupt(*_):
    raise Interruption
slow = Slow()
logger = logging.getLogger("kvferry")
logger.setLevel(logging.INFO)
logger.addHandler(slow)
third = kvferry.TcpTransferChannel()
assert slow.entered.wait(20)
signal.signal(signal.SIGALRM, interrupt)
try:
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    kvferry.flush_logs()
except Interruption:
    print("done")
slow.go_on.set()
"""
    )
