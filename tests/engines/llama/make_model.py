# SPDX-License-Identifier: Apache-2.0
"""make_model.py FILE [LAYERS [WIDTH [TOKENS]]]: a llama with random weights, 256 tokens and no tokenizer, for llama.cpp."""

from __future__ import annotations

import sys

import gguf
import numpy as np


def main(path: str, layers: int = 3, width: int = 128, tokens: int = 512) -> None:
    heads, kv_heads, vocabulary, inner = width // 32, max(1, width // 64), 256, 2 * width
    shapes = {
        "attn_q": (width, width),
        "attn_k": (kv_heads * 32, width),
        "attn_v": (kv_heads * 32, width),
        "attn_output": (width, width),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    random = np.random.default_rng(layers)

    def weights(rows: int, columns: int, scale: float) -> np.ndarray:
        return random.normal(0.0, scale / np.sqrt(columns), (rows, columns)).astype(np.float32)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(tokens)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    # Large enough that what attention sees decides which token is next.
    writer.add_tensor("token_embd.weight", weights(vocabulary, width, 3.0))
    writer.add_tensor("output.weight", weights(vocabulary, width, 1.0))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(width, np.float32))
        for name, (rows, columns) in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", weights(rows, columns, 2.0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main(sys.argv[1], *map(int, sys.argv[2:]))
