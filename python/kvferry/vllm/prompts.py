# SPDX-License-Identifier: Apache-2.0
"""Which prompt a KV cache is of. Needs no vLLM: it has to do with requests' attributes only."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

__all__ = ["digest_of"]


def digest_of(request: Any, num_tokens: int) -> str | None:
    """What two requests have in common whose first ``num_tokens`` tokens have the same KV cache, in one model.

    Made of the token ids, the LoRA adapter's name, and the identifiers and places of images and the like. None if the
    prompt has fewer tokens, or is given as embeddings: nothing tells those apart.

    vLLM's own hashes of blocks won't do. They depend on a seed and on the size of a block.
    """
    ids = request.prompt_token_ids
    if ids is None or getattr(request, "prompt_embeds", None) is not None or len(ids) < num_tokens:
        return None
    adapter = getattr(request, "lora_request", None)
    parts = []
    for part in getattr(request, "mm_features", None) or ():
        position = getattr(part, "mm_position", None)
        parts.append((str(part.identifier), getattr(position, "offset", None), getattr(position, "length", None)))
    context = (None if adapter is None else str(adapter.lora_name), parts)
    made = hashlib.sha256(repr(context).encode(errors="backslashreplace") + b"\0")
    made.update(np.array(ids[:num_tokens], dtype="<i8").tobytes())
    return made.hexdigest()
