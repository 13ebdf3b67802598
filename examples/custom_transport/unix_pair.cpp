// SPDX-License-Identifier: Apache-2.0
// Two processes, four pages, over the transport of this folder. The first one to start decodes:
//
//   unix_pair decode tcp://127.0.0.1:5600
//   unix_pair prefill tcp://127.0.0.1:5600
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

#include "unix_transfer_channel.hpp"

constexpr std::size_t page_size = 64 * 1024;
constexpr std::array<std::uint64_t, 4> pages_at_decode{5, 7, 8, 11};

/// Offers 16 pages, and checks what has arrived in four of them.
bool decode(const std::string& url) {
  std::vector<std::byte> cache(16 * page_size);
  unix_transport::UnixTransferChannel channel(
      {.regions = {{cache.data(), cache.size(), page_size}}, .peer_init_url = url});
  std::cout << channel.peer_init_url() << std::endl;  // for whoever starts the other side
  const kvferry::Notification done = channel.receive_notification(std::chrono::minutes(1));
  for (std::size_t i = 0; i < pages_at_decode.size(); ++i) {
    const std::span page(&cache[pages_at_decode[i] * page_size], page_size);
    if (!std::ranges::all_of(page, [&](std::byte byte) { return byte == std::byte(40 + i); })) {
      std::cerr << "page " << pages_at_decode[i] << " differs\n";
      return false;
    }
  }
  std::cout << "four pages from " << done.peer_id << std::endl;
  return true;
}

/// Writes four pages, and then a notification.
void prefill(const std::string& url) {
  std::vector<std::byte> cache(4 * page_size);
  std::vector<kvferry::ConstBuffer> pages;
  for (std::size_t i = 0; i < 4; ++i) {
    const std::span page(&cache[i * page_size], page_size);
    std::ranges::fill(page, std::byte(40 + i));
    pages.emplace_back(page);
  }
  unix_transport::UnixTransferChannel channel({.regions = {{cache.data(), cache.size(), page_size}}});
  channel.lazy_init_peer_connection("prefill", "decode", url);
  const std::string_view note = "there they are";
  channel.batched_write(
      pages, {.peer_id = "decode", .remote_indexes = pages_at_decode, .notification = std::as_bytes(std::span(note))});
}

int main(int argc, char** argv) {
  const std::string_view role = argc == 3 ? argv[1] : "";
  try {
    if (role == "decode") {
      return decode(argv[2]) ? 0 : 1;
    }
    if (role == "prefill") {
      prefill(argv[2]);
      return 0;
    }
  } catch (const kvferry::TransferError& error) {
    std::cerr << role << ": " << error.what() << "\n";
    return 1;
  }
  std::cerr << "usage: unix_pair decode|prefill tcp://HOST:PORT\n";
  return 2;
}
