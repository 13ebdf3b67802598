// SPDX-License-Identifier: Apache-2.0
// Includes Asio before all else, and has kvferry run on a context that is made here.
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>

#include <cstddef>
#include <thread>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>

int transfer_on_own_context() {
  asio::io_context context;
  auto work = asio::make_work_guard(context);
  std::thread runner([&] { context.run(); });
  int result = 1;
  {
    std::vector<std::byte> memory(1 << 16);
    std::vector<std::byte> mine(4096, std::byte{1});
    kvferry::TcpOptions options;
    options.executor = context.get_executor();
    options.regions = {{memory.data(), memory.size(), 4096}};
    options.peer_init_url = "tcp://127.0.0.1:0";
    kvferry::TcpTransferChannel decode(options);
    kvferry::TcpOptions source;
    source.executor = context.get_executor();
    kvferry::TcpTransferChannel prefill(source);
    prefill.lazy_init_peer_connection("prefill", "decode", decode.peer_init_url());
    const std::vector<std::uint64_t> index{1};
    prefill.batched_write({kvferry::ConstBuffer(mine)}, {.peer_id = "decode", .remote_indexes = index});
    result = memory[4096] == std::byte{1} ? 0 : 1;
  }
  work.reset();
  runner.join();
  return result;
}
