// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>

namespace example {

/// The sizes that decide how large a model's KV cache is. The names and numbers are those of the model's published config.json.
struct KvGeometry {
  std::string_view model;
  std::uint64_t num_hidden_layers = 0;

  // Grouped-query attention caches K and V of each KV head.
  std::uint64_t num_key_value_heads = 0;
  std::uint64_t head_dim = 0;

  // Multi-head latent attention (MLA) caches one compressed vector for all heads, and the key's rotary part.
  std::uint64_t kv_lora_rank = 0;
  std::uint64_t qk_rope_head_dim = 0;

  [[nodiscard]] constexpr bool is_latent() const noexcept { return kv_lora_rank != 0; }

  /// Numbers cached for one token in one layer.
  [[nodiscard]] constexpr std::uint64_t elements_per_layer() const noexcept {
    return is_latent() ? kv_lora_rank + qk_rope_head_dim : 2 * num_key_value_heads * head_dim;
  }

  /// Bytes cached for one token in all layers.
  [[nodiscard]] constexpr std::uint64_t bytes_per_token(std::uint64_t dtype_bytes) const noexcept {
    return num_hidden_layers * elements_per_layer() * dtype_bytes;
  }

  /// Bytes of one block of `tokens_per_block` tokens in one layer: what a paged KV cache allots at a time.
  [[nodiscard]] constexpr std::uint64_t bytes_per_block(std::uint64_t dtype_bytes) const noexcept {
    return tokens_per_block * elements_per_layer() * dtype_bytes;
  }

  static constexpr std::uint64_t tokens_per_block = 16;
};

[[nodiscard]] constexpr KvGeometry grouped_query_attention(std::string_view model, std::uint64_t num_hidden_layers,
                                                           std::uint64_t num_key_value_heads,
                                                           std::uint64_t head_dim) noexcept {
  return {model, num_hidden_layers, num_key_value_heads, head_dim, 0, 0};
}

[[nodiscard]] constexpr KvGeometry latent_attention(std::string_view model, std::uint64_t num_hidden_layers,
                                                    std::uint64_t kv_lora_rank,
                                                    std::uint64_t qk_rope_head_dim) noexcept {
  return {model, num_hidden_layers, 0, 0, kv_lora_rank, qk_rope_head_dim};
}

/// The models that the peers know. (Where a config.json has no head_dim, it is hidden_size / num_attention_heads.)
inline constexpr std::array known_models{
    grouped_query_attention("llama-3.1-8b", 32, 8, 128),
    grouped_query_attention("llama-3.1-70b", 80, 8, 128),
    grouped_query_attention("qwen2.5-7b", 28, 4, 128),
    latent_attention("deepseek-v3", 61, 512, 64),
};

/// Null for a model that isn't known.
[[nodiscard]] constexpr const KvGeometry* find_model(std::string_view model) noexcept {
  const auto* found = std::find_if(known_models.begin(), known_models.end(),
                                   [model](const KvGeometry& known) { return known.model == model; });
  return found == known_models.end() ? nullptr : found;
}

}  // namespace example
