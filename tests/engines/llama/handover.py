# SPDX-License-Identifier: Apache-2.0
"""examples/llama between processes, with a model of random weights. tests/engines_llama.sh runs it."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

PROGRAM, MODEL = os.environ["KVFERRY_LLAMA_PROGRAM"], os.environ["KVFERRY_LLAMA_MODEL"]
WAYS = ["state", "inplace", "layers"]
PROMPTS = "33,100,200,150"  # at 64 tokens a ubatch
NINE = "33,100,200,150,1,64,65,300,480"

# The processes have it from here, and a shell's background job ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Relay:
    """Between prefill's data connection and decode's port: spoils bytes on the way to decode, or acts among them."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.target = 0
        self.spoiled = range(0)
        self.act_at = 1 << 62
        self.act: Callable[[], None] = lambda: None
        self._passed = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.target)) as server, suppress(OSError):
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = bytearray(source.recv(1 << 14))
                    if not data:
                        return
                    if source is client:
                        begin, self._passed = self._passed, self._passed + len(data)
                        for i in range(max(begin, self.spoiled.start), min(self._passed, self.spoiled.stop)):
                            data[i - begin] ^= 0x10
                        if self._passed >= self.act_at:
                            self.act()  # and these bytes don't get through
                            return
                    (server if source is client else client).sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class Decoder:
    def __init__(self, *options: str, relay: Relay | None = None) -> None:
        if relay:
            options += ("--advertise-data", relay.address)
        self.process = start("decode", MODEL, "tcp://127.0.0.1:0", *options)
        assert self.process.stdout
        said = re.fullmatch(r"decode waits at (\S+), data port (\d+)\n", self.process.stdout.readline())
        assert said
        self.url = said[1]
        if relay:
            relay.target = int(said[2])

    def end(self, expected: int | None = None) -> str:
        """What it has said; it ends by itself, with the expected code, or is killed."""
        if expected is None:
            self.process.kill()
        _, errors = self.process.communicate(timeout=30)
        if expected is not None:
            assert self.process.returncode == expected, errors
        return errors


@pytest.fixture
def relay() -> Iterator[Relay]:
    made = Relay()
    yield made
    made.close()


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def decoder(*options: str, relay: Relay | None = None) -> Iterator[Decoder]:
    made = Decoder(*options, relay=relay)
    try:
        yield made
    finally:
        if made.process.stdout and not made.process.stdout.closed:
            made.end()


def answers(output: str) -> dict[str, list[str]]:
    """The answers by way, each as "LENGTH: TOKENS"."""
    found: dict[str, list[str]] = {}
    for way, answer in re.findall(r"^(\w+) (\d+: [\d ]+)$", output, re.MULTILINE):
        found.setdefault(way, []).append(answer)
    return found


def alone(*options: str) -> list[str]:
    process = start("alone", MODEL, *options)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return answers(output)["alone"]


def check(url: str, *options: str, ways: list[str] = WAYS) -> None:
    """A prefiller's answers are those that a process alone gives."""
    process = start("prefill", MODEL, url, "--way", ",".join(ways), *options)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert answers(output) == {way: alone(*options) for way in ways}


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("prompts", [PROMPTS, NINE])
def test_tokens_are_those_of_one_process(kv: str, prompts: str) -> None:
    with decoder("--kv", kv) as there:
        check(there.url, "--kv", kv, "--prompts", prompts)


def test_the_answers_depend_on_the_cache() -> None:
    assert len({answer.split(":")[1] for answer in alone("--prompts", NINE)}) == 9


def test_a_decoder_serves_several_prefillers_at_a_time() -> None:
    expected = alone("--prompts", NINE)
    with decoder() as there:
        prefillers = [start("prefill", MODEL, there.url, "--prompts", NINE) for _ in range(3)]
        for prefiller in prefillers:
            output, errors = prefiller.communicate(timeout=60)
            assert prefiller.returncode == 0, errors
            assert answers(output) == {way: expected for way in WAYS}


@pytest.mark.parametrize("way", WAYS)
def test_a_prefiller_ends_when_the_decoder_is_killed_and_works_with_the_next_one(way: str, relay: Relay) -> None:
    with decoder(relay=relay) as there:
        relay.act, relay.act_at = there.process.kill, 100_000
        process = start("prefill", MODEL, there.url, "--way", way)
        output, errors = process.communicate(timeout=30)
        assert process.returncode == 3, errors
        assert "the decoder is gone" in errors
        assert not answers(output)
    with decoder() as other:
        check(other.url, ways=[way])


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("way", WAYS)
def test_a_decoder_goes_on_with_the_next_prefiller(way: str, by: signal.Signals, relay: Relay) -> None:
    with decoder(relay=relay) as there:
        victim = start("prefill", MODEL, there.url, "--way", way)
        relay.act, relay.act_at = lambda: victim.send_signal(by), 100_000
        victim.communicate(timeout=30)
        assert victim.returncode == -by
        relay.act_at = 1 << 62
        check(there.url, ways=[way])
        assert re.search(r"prefill-\d+ is gone \(.+\), [1-4] of its prompts were under way", there.end())


def test_a_decoder_of_one_prefiller_ends_with_it(relay: Relay) -> None:
    with decoder("--once", "on", relay=relay) as there:
        victim = start("prefill", MODEL, there.url)
        relay.act, relay.act_at = victim.kill, 100_000
        victim.communicate(timeout=30)
        assert "is gone" in there.end(expected=3)
    with decoder("--once", "on") as there:
        check(there.url)
        assert "0 of its prompts" in there.end(expected=0)


@pytest.mark.parametrize("way", ["state", "inplace"])
def test_a_flipped_bit_is_noticed_and_fetched_again(way: str, relay: Relay) -> None:
    relay.spoiled = range(60_000, 60_001)
    with decoder(relay=relay) as there:
        check(there.url, "--prompts", "200", ways=[way])
        assert "a checksum differs" in there.end()


@pytest.mark.parametrize("way", ["state", "inplace"])
def test_without_checksums_spoiled_bytes_give_wrong_tokens(way: str, relay: Relay) -> None:
    relay.spoiled = range(60_000, 64_000)
    options = ("--checksums", "off")
    with decoder(*options, relay=relay) as there:
        process = start("prefill", MODEL, there.url, "--way", way, "--prompts", "200", *options)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert answers(output)[way] != alone("--prompts", "200")


def test_caches_of_different_kinds_are_refused() -> None:
    with decoder("--kv", "q8_0") as there:
        process = start("prefill", MODEL, there.url)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "--kv differ" in errors
