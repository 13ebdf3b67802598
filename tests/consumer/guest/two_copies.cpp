// SPDX-License-Identifier: Apache-2.0
// A program and a plugin have each a kvferry of their own, one of them in a shared library, and use them at the same time:
// two_copies PLUGIN.
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <exception>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>

namespace {

bool transfer() {
  std::vector<std::byte> memory(1 << 16);
  const std::vector<std::byte> mine(4096, std::byte{1});
  kvferry::TcpOptions options;
  options.regions = {{memory.data(), memory.size(), 4096}};
  options.peer_init_url = "tcp://127.0.0.1:0";
  kvferry::TcpTransferChannel decode(options);
  kvferry::TcpTransferChannel prefill(kvferry::TcpOptions{});
  prefill.lazy_init_peer_connection("prefill", "decode", decode.peer_init_url());
  const std::vector<std::uint64_t> index{1};
  prefill.batched_write({kvferry::ConstBuffer(mine)}, {.peer_id = "decode", .remote_indexes = index});
  return memory[4096] == std::byte{1};
}

}  // namespace

int main(int argc, char** argv) {
  void* const plugin = argc > 1 ? ::dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (plugin == nullptr) {
    std::fprintf(stderr, "%s\n", argc > 1 ? ::dlerror() : "which plugin?");
    return 1;
  }
  const auto plugins_transfer = reinterpret_cast<int (*)()>(::dlsym(plugin, "transfer"));
  const auto plugins_failure = reinterpret_cast<void (*)()>(::dlsym(plugin, "fail"));
  std::atomic<int> wrong{0};
  const auto run = [&](auto works) {
    try {
      for (int round = 0; round < 20; ++round) {
        wrong += works() ? 0 : 1;
      }
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      ++wrong;
    }
  };
  std::thread others([&] { run([&] { return plugins_transfer() == 0; }); });
  run([] { return transfer(); });
  others.join();
  std::error_code failure;
  try {
    plugins_failure();
  } catch (const std::system_error& error) {
    failure = error.code();  // of the plugin's category
  }
  wrong += failure == kvferry::errc::count_mismatch && failure != kvferry::errc::closed ? 0 : 1;
  wrong += failure == kvferry::condition::invalid_argument && failure != kvferry::condition::retryable ? 0 : 1;
  const std::string message = failure.message();
  wrong += std::string(failure.category().name()) == "kvferry" && message.find("differ") != std::string::npos ? 0 : 1;
  ::dlclose(plugin);
  wrong += transfer() ? 0 : 1;
  std::printf("%d wrong: %s\n", wrong.load(), message.c_str());
  return wrong == 0 ? 0 : 1;
}
