# SPDX-License-Identifier: Apache-2.0
"""What the router asks the two instances, made of what a client asked."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

__all__ = ["decoding", "prefilling", "pushed"]

#: They want more of the prompt than its KV cache, or several ends of one beginning.
_NOT_HANDED_OVER = ("echo", "prompt_logprobs", "use_beam_search", "prompt_embeds")
#: They are about the answer, of which a prefilling instance makes one token.
_OF_THE_ANSWER = ("max_completion_tokens", "min_tokens", "stream_options", "best_of")


def _without_params(body: dict[str, Any]) -> dict[str, Any]:
    """Clients say nothing about transfers: vLLM also takes ``kv_transfer_params`` out of ``vllm_xargs``."""
    cleaned = {name: value for name, value in body.items() if name != "kv_transfer_params"}
    extra = cleaned.get("vllm_xargs")
    if isinstance(extra, dict):
        cleaned["vllm_xargs"] = {name: value for name, value in extra.items() if name != "kv_transfer_params"}
    return cleaned


def prefilling(body: dict[str, Any]) -> dict[str, Any] | None:
    """What the prefilling instance is asked. None: the decoding one computes the prompt.

    A list of prompts isn't handed over: an answer has the parameters of one.
    """
    prompt = body.get("prompt", "")
    is_one = isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(token, int) for token in prompt))
    wants_more = any(body.get(name) is not None and body[name] is not False for name in _NOT_HANDED_OVER)
    if not is_one or wants_more:
        return None
    asked = {**_without_params(body), "max_tokens": 1, "n": 1, "stream": False}
    for name in _OF_THE_ANSWER:
        asked.pop(name, None)
    return {**asked, "kv_transfer_params": {"do_remote_decode": True}}


def pushed(
    asked: dict[str, Any], transfer_id: str, urls: list[str], secret: bytes = b""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where the prefilling instance pushes: what it is asked, and the parameters of the decoding one, at the same time.

    asked: of ``prefilling``. urls: where its workers answer. secret: of the instances' ``secret_file``.
    """
    params = {"do_remote_prefill": True, "transfer_id": transfer_id, "remote_urls": urls}
    if secret:  # the second urls stand for the workers' ids
        sealed = json.dumps([transfer_id, urls, urls])
        params["remote_seal"] = hmac.new(secret, sealed.encode(), hashlib.sha256).hexdigest()
    return {**asked, "kv_transfer_params": {"do_remote_decode": True, "transfer_id": transfer_id}}, params


def decoding(body: dict[str, Any], params: Any) -> dict[str, Any]:
    """What the decoding instance is asked. params: what the prefilling one answered; None if nothing."""
    asked = _without_params(body)
    if isinstance(params, dict):
        asked["kv_transfer_params"] = params
    return asked
