# SPDX-License-Identifier: Apache-2.0
"""A Llama of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make_model(path: Path, **changed: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    shape: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
        "initializer_range": 0.2, "torch_dtype": "float32", **changed,
    }  # fmt: skip
    shape = {
        "intermediate_size": 2 * shape["hidden_size"],
        "num_key_value_heads": shape["num_attention_heads"] // 2,
        **shape,
    }
    LlamaForCausalLM(LlamaConfig(**shape)).to(torch.float32).save_pretrained(path)
    return path
