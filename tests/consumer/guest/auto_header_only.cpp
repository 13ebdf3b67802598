// SPDX-License-Identifier: Apache-2.0
// All transports but RDMA, compiled by the program: pages move between two of its channels, over shared memory.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <vector>

#include <kvferry/auto_transfer_channel.hpp>
#include <kvferry/shared_region.hpp>

int main() {
  constexpr std::size_t page_size = 4096;
  const kvferry::SharedRegion cache(4 * page_size);
  kvferry::AutoOptions options;
  options.regions = {cache.region(page_size)};
  options.peer_init_url = "tcp://127.0.0.1:0";
  kvferry::AutoTransferChannel decode(options);

  kvferry::AutoTransferChannel prefill(kvferry::AutoOptions{});
  prefill.lazy_init_peer_connection("prefill", "decode", decode.peer_init_url());
  const std::vector<std::byte> page(page_size, std::byte{0x2a});
  const std::array<std::uint64_t, 1> index{2};
  prefill.batched_write({kvferry::ConstBuffer(page)}, {.peer_id = "decode", .remote_indexes = index});

  const auto path = prefill.peer_info("decode")->path;
  std::cout << path << "\n";
  const bool arrived = std::ranges::equal(page, cache.bytes().subspan(2 * page_size, page_size));
  return arrived && path.starts_with("shm") ? 0 : 1;
}
