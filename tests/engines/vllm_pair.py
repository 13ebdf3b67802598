# SPDX-License-Identifier: Apache-2.0
"""vLLMs in processes of their own, and what a router does between them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PREFILL = {"do_remote_decode": True}
#: Seconds after which a test has failed. None waits for as long by itself.
PATIENCE = 300.0


def prompt_of(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 512) for _ in range(length)]


#: What the tests ask for.
TOKENS = 12
PROMPTS = {f"r{i}": prompt_of(i, 20 + (i * 37) % 400) for i in range(32)}
_numbers = itertools.count()
OPTIONS = {"lease": 20.0, "timeout": 10.0}


class Instance:
    """A vLLM; see vllm_instance.py."""

    def __init__(
        self, model: Path, log: Path, role: str | None = None, extra: Any = None,
        environment: dict[str, str] | None = None, **arguments: Any,
    ) -> None:  # fmt: skip
        if role is not None:
            arguments["kv_transfer_config"] = {
                "kv_connector": "KvferryConnector", "kv_connector_module_path": "kvferry.vllm", "kv_role": role,
                "kv_load_failure_policy": "recompute", "kv_connector_extra_config": extra or {},
            }  # fmt: skip
        self.log = log
        program = str(Path(__file__).with_name("vllm_instance.py"))
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, program, str(model), json.dumps(arguments)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, **(environment or {})},
            )  # fmt: skip
        self._changed = threading.Condition()
        self._ready = False
        self._ended = False
        self._finished: dict[str, dict[str, Any]] = {}
        self._aborted: set[str] = set()
        self._status: dict[int, dict[str, Any]] = {}
        self._asked = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            with self._changed:
                self._ready = self._ready or "ready" in event
                if "finished" in event:
                    self._finished[event["finished"]] = event
                if "aborted" in event:
                    self._aborted.add(event["aborted"])
                if "status" in event:
                    self._status[event["status"]] = event
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _wait(self, there: Any, what: str) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: there() or self._ended, PATIENCE)
            found = there()
            assert found, f"{what} didn't come; see {self.log}:\n{self.log.read_text()[-3000:]}"
            return found

    def _order(self, **order: Any) -> None:
        assert self.process.stdin is not None
        with self._changed:
            print(json.dumps(order), file=self.process.stdin, flush=True)

    def ready(self) -> Instance:
        self._wait(lambda: self._ready, "the start")
        return self

    def add(self, name: str, prompt: list[int], max_tokens: int, params: dict[str, Any] | None = None) -> None:
        """Names are used once."""
        self._order(add=name, prompt=prompt, max_tokens=max_tokens, kv_transfer_params=params)

    def abort(self, name: str) -> None:
        """The request has finished or never does."""
        self._order(abort=name)
        self._wait(lambda: name in self._aborted, f"the abort of {name}")

    def paths(self) -> set[str]:
        """How bytes have travelled, as the log has it."""
        return set(re.findall(r"connected to \S+: (.*)", self.log.read_text()))

    def is_aborted(self, name: str) -> bool:
        with self._changed:
            return name in self._aborted

    def is_finished(self, name: str) -> bool:
        with self._changed:
            return name in self._finished

    def finished(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._wait(lambda: self._finished.get(name), f"the end of {name}")
        return found

    def status(self) -> dict[str, Any]:
        with self._changed:
            self._asked += 1
            asked = self._asked
        self._order(status=asked)
        found: dict[str, Any] = self._wait(lambda: self._status.get(asked), "the status")
        return found

    def wait_until_no_blocks_are_used(self, limit: float) -> float:
        """Seconds that it took."""
        begin = time.monotonic()
        while self.status()["blocks"]:
            assert time.monotonic() - begin < limit, f"{self.status()['blocks']} blocks are used after {limit} s"
            time.sleep(0.02)
        return time.monotonic() - begin

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._close_pipes()

    def _close_pipes(self) -> None:
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def stop(self) -> None:
        if self.process.returncode is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()
            self._close_pipes()


@contextmanager
def instances(*made: Instance) -> Iterator[None]:
    """They start at the same time, and end."""
    try:
        for instance in made:
            instance.ready()
        yield
    finally:
        for instance in made:
            instance.stop()


def running(instance: Instance) -> Iterator[Instance]:
    with instances(instance):
        yield instance


def computed_by(*instances: Instance) -> int:
    return sum(instance.status()["computed"] for instance in instances)


def answers_to_all(hand_over: Callable[[Instance, str, str], None], decodes: list[Instance]) -> dict[str, list[int]]:
    """Hands over all prompts, several at a time, and returns the answers.

    hand_over: gives a decoding instance a request, by its name, that has a prompt of ``PROMPTS``, by its name.
    """

    def one(name: str) -> list[int]:
        decode = decodes[int(name[1:]) % len(decodes)]
        request = f"{name}-{next(_numbers)}"
        hand_over(decode, request, name)
        tokens: list[int] = decode.finished(request)["tokens"]
        return tokens

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(PROMPTS, pool.map(one, PROMPTS)))


def handed_over(prefill: Instance, decode: Instance, name: str, prompt: list[int], max_tokens: int) -> None:
    """What a router does with a request."""
    prefill.add(name, prompt, 1, dict(PREFILL))
    decode.add(name, prompt, max_tokens, prefill.finished(name)["kv_transfer_params"])
