// SPDX-License-Identifier: Apache-2.0
// Computes prompts for decode.cpp, and writes each layer's pages into decode's memory while it computes the next one.
//
//   prefill tcp://127.0.0.1:5600
#include <kvferry/tcp_transfer_channel.hpp>

#include <asio/use_future.hpp>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <future>
#include <iostream>
#include <mutex>

#include "request.hpp"

namespace example {

class Prefill : public kvferry::TcpTransferChannel {
 public:
  explicit Prefill(kvferry::TcpOptions options) : TcpTransferChannel(std::move(options)) { answer_side_messages(); }
  ~Prefill() override { close(); }

  /// On a thread of the channel's. Its exceptions become the error of decode's call.
  kvferry::SideMessage handle_init_side_msg(const kvferry::SideMessage& message) override {
    if (!message.is<PrefillRequest>()) {
      return TcpTransferChannel::handle_init_side_msg(message);
    }
    auto request = kvferry::decode_side_message<PrefillRequest>(message);
    if (request.prompt.empty() || request.pages.size() != layers * pages_of_layer(request.prompt.size())) {
      throw kvferry::TransferError(kvferry::errc::count_mismatch, "the prompt doesn't take so many pages");
    }
    const std::lock_guard lock(mutex_);
    requests_.push_back(std::move(request));
    changed_.notify_one();
    return message;
  }

  PrefillRequest next_request() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !requests_.empty(); });
    PrefillRequest request = std::move(requests_.front());
    requests_.pop_front();
    return request;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<PrefillRequest> requests_;
};

/// A layer's state of a prompt, in the layer's part of the cache. @return its pages.
std::vector<kvferry::ConstBuffer> compute(std::span<std::byte> cache, std::size_t layer,
                                          const std::vector<std::uint32_t>& prompt) {
  std::vector<kvferry::ConstBuffer> pages;
  for (std::size_t page = 0; page < pages_of_layer(prompt.size()); ++page) {
    pages.emplace_back(cache.subspan(page * page_size, page_size));
    std::ranges::fill(cache.subspan(page * page_size, page_size), state_of(prompt, page, layer));
  }
  return pages;
}

void serve(const std::string& url) {
  kvferry::TcpOptions options;
  options.peer_init_url = url;
  options.hold_side_messages = true;  // until the object is whole
  Prefill channel(std::move(options));
  std::cout << "prefill waits at " << channel.peer_init_url() << std::endl;
  for (;;) {
    const PrefillRequest request = channel.next_request();
    const std::size_t count = pages_of_layer(request.prompt.size());
    std::vector<std::byte> cache(layers * count * page_size);
    std::vector<std::future<std::size_t>> writes;
    for (std::size_t layer = 0; layer < layers; ++layer) {
      const auto pages =
          compute(std::span(cache).subspan(layer * count * page_size, count * page_size), layer, request.prompt);
      // Decode waits for one notification of the request's for each layer. It comes when the pages are there.
      const auto note = std::byte(layer);
      writes.push_back(
          channel.async_batched_write(pages,
                                      {.peer_id = request.decode_id,
                                       .remote_indexes = std::span(request.pages).subspan(layer * count, count),
                                       .incarnation = request.incarnation,  // never into a later run's pages
                                       .timeout = std::chrono::seconds(10),
                                       .notification = {&note, 1},
                                       .notification_key = request.number},
                                      asio::use_future));
    }
    // The cache is read until its writes have ended, whatever their ends are.
    for (auto& write : writes) {
      try {
        std::cout << "request " << request.number << ": " << write.get() << " pages written" << std::endl;
      } catch (const std::system_error& error) {
        std::cerr << "request " << request.number << " of " << request.decode_id << ": " << error.what() << "\n";
      }
    }
  }
}

}  // namespace example

int main(int argc, char** argv) {
  try {
    example::serve(argc > 1 ? argv[1] : "tcp://127.0.0.1:5600");
  } catch (const kvferry::TransferError& error) {
    std::cerr << "prefill: " << error.what() << "\n";
    return 1;
  }
}
