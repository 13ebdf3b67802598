// SPDX-License-Identifier: Apache-2.0
#include <optional>
#include <system_error>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>

/// 0 if a page arrived.
extern "C" __attribute__((visibility("default"))) int transfer() {
  std::vector<std::byte> memory(1 << 16);
  std::vector<std::byte> mine(4096, std::byte{1});
  kvferry::TcpOptions options;
  options.regions = {{memory.data(), memory.size(), 4096}};
  options.peer_init_url = "tcp://127.0.0.1:0";
  kvferry::TcpTransferChannel decode(options);
  kvferry::TcpTransferChannel prefill(kvferry::TcpOptions{});
  const auto url = decode.peer_init_url();
  prefill.lazy_init_peer_connection("prefill", "decode", "tcp://localhost" + url.substr(url.rfind(':')));
  const std::vector<std::uint64_t> index{1};
  prefill.batched_write({kvferry::ConstBuffer(mine)}, {.peer_id = "decode", .remote_indexes = index});
  return memory[4096] == std::byte{1} ? 0 : 1;
}

extern "C" __attribute__((visibility("default"))) void fail() {
  kvferry::TcpTransferChannel channel(kvferry::TcpOptions{});
  channel.batched_write({kvferry::ConstBuffer()}, {.peer_id = "nobody"});
}

/// Leaves a lookup of this name behind. @param wait_until_asked returns when the lookup has begun.
extern "C" __attribute__((visibility("default"))) void look_up(const char* url, void (*wait_until_asked)()) {
  kvferry::TcpTransferChannel channel(kvferry::TcpOptions{});
  channel.async_lazy_init_peer_connection("prefill", "decode", url, {}, {},
                                          [](std::error_code, const std::optional<kvferry::SideMessage>&) {});
  wait_until_asked();
}
