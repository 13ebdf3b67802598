# SPDX-License-Identifier: Apache-2.0
"""The library's log records in Python's ``logging``, under the logger "kvferry".

They are made on threads of the library's, which never call Python. One thread of Python's, started with the first
channel of a process, takes them and hands them to the logger.
"""

from __future__ import annotations

import logging
import os
import signal
import threading

from . import _kvferry

__all__ = ["flush_logs", "set_log_level", "start", "stop"]

logger = logging.getLogger("kvferry")
_lock = threading.Lock()
_thread: threading.Thread | None = None
_stopped = False
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def _forward() -> None:
    # Signals are for threads that wait for them: one that came here would wake none.
    own = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - own)
    while records := _kvferry.log_take():
        for level, time, event, transport, peer, cause, text, suppressed in records:
            if not logger.isEnabledFor(level):
                continue
            message = f"{event}: {text}"
            if cause:
                message += f" [{cause}]"
            if suppressed:
                message += f" ({suppressed} more like this were left out)"
            record = logger.makeRecord(
                logger.name,
                level,
                "kvferry",
                0,
                message,
                (),
                None,
                extra={
                    "event": event,
                    "transport": transport,
                    "peer": peer,
                    "cause": cause,
                    "suppressed": suppressed,
                },
            )
            record.created = time
            logger.handle(record)


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
    if thread is not None and thread.is_alive() and thread is not threading.current_thread():
        _kvferry.log_flush()
