// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>

int main() {
  constexpr std::size_t page_size = 64 * 1024;

  // The decoding server offers 16 pages and answers handshakes.
  std::vector<std::byte> decode_cache(16 * page_size);
  kvferry::TcpOptions decode_options;
  decode_options.regions = {{decode_cache.data(), decode_cache.size(), page_size}};
  decode_options.peer_init_url = "tcp://127.0.0.1:0";
  kvferry::TcpTransferChannel decode(decode_options);

  // The prefilling server only connects: it needs no listener.
  std::vector<std::byte> prefill_cache(4 * page_size, std::byte{0x2a});
  kvferry::TcpOptions prefill_options;
  prefill_options.regions = {{prefill_cache.data(), prefill_cache.size(), page_size}};
  kvferry::TcpTransferChannel prefill(prefill_options);
  prefill.lazy_init_peer_connection("prefill", "decode", decode.peer_init_url());

  // Its pages 0 to 3 go to pages 5, 7, 8 and 11 there; when the call returns, they are in the other's memory.
  std::vector<kvferry::ConstBuffer> objects;
  for (std::size_t page = 0; page < 4; ++page) {
    objects.emplace_back(&prefill_cache[page * page_size], page_size);
  }
  const std::array<std::uint64_t, 4> indexes{5, 7, 8, 11};
  const std::size_t written = prefill.batched_write(objects, {.peer_id = "decode", .remote_indexes = indexes});

  const auto arrived = std::ranges::count(decode_cache, std::byte{0x2a});
  std::cout << written << " pages written, " << arrived << " bytes arrived\n";
  return arrived == 4 * page_size ? 0 : 1;
}
