// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ggml-backend.h>
#include <ggml.h>
#include <llama.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace handover {

/// A model in llama.cpp, and its KV cache: for each layer a tensor of K and one of V, each with a part for each
/// sequence. The part of an empty sequence is filled from its beginning, a row for each token.
class Engine {
 public:
  struct Input {
    std::uint32_t sequence, position;
    llama_token token;
    bool wanted;  ///< Whether the token after this one is.
  };

  Engine(const std::string& path, std::uint32_t sequences, std::uint32_t tokens, std::uint32_t ubatch, bool q8_0) {
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    llama_model* model = llama_model_load_from_file(path.c_str(), llama_model_default_params());
    model_.reset(model);
    if (model == nullptr) throw std::runtime_error(path + ": no model for llama.cpp");
    if (llama_model_n_swa(model) > 0 || llama_model_is_recurrent(model) || llama_model_is_hybrid(model)) {
      throw std::runtime_error(path + ": a model that doesn't keep K and V of each token");
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = tokens * sequences;
    params.n_ubatch = ubatch;
    params.n_seq_max = sequences;
    params.kv_unified = false;                               // a part for each sequence
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;  // without it V is transposed: a token is no row
    params.type_k = params.type_v = q8_0 ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;
    params.n_threads = params.n_threads_batch = 1;
    params.cb_eval = look;
    params.cb_eval_user_data = this;
    context_.reset(llama_init_from_model(model, params));
    if (!context_) throw std::runtime_error("llama.cpp refuses these sizes");
    compute({{0, 0, 0, false}});  // shows the tensors
    forget(0);
  }

  std::vector<ggml_tensor*> tensors;
  /// Called within `compute` when rows have got into a tensor: row r is row r % size() of sequence r / size().
  std::function<void(std::uint32_t tensor, std::span<const std::int64_t> rows)> filled;

  [[nodiscard]] llama_context* get() const { return context_.get(); }
  [[nodiscard]] std::uint32_t sequences() const { return llama_n_seq_max(get()); }
  [[nodiscard]] std::uint32_t size() const { return llama_n_ctx_seq(get()); }  ///< Tokens of a sequence.
  [[nodiscard]] int vocabulary() const { return llama_vocab_n_tokens(llama_model_get_vocab(model_.get())); }

  /// Adds tokens to their sequences. @return the most likely next token after each that is wanted.
  std::vector<llama_token> compute(const std::vector<Input>& inputs) {
    const auto deleter = [](llama_batch* batch) { llama_batch_free(*batch); };
    llama_batch batch = llama_batch_init(static_cast<std::int32_t>(inputs.size()), 0, 1);
    const std::unique_ptr<llama_batch, decltype(deleter)> owner(&batch, deleter);
    for (const Input& input : inputs) {
      const auto i = batch.n_tokens++;
      batch.token[i] = input.token;
      batch.pos[i] = static_cast<llama_pos>(input.position);
      batch.n_seq_id[i] = 1;
      batch.seq_id[i][0] = static_cast<llama_seq_id>(input.sequence);
      batch.logits[i] = input.wanted ? 1 : 0;
    }
    const int status = inputs.empty() ? 0 : llama_decode(get(), batch);
    if (status != 0) throw std::runtime_error("llama_decode ends with " + std::to_string(status));
    std::vector<llama_token> next;
    for (std::int32_t i = 0; i < batch.n_tokens; ++i) {
      if (batch.logits[i] == 0) continue;
      const float* logits = llama_get_logits_ith(get(), i);
      next.push_back(static_cast<llama_token>(std::max_element(logits, logits + vocabulary()) - logits));
    }
    return next;
  }

  /// Makes llama.cpp count the first rows of an empty sequence as those of `count` tokens, and leaves what lies there:
  /// it begins to compute such tokens, and is told to stop before it gets to a row.
  void claim(std::uint32_t sequence, std::uint32_t count) {
    std::vector<Input> inputs;
    for (std::uint32_t i = 0; i < count; ++i) inputs.push_back({sequence, i, 0, false});
    claiming_ = true;
    compute(inputs);
    claiming_ = false;
  }
  /// The state of a sequence, as llama.cpp writes it: K and V, and what it knows of them.
  [[nodiscard]] std::size_t state_size(std::uint32_t sequence) const {
    return llama_state_seq_get_size(get(), static_cast<llama_seq_id>(sequence));
  }
  std::size_t save(std::uint32_t sequence, std::span<std::byte> to) {
    const auto bytes = reinterpret_cast<std::uint8_t*>(to.data());
    return llama_state_seq_get_data(get(), bytes, to.size(), static_cast<llama_seq_id>(sequence));
  }
  bool load(std::uint32_t sequence, std::span<const std::byte> from) {
    const auto bytes = reinterpret_cast<const std::uint8_t*>(from.data());
    return llama_state_seq_set_data(get(), bytes, from.size(), static_cast<llama_seq_id>(sequence)) != 0;
  }
  void forget(std::uint32_t sequence) {
    llama_memory_seq_rm(llama_get_memory(get()), static_cast<llama_seq_id>(sequence), -1, -1);
  }

 private:
  /// llama.cpp asks for each node of its graph whether to stop after it; if so, it comes again when that is computed,
  /// and drops the rest of the graph where the answer then is false.
  static bool look(ggml_tensor* node, bool ask, void* user) {
    Engine& self = *static_cast<Engine*>(user);
    if (self.claiming_) return ask;
    if (node->op != GGML_OP_SET_ROWS || !std::string_view(node->view_src->name).starts_with("cache_")) return false;
    const auto known = std::ranges::find(self.tensors, node->view_src);
    const auto index = static_cast<std::uint32_t>(known - self.tensors.begin());
    if (known == self.tensors.end()) self.tensors.push_back(node->view_src);
    if (ask) return self.filled != nullptr;
    const ggml_tensor& rows = *node->src[1];
    self.filled(index, {static_cast<const std::int64_t*>(rows.data), static_cast<std::size_t>(ggml_nelements(&rows))});
    return true;
  }

  std::unique_ptr<llama_model, decltype(&llama_model_free)> model_{nullptr, llama_model_free};
  std::unique_ptr<llama_context, decltype(&llama_free)> context_{nullptr, llama_free};
  bool claiming_ = false;
};

}  // namespace handover
