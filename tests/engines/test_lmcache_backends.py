# SPDX-License-Identifier: Apache-2.0
"""LMCache's P2P and prefill/decode backends, its engine and its controller, with kvferry's channel: tests/engines.sh."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from free_ports import free_port

CHANNELS = ["kvferry", "kvferry_shm", "kvferry_auto"]
#: Milliseconds for which LMCache waits for its own messages; an instance's first question to the controller takes them.
PATIENCE = {"worker_socket_recv_timeout_ms": 5000, "p2p_socket_recv_timeout_ms": 60000, "p2p_max_retry_count": 2}
#: Chunks in each instance's memory.
ALL = 64
#: A controller goes on to know the chunks of instances that have ended.
_bases = itertools.count(1000, 1000)


class Instance:
    """An LMCache; see lmcache_instance.py."""

    def __init__(self, log: Path, base: int = 0, **given: Any) -> None:
        self.base, self.given = base, given
        program = str(Path(__file__).with_name("lmcache_instance.py"))
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, program, str(base), json.dumps(given)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, "LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "INFO"},
            )  # fmt: skip
        self.log = log

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the instance has ended; see {self.log}:\n{self.log.read_text()[-3000:]}"
        return json.loads(line)

    def ready(self) -> None:
        assert self.answer() == "ready"

    def ask(self, *order: Any) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self.answer()

    def find(self, numbers: list[int], count: int) -> None:
        """The controller hears of chunks after a while."""
        until = time.monotonic() + 120
        while (found := self.ask("find", numbers)) != count:
            assert time.monotonic() < until, f"{found} chunks are found"

    def find_and_get(self, chunks: dict[int, int]) -> None:
        """A peer that was away is found again."""
        until = time.monotonic() + 120
        while True:
            self.find(list(chunks), len(chunks))
            got = self.ask("get", list(chunks))
            if got == [[value] for value in chunks.values()]:
                return
            assert time.monotonic() < until, got

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def is_answered(port: int) -> bool:
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """LMCache's controller; where it is, in the words of the instances' configuration."""
    pull, reply, port = free_port(), free_port(), free_port()
    program = Path(sys.executable).with_name("lmcache_controller")
    log = tmp_path_factory.mktemp("controller") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [program, "--host", "127.0.0.1", "--port", str(port),
             "--monitor-ports", json.dumps({"pull": pull, "reply": reply})],
            stdout=output, stderr=output, env={**os.environ, "LMCACHE_TRACK_USAGE": "false"},
        )  # fmt: skip
    until = time.monotonic() + 120
    while not is_answered(port):
        assert process.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    yield {"controller_pull_url": f"127.0.0.1:{pull}", "controller_reply_url": f"127.0.0.1:{reply}"}
    process.kill()
    process.wait()


class Peers:
    """Makes instances that share their chunks."""

    def __init__(self, folder: Path, controller: dict[str, Any], stack: contextlib.ExitStack) -> None:
        self._folder, self._controller, self._stack = folder, controller, stack
        self._base = next(_bases)

    def start(self, channel: str, *names: str, **patience: int) -> list[Instance]:
        made = [
            self._started(
                lmcache_instance_id=f"{name}-{self._folder.name}", transfer_channel=channel,
                lmcache_worker_ports=[free_port()], p2p_init_ports=[free_port()], p2p_lookup_ports=[free_port()],
                extra_config={**PATIENCE, **patience}, **self._controller,
            )
            for name in names
        ]  # fmt: skip
        for instance in made:
            instance.ready()
        return made

    def start_again(self, instance: Instance) -> Instance:
        """Its successor, at the same urls."""
        made = self._started(**instance.given)
        made.ready()
        return made

    def _started(self, **given: Any) -> Instance:
        made = Instance(self._folder / f"{given['lmcache_instance_id']}.log", self._base, **given)
        self._stack.callback(made.kill)
        return made


@pytest.fixture
def peers(tmp_path: Path, controller: dict[str, Any]) -> Iterator[Peers]:
    with contextlib.ExitStack() as stack:
        yield Peers(tmp_path, controller, stack)


def url_of(instance: Instance) -> str:
    return f"127.0.0.1:{instance.given['p2p_init_ports'][0]}"


@pytest.mark.parametrize("channel", CHANNELS)
def test_peers_get_chunks_from_each_other_and_move_some(peers: Peers, channel: str) -> None:
    a, b = peers.start(channel, "a", "b")
    a.ask("put", {1: 5, 2: 6, 3: 7})
    b.ask("put", {11: 8, 12: 9})
    b.find([1, 2, 3, 4], 3)
    assert b.ask("get", [1, 2, 3]) == [[5], [6], [7]]
    a.find([11, 12], 2)
    assert a.ask("get", [11, 12]) == [[8], [9]]
    assert (a.ask("free"), b.ask("free")) == (ALL - 3, ALL - 2)
    assert a.ask("move", [1, 3], url_of(b)) == 2
    assert b.ask("local", [1, 2, 3, 11]) == [[5], None, [7], [8]]
    assert (a.ask("free"), b.ask("free")) == (ALL - 3, ALL - 4)


def test_what_a_peer_has_freed_is_not_read(peers: Peers) -> None:
    """The controller's news are late: what it has said is there is no longer."""
    a, b = peers.start("kvferry", "a", "b")
    a.ask("put", {1: 5, 2: 6, 3: 7})
    b.find([1, 2, 3], 3)
    assert a.ask("drop", [2, 3]) == 2
    a.ask("put", {4: 66, 5: 77})  # in their place
    assert b.ask("get", [1, 2, 3]) == [[5]]
    assert a.ask("drop", [1]) == 1
    b.find([4, 5], 2)
    assert a.ask("drop", [4, 5]) == 2
    assert b.ask("get", [4, 5]) == []
    assert (a.ask("free"), b.ask("free")) == (ALL, ALL)


def test_a_killed_peer_and_its_successor(peers: Peers) -> None:
    a, b = peers.start("kvferry", "a", "b", p2p_socket_recv_timeout_ms=3000)
    a.ask("put", {1: 5, 2: 6})
    b.find_and_get({1: 5, 2: 6})
    b.find([1, 2], 2)
    a.kill()
    assert not isinstance(b.ask("get", [1, 2]), list)  # LMCache passes on that there is nobody
    successor = peers.start_again(a)
    successor.ask("put", {1: 50, 2: 60})
    b.find_and_get({1: 50, 2: 60})
    b.ask("put", {3: 70})
    successor.find_and_get({3: 70})


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("channel", CHANNELS)
def test_prefill_hands_chunks_to_decode(tmp_path: Path, channel: str, mode: str) -> None:
    init, alloc = free_port(), free_port()
    common = {"transfer_channel": channel, "pd_backend_mode": mode}
    place = {"pd_peer_host": "127.0.0.1", "pd_peer_init_port": [init], "pd_peer_alloc_port": [alloc]}
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(stack.enter_context(zmq.Context()).socket(zmq.PULL))
        proxy.rcvtimeo = 60_000
        proxy_port = proxy.bind_to_random_port("tcp://127.0.0.1")
        decode = Instance(tmp_path / "decode.log", pd_role="receiver", **place, **common)
        stack.callback(decode.kill)
        prefill = Instance(
            tmp_path / "prefill.log", pd_role="sender", pd_proxy_host="127.0.0.1", pd_proxy_port=proxy_port, **common
        )
        stack.callback(prefill.kill)
        decode.ready()
        prefill.ready()
        prefill.ask("hand_over", {1: 5, 2: 6, 3: 7}, "127.0.0.1", init, alloc, 10)
        assert b"request of ['1', '2', '3']" in proxy.recv()
        whole = 4 * 2 * 16 * 2 * 64
        assert decode.ask("local", [1, 2, 3]) == [[[5], whole], [[6], whole], [[7], whole // 16 * 10]]
        prefill.ask("hand_over", {4: 8}, "127.0.0.1", init, alloc, 16)
        assert b"request of ['4']" in proxy.recv()
        assert decode.ask("local", [4, 1]) == [[[8], whole], [[5], whole]]
