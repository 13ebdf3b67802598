# SPDX-License-Identifier: Apache-2.0
"""Sends each request to a prefilling vLLM and then, with what that answered, to a decoding one.

python router.py --port 8000 --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200 [http://127.0.0.1:8201 ...]

A prefilling one that pushes stands there with its workers' urls, and the request goes to both at once:
--prefill http://127.0.0.1:8100=tcp://127.0.0.1:7100[,tcp://127.0.0.1:7101 ...]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, web
from bodies import decoding, prefilling, pushed
from both import answer_beside

log = logging.getLogger("router")


async def prefill(session: ClientSession, url: str, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Computes the prompt. Returns the answer, or None: then the decoding instance computes it."""
    try:
        async with session.post(url, json=asked) as answer:
            answer.raise_for_status()
            answered = await answer.json()
            return answered if isinstance(answered, dict) else {}
    except (ClientError, TimeoutError, ValueError) as error:
        log.warning("the prompt is computed where it is decoded, as %s failed: %s", url, error)
        return None


async def route(request: web.Request) -> web.StreamResponse:
    session, prefills, decodes = (request.app[name] for name in ("session", "prefills", "decodes"))
    try:
        body = await request.json()
    except ValueError as error:
        raise web.HTTPBadRequest(text=f"no JSON: {error}") from error
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="no JSON object")
    asked, params, target = prefilling(body), None, next(decodes)
    if asked is not None:
        url, _, workers = next(prefills).partition("=")
        if workers:
            asked, params = pushed(asked, uuid.uuid4().hex, workers.split(","), request.app["secret"])

            async def compute() -> bool:
                return await prefill(session, url + request.path, asked) is not None

            async def answer(is_pushed: bool, begun: asyncio.Event) -> web.StreamResponse:
                return await decode(session, request, target, decoding(body, params if is_pushed else None), begun)

            return await answer_beside(compute(), answer)
        params = (await prefill(session, url + request.path, asked) or {}).get("kv_transfer_params")
    return await decode(session, request, target, decoding(body, params), asyncio.Event())


async def decode(
    session: ClientSession, request: web.Request, url: str, asked: dict[str, Any], begun: asyncio.Event
) -> web.StreamResponse:
    # A client that goes cancels this: the connection is closed, and vLLM ends the request and lets the blocks go.
    async with session.post(url + request.path, json=asked) as answer:
        response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
        first = await answer.content.readany()  # until then another answer may take its place
        begun.set()
        await response.prepare(request)
        await response.write(first)
        async for part in answer.content.iter_any():
            await response.write(part)
        await response.write_eof()
        return response


async def with_session(app: web.Application) -> AsyncIterator[None]:
    async with ClientSession(timeout=ClientTimeout(total=None, sock_connect=5)) as app["session"]:
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prefill", nargs="+", required=True)
    parser.add_argument("--decode", nargs="+", required=True)
    parser.add_argument("--secret-file", type=Path, help="the instances' own, where they push")
    arguments = parser.parse_args()
    app = web.Application()
    app["secret"] = arguments.secret_file.read_bytes().strip() if arguments.secret_file else b""
    app["prefills"], app["decodes"] = itertools.cycle(arguments.prefill), itertools.cycle(arguments.decode)
    app.cleanup_ctx.append(with_session)
    app.add_routes([web.post(path, route) for path in ("/v1/completions", "/v1/chat/completions")])
    web.run_app(app, host=arguments.host, port=arguments.port, handler_cancellation=True)
