# SPDX-License-Identifier: Apache-2.0
"""What goes on beside the engine: steps that wait for a channel's operations, for calls, and for each other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Union

from .. import CompletionQueue, Operation

__all__ = ["Asking", "Runner", "Signal", "Steps", "Waited"]

_logger = logging.getLogger("kvferry.vllm")


class Signal:
    """A value that steps wait for. It is told once; see ``Runner.tell``."""

    def __init__(self) -> None:
        self.told = False
        self.value: Any = None
        self.waiting: list[Generator[Any, Any, Any]] = []


#: What steps wait for: operations, signals, and the results of calls that take too long for the lock.
Waited = Union[Operation, Signal, Callable[[], Any]]
Steps = Generator[Waited, Any, None]
#: The same for a question that is answered by yes or no.
Asking = Generator[Waited, Any, bool]


class Runner:
    """Takes steps on, under a lock: a thread when an operation has ended, another one when a call has returned.

    The lock is for whoever else calls: ``perform`` and ``tell`` want it held.
    """

    def __init__(self) -> None:
        self.queue = CompletionQueue()
        self.lock = threading.Lock()
        self._planner = ThreadPoolExecutor(1, "kvferry-vllm-plans")
        self._thread = threading.Thread(target=self._run, name="kvferry-vllm", daemon=True)
        self._ended = False

    def start(self, last: Steps) -> None:
        """The thread ends with these steps, once nothing else is under way."""
        with self.lock:
            self.perform(self._to_the_end(last))
        self._thread.start()

    def _to_the_end(self, last: Steps) -> Steps:
        yield from last
        self._ended = True

    def join(self) -> None:
        """After the steps that it was started with have been made to end."""
        self._planner.shutdown()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.queue.wait()
            with self.lock:
                for operation in self.queue.drain():
                    self.perform(operation.user_data)
                if not len(self.queue) and self._ended:
                    return

    def perform(self, steps: Generator[Waited, Any, Any], value: Any = None, error: Exception | None = None) -> None:
        """Takes steps to what they wait for next. Under the lock, so that the thread finds them in the operation.

        Whatever goes wrong in them ends them alone: neither the thread nor the engine.
        """
        try:
            waited = steps.send(value) if error is None else steps.throw(error)
            while isinstance(waited, Signal) and waited.told:
                waited = steps.send(waited.value)
            if isinstance(waited, Signal):
                waited.waiting.append(steps)
            elif isinstance(waited, Operation):
                waited.user_data = steps
            else:
                self._planner.submit(self._call, steps, waited)
        except StopIteration:
            pass
        except Exception:
            _logger.exception("a fault of the connector's")

    def tell(self, signal: Signal, value: Any = None) -> None:
        """Takes on what waits for it, at once. The first value counts."""
        if signal.told:
            return
        signal.told, signal.value = True, value
        waiting, signal.waiting = signal.waiting, []
        for steps in waiting:
            self.perform(steps, value)

    def _call(self, steps: Generator[Waited, Any, Any], wanted: Callable[[], Any]) -> None:
        value, failed = None, None
        try:
            value = wanted()
        except Exception as error:
            failed = error
        with self.lock:
            self.perform(steps, value, failed)
