# SPDX-License-Identifier: Apache-2.0
"""One request at two instances at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

__all__ = ["answer_beside"]

Answer = TypeVar("Answer")


async def answer_beside(
    prefill: Awaitable[bool], decode: Callable[[bool, asyncio.Event], Awaitable[Answer]]
) -> Answer:
    """Has a prompt pushed by one instance while the other one waits for it. Returns what that one answers.

    prefill: computes the prompt; whether it did. Cancelled when nobody needs it any more.
    decode: asks the decoding instance; told whether the prompt is pushed, and what to set when its answer begins. Where
    the prompt isn't computed and no answer has begun, it is cancelled, and called again for a prompt that isn't pushed.
    """
    begun = asyncio.Event()
    prefilling = asyncio.ensure_future(prefill)
    answering = asyncio.ensure_future(decode(True, begun))
    try:
        await asyncio.wait({prefilling, answering}, return_when=asyncio.FIRST_COMPLETED)
        if prefilling.done() and not prefilling.result() and not answering.done() and not begun.is_set():
            answering.cancel()  # else it would wait for a lease
            await asyncio.wait({answering})
            answering = asyncio.ensure_future(decode(False, begun))
        return await answering
    finally:
        for task in (prefilling, answering):
            task.cancel()
        await asyncio.wait({prefilling, answering})
