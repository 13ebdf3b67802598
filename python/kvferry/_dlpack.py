# SPDX-License-Identifier: Apache-2.0
"""DLPack's protocol, for type checkers."""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["SupportsDLPack"]


class SupportsDLPack(Protocol):
    """A tensor of torch, jax, numpy, ..."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, int]: ...
