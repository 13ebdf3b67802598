// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdio>
#include <iostream>
#include <random>
#include <sstream>

#include "message.hpp"

namespace handover {

struct Request {
  Tokens prompt, answer;
  double first_ms = 0;  ///< From the end of prefill to the decoder's first token, which is the answer's second.
};

/// Computes prompts together, in sequences 0, 1, ..., and the first token of each answer.
inline void compute_prompts(Engine& engine, std::span<Request> requests) {
  std::vector<Engine::Input> inputs;
  for (std::uint32_t i = 0; i < requests.size(); ++i) {
    const Tokens& prompt = requests[i].prompt;
    for (std::uint32_t at = 0; at < prompt.size(); ++at) inputs.push_back({i, at, prompt[at], at + 1 == prompt.size()});
  }
  const Tokens first = engine.compute(inputs);
  for (std::size_t i = 0; i < requests.size(); ++i) requests[i].answer[0] = first[i];
}

/// The answers that a single process gives.
inline void answer_alone(Engine& engine, std::span<Request> requests) {
  compute_prompts(engine, requests);
  for (std::size_t done = 1; done < requests[0].answer.size(); ++done) {
    std::vector<Engine::Input> inputs;
    for (std::uint32_t i = 0; i < requests.size(); ++i) {
      const auto& [prompt, answer, ms] = requests[i];
      inputs.push_back({i, static_cast<std::uint32_t>(prompt.size() + done - 1), answer[done - 1], true});
    }
    const Tokens next = engine.compute(inputs);
    for (std::size_t i = 0; i < next.size(); ++i) requests[i].answer[done] = next[i];
  }
}

/// Calls `answer` for as many prompts at a time as there are sequences, and prints the answers.
/// @return a line of the table.
template <class Answer>
std::string answer_all(const std::string& way, Engine& engine, std::vector<Request> requests, Answer answer) {
  for (std::size_t i = 0; i < requests.size(); i += engine.sequences()) {
    answer(std::span(requests).subspan(i, std::min<std::size_t>(engine.sequences(), requests.size() - i)));
    for (std::uint32_t sequence = 0; sequence < engine.sequences(); ++sequence) engine.forget(sequence);
  }
  std::vector<double> times;
  for (const auto& [prompt, tokens, ms] : requests) {
    std::cout << way << " " << prompt.size() << ":";
    for (const llama_token token : tokens) std::cout << " " << token;
    std::cout << std::endl;
    times.push_back(ms);
  }
  std::ranges::sort(times);
  std::array<char, 128> line{};
  std::snprintf(line.data(), line.size(), "%-8s %7zu %11.2f %11.2f %11.2f\n", way.c_str(), times.size(), times.front(),
                times[times.size() / 2], times.back());
  return line.data();
}

/// Computes prompts, and has a decoder fetch their KV caches and go on.
class Prefiller {
 public:
  /// Connects.
  Prefiller(Engine& engine, const Options& options, const std::string& decoder_url)
      : engine_(engine), channel_(channel_options(engine, options, states_)) {
    watch();
    channel_.lazy_init_peer_connection("prefill-" + std::to_string(std::random_device{}()), "decode", decoder_url);
    const auto alike = [](const auto& mine, const auto& theirs) { return mine.page_size == theirs.page_size; };
    if (!std::ranges::equal(channel_.regions(), channel_.peer_info("decode").value().regions, alike)) {
      throw std::runtime_error("the decoder's KV cache is another: its model, --tokens, --sequences or --kv differ");
    }
  }

  /// Hands prompts over and waits for their answers.
  void answer(Kind way, std::span<Request> requests) {
    std::vector<std::uint32_t> parts(requests.size(), way == Kind::layers ? 0 : 1);
    const auto announce = [&](std::uint32_t tensor, std::span<const std::int64_t> rows) {
      for (std::uint32_t i = 0, count = 1; i < rows.size(); i += count, count = 1) {
        const auto row = static_cast<std::uint32_t>(rows[i]), prompt = row / engine_.size();
        const auto goes_on = [&] { return rows[i + count] == row + count && (row + count) % engine_.size() != 0; };
        while (i + count < rows.size() && goes_on()) ++count;
        tell({Kind::rows, prompt, tensor, row % engine_.size(), count});
        ++parts[prompt];
      }
    };
    if (way == Kind::layers) engine_.filled = announce;
    compute_prompts(engine_, requests);
    engine_.filled = nullptr;
    const auto end = steady_clock::now();
    for (std::uint32_t i = 0; i < requests.size(); ++i) {
      const Tokens& answer = requests[i].answer;
      const auto count = static_cast<std::uint32_t>(requests[i].prompt.size());
      Message all{way, i, 0, 0, count, parts[i], static_cast<std::uint32_t>(answer.size()), answer[0]};
      if (way == Kind::state) {
        const kvferry::LocalRegion room = channel_.regions().back();
        all.bytes = engine_.save(i, {room.data + i * room.page_size, room.page_size});
      }
      tell(all);
    }
    for (std::size_t left = requests.size() * (requests[0].answer.size() - 1); left > 0; --left) {
      const Message token = message_of(channel_.receive_notification());
      Request& request = requests[token.prompt];
      request.answer.at(token.count) = token.token;
      if (token.count == 1) request.first_ms = std::chrono::duration<double, std::milli>(token.time - end).count();
    }
  }

  /// The error that `answer` has thrown, in words. `errc::closed`: the channel was closed here, because of `cause_`.
  [[nodiscard]] std::string explain(const std::system_error& error) const {
    return error.code() == kvferry::errc::closed ? cause_.message() : error.what();
  }

 private:
  void tell(const Message& message) {
    channel_.async_notify("decode", bytes_of(message), {}, [this](std::error_code error) {
      if (error) end(error);
    });
  }
  void watch() {
    channel_.async_wait_peer_event({}, [this](std::error_code error, const kvferry::PeerEvent& event) {
      if (error) return;
      event.kind == kvferry::PeerEventKind::gone ? end(event.cause) : watch();
    });
  }
  /// Wakes `answer`. On the channel's thread.
  void end(std::error_code cause) {
    if (!cause_) cause_ = cause;
    channel_.close();
  }

  Engine& engine_;
  std::vector<std::byte> states_;
  std::error_code cause_;
  kvferry::TcpTransferChannel channel_;
};

}  // namespace handover
