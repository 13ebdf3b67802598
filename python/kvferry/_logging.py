# SPDX-License-Identifier: Apache-2.0
"""The library's log records in Python's ``logging``, under the logger "kvferry".

They are made on threads of the library's, which never call Python. One thread of Python's, started with the first
channel of a process, takes them and hands them to the logger.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from typing import Any

from . import _kvferry

__all__ = ["flush_logs", "log_exception", "set_log_level", "start", "stop"]

logger = logging.getLogger("kvferry")
_lock = threading.Lock()
_thread: threading.Thread | None = None
_stopped = False
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def _hand(level: int, message: str, created: float | None = None, exc_info: Any = None, **told: Any) -> None:
    """To the logger. What filters and handlers of the program's raise is shown, as ``logging`` shows it, and goes no
    further: not even SystemExit, as it would end a thread without which ``flush_logs`` waits in vain."""
    try:
        if not logger.isEnabledFor(level):
            return
        record = logger.makeRecord(logger.name, level, "kvferry", 0, message, (), exc_info, extra=told)
        if created is not None:
            record.created = created
        logger.handle(record)
    except BaseException:
        if logging.raiseExceptions and sys.stderr is not None:
            traceback.print_exc()


def log_exception(event: str, text: str, transport: str, cause: str) -> None:
    """The exception that is being handled, as a record like those of the library."""
    _hand(logging.ERROR, f"{event}: {text} [{cause}]", exc_info=sys.exc_info(),
          event=event, transport=transport, peer="", cause=cause, suppressed=0)  # fmt: skip


def _forward() -> None:
    # Signals are for threads that wait for them: one that came here would wake none.
    own = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - own)
    while records := _kvferry.log_take():
        for level, time, event, transport, peer, cause, text, suppressed in records:
            message = f"{event}: {text}"
            if cause:
                message += f" [{cause}]"
            if suppressed:
                message += f" ({suppressed} more like this were left out)"
            _hand(level, message, time, event=event, transport=transport, peer=peer, cause=cause, suppressed=suppressed)


def start() -> None:
    """Starts this process's thread, if it isn't there."""
    global _thread
    with _lock:
        if _stopped:
            return
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_forward, name="kvferry-log", daemon=True)
            _thread.start()


def stop() -> None:
    """Ends the thread once all records are written. For the interpreter's exit: nothing is forwarded afterwards."""
    global _stopped
    with _lock:
        _stopped = True
        thread = _thread
    _kvferry.log_stop()
    if thread is not None and thread.is_alive():
        thread.join()


def set_log_level(level: int) -> None:
    """Has records below ``level`` (of ``logging``'s) not made at all. At first, that is ``logging.INFO``."""
    _kvferry.log_level(level)


def flush_logs() -> None:
    """Returns when all records that were made so far are with their handlers."""
    thread = _thread
    while thread is not None and thread.is_alive() and thread is not threading.current_thread():
        if _kvferry.log_flush():
            return
        # A while has passed. Signals' handlers run here.
