# SPDX-License-Identifier: Apache-2.0
"""The exception of this package."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["TransferError", "TransferTimeout", "from_native"]


class TransferError(Exception):
    """A call to a channel that failed. Its text names the peer, the field and the values.

    Decide by the conditions, not by names: ``if error.retryable: ...``
    """

    #: The stable name of the error: "timed_out", "connection_lost", "ECONNREFUSED".
    name: str
    #: The category of ``code``: "kvferry", "system", ...
    category: str
    code: int
    #: How many objects of the batch were transferred all the same.
    transferred: int
    #: The name of the error for each object, None for one that was transferred; empty unless ``statuses=True`` was
    #: given.
    statuses: tuple[str | None, ...]
    conditions: frozenset[str]

    def __init__(
        self,
        text: str,
        name: str = "handshake_failed",
        category: str = "kvferry",
        code: int = 0,
        transferred: int = 0,
        statuses: Iterable[str | None] = (),
        conditions: Iterable[str] = (),
    ) -> None:
        super().__init__(text)
        self.name = name
        self.category = category
        self.code = code
        self.transferred = transferred
        self.statuses = tuple(statuses)
        self.conditions = frozenset(conditions)

    @property
    def invalid_argument(self) -> bool:
        """Repeating the call unchanged fails again."""
        return "invalid_argument" in self.conditions

    @property
    def peer_failed(self) -> bool:
        """The peer or the way to it is gone."""
        return "peer_failed" in self.conditions

    @property
    def retryable(self) -> bool:
        """The same call may succeed later."""
        return "retryable" in self.conditions

    @property
    def cancelled(self) -> bool:
        """Ended from this side: cancelled, or the channel was closed."""
        return "cancelled" in self.conditions

    @property
    def timed_out(self) -> bool:
        """The deadline passed."""
        return "timed_out" in self.conditions

    @property
    def may_still_land(self) -> bool:
        """Of a write or send: bytes of it may still land. Its pages are not to be used for something else before the
        peer's side has called ``fence``, or a later operation of this side with the same peer has succeeded."""
        return "may_still_land" in self.conditions


class TransferTimeout(TransferError, TimeoutError):
    """A call whose deadline passed."""


def from_native(
    text: str,
    category: str,
    code: int,
    name: str,
    conditions: tuple[str, ...],
    transferred: int,
    statuses: tuple[str | None, ...],
) -> TransferError:
    """Makes the exception for an error code. For the extension module."""
    kind = TransferTimeout if "timed_out" in conditions else TransferError
    return kind(text, name, category, code, transferred, statuses, conditions)
