// SPDX-License-Identifier: Apache-2.0
// Has prompts computed by prefill.cpp, and goes on from the pages that arrive.
//
//   decode tcp://127.0.0.1:5600
#include <kvferry/tcp_transfer_channel.hpp>

#include <algorithm>
#include <iostream>
#include <numeric>

#include "request.hpp"

namespace example {

constexpr std::size_t pool_pages = 64;

class Decode {
 public:
  explicit Decode(std::string prefill_url)
      : prefill_url_(std::move(prefill_url)), channel_(options_for(memory_)), free_(pool_pages) {
    std::iota(free_.begin(), free_.end(), std::uint64_t{0});
    channel_.lazy_init_peer_connection("decode", "prefill", prefill_url_);
  }

  /// @return whether the prompt's pages have come.
  bool decode(std::uint64_t number, const std::vector<std::uint32_t>& prompt) {
    const std::size_t count = layers * pages_of_layer(prompt.size());
    if (count > free_.size()) {
      throw kvferry::TransferError(kvferry::errc::resource_limit, "no room for request " + std::to_string(number));
    }
    const std::vector<std::uint64_t> pages(free_.end() - static_cast<std::ptrdiff_t>(count), free_.end());
    free_.resize(free_.size() - count);
    std::error_code ec;
    std::string why;
    const PrefillRequest request{number, "decode", channel_.incarnation(), prompt, pages};
    channel_.send_init_side_msg(prefill_url_, kvferry::encode_side_message(request), {.diagnostic = &why}, ec);
    std::vector<kvferry::Notification> arrived;
    if (!ec) {
      // One for each layer. Fewer only after the timeout, with an error.
      arrived = channel_.receive_notifications(number, layers, std::chrono::seconds(10), ec);
    }
    if (arrived.size() < layers) {
      std::cerr << "request " << number << ": " << arrived.size() << " layers came: " << ec.message() << " " << why
                << "\n";
      // Prefill may still write: nobody else gets these pages. A server fences, and frees them then (docs/guide.md).
      return false;
    }
    std::cout << "request " << number << ": " << right_pages(prompt, pages) << " of " << pages.size()
              << " pages are right" << std::endl;
    free_.insert(free_.end(), pages.begin(), pages.end());
    return true;
  }

 private:
  static kvferry::TcpOptions options_for(std::vector<std::byte>& memory) {
    kvferry::TcpOptions options;
    options.regions = {{memory.data(), memory.size(), page_size, kvferry::Access::write}};
    return options;
  }

  [[nodiscard]] std::size_t right_pages(const std::vector<std::uint32_t>& prompt,
                                        const std::vector<std::uint64_t>& pages) const {
    std::size_t right = 0;
    for (std::size_t i = 0; i < pages.size(); ++i) {
      const std::size_t count = pages_of_layer(prompt.size());
      right += memory_[pages[i] * page_size] == state_of(prompt, i % count, i / count) ? 1U : 0U;
    }
    return right;
  }

  const std::string prefill_url_;
  std::vector<std::byte> memory_ = std::vector<std::byte>(pool_pages * page_size);  // outlives the channel
  kvferry::TcpTransferChannel channel_;
  std::vector<std::uint64_t> free_;
};

}  // namespace example

int main(int argc, char** argv) {
  try {
    example::Decode decode(argc > 1 ? argv[1] : "tcp://127.0.0.1:5600");
    bool all = true;
    for (std::uint64_t number = 1; number <= 3; ++number) {
      std::vector<std::uint32_t> prompt(number * 40);
      std::iota(prompt.begin(), prompt.end(), static_cast<std::uint32_t>(number * 1000));
      all = decode.decode(number, prompt) && all;
    }
    return all ? 0 : 1;
  } catch (const kvferry::TransferError& error) {
    std::cerr << "decode: " << error.what() << "\n";
    return 1;
  }
}
