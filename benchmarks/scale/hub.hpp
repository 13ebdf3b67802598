// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fmt/core.h>
#include <CLI/CLI.hpp>

#include <array>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>
#ifdef KVFERRY_BENCH_WITH_RDMA
#include <kvferry/rdma_transfer_channel.hpp>
#endif

namespace bench {

enum class Transport : std::uint8_t { tcp, rdma };

inline std::unique_ptr<kvferry::BaseTransferChannel> make_channel(Transport transport,
                                                                  const kvferry::ChannelOptions& options) {
  if (transport == Transport::tcp) {
    kvferry::TcpOptions tcp;
    static_cast<kvferry::ChannelOptions&>(tcp) = options;
    return std::make_unique<kvferry::TcpTransferChannel>(tcp);
  }
#ifdef KVFERRY_BENCH_WITH_RDMA
  kvferry::RdmaOptions rdma;
  static_cast<kvferry::ChannelOptions&>(rdma) = options;
  return std::make_unique<kvferry::RdmaTransferChannel>(rdma);
#else
  throw std::runtime_error("this program was built without rdma");
#endif
}

inline kvferry::ChannelOptions options_of(std::vector<std::byte>& memory, std::size_t page) {
  kvferry::ChannelOptions options;
  options.regions = {{memory.data(), memory.size(), page}};
  options.poll = kvferry::PollPolicy::never();  // thousands of threads that poll would measure each other
  options.max_peers = std::size_t{1} << 16;
  options.log_sink = [](const kvferry::LogRecord&) {};
  return options;
}

/// The resources that another process holds and has used.
struct ProcessUsage {
  double resident_kib = 0;
  double pinned_kib = 0;  ///< For adapters.
  double descriptors = 0;
  double threads = 0;
  double cpu_seconds = 0;

  [[nodiscard]] static ProcessUsage of(pid_t process) {
    const std::string folder = "/proc/" + std::to_string(process);
    ProcessUsage usage;
    std::ifstream statm(folder + "/statm");
    double total = 0;
    statm >> total >> usage.resident_kib;
    usage.resident_kib *= static_cast<double>(::sysconf(_SC_PAGESIZE)) / 1024;
    std::ifstream status(folder + "/status");
    for (std::string name; status >> name;) {
      if (name == "VmPin:") {
        status >> usage.pinned_kib;
      } else if (name == "Threads:") {
        status >> usage.threads;
      }
    }
    usage.descriptors = static_cast<double>(std::distance(std::filesystem::directory_iterator(folder + "/fd"), {}));
    std::ifstream stat(folder + "/stat");
    std::string line;
    std::getline(stat, line);
    // Fields 14 and 15, counted from behind the name, which may hold anything.
    const std::vector<std::string> fields = CLI::detail::split(line.substr(line.rfind(')') + 2), ' ');
    usage.cpu_seconds =
        (std::stod(fields.at(11)) + std::stod(fields.at(12))) / static_cast<double>(::sysconf(_SC_CLK_TCK));
    return usage;
  }
};

/// The channel that all others connect to, in a process of its own. To be made before any thread is.
class Hub {
 public:
  Hub(Transport transport, std::size_t pages, std::size_t page) {
    std::array<int, 2> url{};
    std::array<int, 2> end{};
    if (::pipe(url.data()) != 0 || ::pipe(end.data()) != 0 || (process_ = ::fork()) == -1) {
      throw std::runtime_error("no process for the hub");
    }
    if (process_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      ::close(url[0]);
      ::close(end[1]);
      ::_exit(serve(transport, pages, page, url[1], end[0]));
    }
    ::close(url[1]);
    ::close(end[0]);
    end_ = end[1];
    for (char byte = 0; ::read(url[0], &byte, 1) == 1;) {
      url_ += byte;
    }
    ::close(url[0]);
    if (url_.empty()) {
      throw std::runtime_error("the hub does not listen");
    }
  }
  Hub(const Hub&) = delete;
  Hub& operator=(const Hub&) = delete;
  ~Hub() {
    ::close(end_);
    ::waitpid(process_, nullptr, 0);
  }

  [[nodiscard]] const std::string& url() const noexcept { return url_; }
  [[nodiscard]] ProcessUsage usage() const { return ProcessUsage::of(process_); }

 private:
  static int serve(Transport transport, std::size_t pages, std::size_t page, int url, int end) try {
    std::vector<std::byte> memory(pages * page);
    kvferry::ChannelOptions options = options_of(memory, page);
    options.peer_init_url = "tcp://127.0.0.1:0";
    const auto channel = make_channel(transport, options);
    const std::string own = channel->peer_init_url();
    if (::write(url, own.data(), own.size()) != static_cast<ssize_t>(own.size())) {
      return 1;
    }
    ::close(url);
    char ignored = 0;
    return ::read(end, &ignored, 1) == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    fmt::print(stderr, "the hub: {}\n", error.what());
    return 1;
  }

  pid_t process_ = -1;
  int end_ = -1;
  std::string url_;
};

}  // namespace bench
