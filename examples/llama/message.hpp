// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>

#include "engine.hpp"

namespace handover {

using std::chrono::steady_clock;
using Options = std::map<std::string, std::string>;
using Tokens = std::vector<llama_token>;

/// A message of one to the other, in a notification. Both run on machines of one kind.
struct Message {
  enum class Kind : std::uint32_t {
    // From the prefiller. Of the last three, one comes when a prompt is computed; the cache is complete when as many
    // `parts` of it have been fetched. The answer is to have `length` tokens, and begins with `token`.
    rows,     ///< Fetch `count` rows of `tensor`, from row `first` on: they are computed.
    state,    ///< Fetch the state, of `bytes` bytes.
    inplace,  ///< Fetch `count` rows of each tensor.
    layers,   ///< Fetch nothing more than `rows` said.
    // From the decoder.
    token,  ///< It is number `count` of the answer, and was computed at `time`.
  } kind{};
  std::uint32_t prompt = 0;  ///< The prefiller's sequence, which is its page in each region.
  std::uint32_t tensor = 0, first = 0, count = 0, parts = 0, length = 0;
  llama_token token = 0;
  std::uint64_t bytes = 0;
  steady_clock::time_point time{};  ///< Processes of one host have this clock in common.
};
using Kind = Message::Kind;

inline kvferry::ConstBuffer bytes_of(const Message& message) { return std::as_bytes(std::span(&message, 1)); }
inline Message message_of(const kvferry::Notification& note) {
  Message message;
  std::memcpy(&message, note.payload.data(), std::min(note.payload.size(), sizeof message));
  return message;
}

/// The memory: a region for each tensor of the KV cache, and one with room for states. A page is a sequence's part.
inline kvferry::TcpOptions channel_options(Engine& engine, const Options& options, std::vector<std::byte>& states) {
  kvferry::TcpOptions tcp;
  for (const ggml_tensor* tensor : engine.tensors) {
    if (!ggml_backend_buffer_is_host(tensor->buffer)) throw std::runtime_error("the KV cache isn't in host memory");
    auto* data = static_cast<std::byte*>(tensor->data);
    tcp.regions.push_back({data, ggml_nbytes(tensor), tensor->nb[2], kvferry::Access::read});
  }
  engine.claim(0, engine.size());
  const std::size_t page = engine.state_size(0);  // no state is larger than that of a full sequence
  engine.forget(0);
  states.resize(page * engine.sequences());
  tcp.regions.push_back({states.data(), states.size(), page, kvferry::Access::read});
  tcp.checksums = options.at("--checksums") == "on";
  return tcp;
}

}  // namespace handover
