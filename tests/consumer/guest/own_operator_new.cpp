// SPDX-License-Identifier: Apache-2.0
// Replaces operator new by one whose blocks free(3) does not take: each has a header, which is checked.
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>

#include <asio/use_future.hpp>

namespace {

constexpr std::size_t header = 16;
constexpr unsigned mark = 0x6b766665;

}  // namespace

void* operator new(std::size_t size) {
  void* const block = std::malloc(size + header);
  if (block == nullptr) {
    throw std::bad_alloc();
  }
  std::memcpy(block, &mark, sizeof(mark));
  return static_cast<char*>(block) + header;
}

void operator delete(void* given) noexcept {
  if (given == nullptr) {
    return;
  }
  void* const block = static_cast<char*>(given) - header;
  if (std::memcmp(block, &mark, sizeof(mark)) != 0) {
    std::fprintf(stderr, "operator delete was given a block that is not operator new's\n");
    std::abort();
  }
  std::free(block);
}

void operator delete(void* given, std::size_t) noexcept { operator delete(given); }

int transfer_on_own_context();

int main() {
  std::vector<std::byte> memory(1 << 16);
  std::vector<std::byte> mine(4096, std::byte{1});
  kvferry::TcpOptions options;
  options.regions = {{memory.data(), memory.size(), 4096}};
  options.peer_init_url = "tcp://127.0.0.1:0";
  kvferry::TcpTransferChannel decode(options);
  kvferry::TcpTransferChannel prefill(kvferry::TcpOptions{});
  prefill.lazy_init_peer_connection("prefill", "decode", decode.peer_init_url());
  const std::vector<std::uint64_t> index{1};
  for (int i = 0; i < 100; ++i) {
    const kvferry::TransferSpec spec{.peer_id = "decode", .remote_indexes = index};
    if (prefill.async_batched_write({kvferry::ConstBuffer(mine)}, spec, asio::use_future).get() != 1) {
      return 1;
    }
  }
  return transfer_on_own_context();
}
