// SPDX-License-Identifier: Apache-2.0
// Two processes, four pages. The first one to start decodes, the other one prefills:
//
//   hello_pages decode tcp://127.0.0.1:5600
//   hello_pages prefill tcp://127.0.0.1:5600
#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>

constexpr std::size_t page_size = 64 * 1024;
/// Where the decoder wants them. Servers agree on this by messages of their own.
constexpr std::array<std::uint64_t, 4> pages_at_decode{5, 7, 8, 11};

/// Offers 16 pages, and says what has arrived in them.
void decode(const std::string& url) {
  std::vector<std::byte> cache(16 * page_size);
  kvferry::TcpOptions options;
  options.regions = {{cache.data(), cache.size(), page_size}};
  options.peer_init_url = url;  // "tcp://0.0.0.0:5600" to be reached from other hosts
  kvferry::TcpTransferChannel channel(options);
  std::cout << "decode waits at " << channel.peer_init_url() << std::endl;

  // Handed out when all pages of the write are in the cache.
  const kvferry::Notification done = channel.receive_notification(std::chrono::minutes(1));
  std::cout << done.peer_id
            << " says: " << std::string_view(reinterpret_cast<const char*>(done.payload.data()), done.payload.size())
            << "\n";
  for (const std::uint64_t page : pages_at_decode) {
    std::cout << "page " << page << " starts with " << std::to_integer<int>(cache[page * page_size]) << "\n";
  }
}

/// Writes its pages 0 to 3 to pages 5, 7, 8 and 11 of the decoder.
void prefill(const std::string& url) {
  std::vector<std::byte> cache(4 * page_size);
  std::vector<kvferry::ConstBuffer> pages;
  for (std::size_t page = 0; page < 4; ++page) {
    const std::span content(&cache[page * page_size], page_size);
    std::ranges::fill(content, std::byte(40 + page));  // what a model would have computed
    pages.emplace_back(content);
  }
  kvferry::TcpOptions options;
  options.regions = {{cache.data(), cache.size(), page_size}};
  kvferry::TcpTransferChannel channel(options);
  channel.lazy_init_peer_connection("prefill", "decode", url);

  const std::string_view note = "the pages of request 1 are there";
  const std::size_t written = channel.batched_write(
      pages, {.peer_id = "decode", .remote_indexes = pages_at_decode, .notification = std::as_bytes(std::span(note))});
  std::cout << written << " pages written\n";
}

int main(int argc, char** argv) {
  const std::string_view role = argc == 3 ? argv[1] : "";
  if (role != "decode" && role != "prefill") {
    std::cerr << "usage: hello_pages decode|prefill tcp://HOST:PORT\n";
    return 2;
  }
  try {
    role == "decode" ? decode(argv[2]) : prefill(argv[2]);
  } catch (const kvferry::TransferError& error) {
    std::cerr << role << ": " << error.what() << "\n";
    return 1;
  }
}
