# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os


def own_loopback() -> str:
    """This process's loopback address: of a port that is closed there no other process makes use."""
    shifted = os.getpid() + (1 << 16)  # 127.0.0.x is everybody's
    return f"127.{shifted >> 16 & 0x7F}.{shifted >> 8 & 0xFF}.{shifted & 0xFF}"


def own_loopback_url() -> str:
    return f"tcp://{own_loopback()}:0"
