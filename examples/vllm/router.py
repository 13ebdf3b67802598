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
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, web
from bodies import decoding, prefilling, pushed

log = logging.getLogger("router")


async def prefill(session: ClientSession, url: str, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Computes the prompt. Returns where its KV cache is, or None: then the decoding instance computes it."""
    try:
        async with session.post(url, json=asked) as answer:
            answer.raise_for_status()
            answered = await answer.json()
            params: dict[str, Any] | None = answered.get("kv_transfer_params") if isinstance(answered, dict) else None
            return params
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
    asked, params, pushing = prefilling(body), None, None
    if asked is not None:
        url, _, workers = next(prefills).partition("=")
        if workers:
            asked, params = pushed(asked, uuid.uuid4().hex, workers.split(","))
            pushing = asyncio.create_task(prefill(session, url + request.path, asked))
        else:
            params = await prefill(session, url + request.path, asked)
    try:
        return await decode(session, request, next(decodes), decoding(body, params))
    finally:
        if pushing is not None:
            pushing.cancel()  # it has ended, unless the client has gone


async def decode(session: ClientSession, request: web.Request, url: str, asked: dict[str, Any]) -> web.StreamResponse:
    # A client that goes cancels this: the connection is closed, and vLLM ends the request and lets the blocks go.
    async with session.post(url + request.path, json=asked) as answer:
        response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
        await response.prepare(request)
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
    arguments = parser.parse_args()
    app = web.Application()
    app["prefills"], app["decodes"] = itertools.cycle(arguments.prefill), itertools.cycle(arguments.decode)
    app.cleanup_ctx.append(with_session)
    app.add_routes([web.post(path, route) for path in ("/v1/completions", "/v1/chat/completions")])
    web.run_app(app, host=arguments.host, port=arguments.port, handler_cancellation=True)
