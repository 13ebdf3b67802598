// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sched.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <functional>
#include <future>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::test {

/// A network of its own, with nothing but an interface "lo" that is up. It lasts as long as this, and as what was made in it.
/// Making one takes CAP_NET_ADMIN (root, in most containers), the rest the program `ip`.
class NetworkNamespace {
 public:
  /// @throws std::system_error if this process may not have one.
  NetworkNamespace() {
    std::promise<std::error_code> entered;
    auto outcome = entered.get_future();
    thread_ = std::thread([this, &entered] { live(entered); });
    if (const auto ec = outcome.get()) {
      thread_.join();
      throw std::system_error(ec, "a network namespace");
    }
    command("ip link set lo up");
  }
  NetworkNamespace(const NetworkNamespace&) = delete;
  NetworkNamespace& operator=(const NetworkNamespace&) = delete;
  ~NetworkNamespace() {
    run_later({});
    thread_.join();
  }

  /// Runs a function on a thread whose network this is, as is that of all threads it starts, and returns what it returns or
  /// throws. A channel that is made so needs a ZeroMQ context of its own: the process's has threads elsewhere.
  template <class Function>
  auto run(Function function) {
    std::packaged_task<std::invoke_result_t<Function>()> task(std::move(function));
    auto outcome = task.get_future();
    run_later([&task] { task(); });
    return outcome.get();
  }

  /// @throws std::runtime_error if the command fails.
  void command(const std::string& line) {
    if (run([&line] { return std::system(line.c_str()); }) != 0) {
      throw std::runtime_error("failed: " + line);
    }
  }

  /// Joins two networks by a cable: a device `name` in each of them.
  static void connect(NetworkNamespace& a, const std::string& a_device, NetworkNamespace& b, const std::string& b_device) {
    a.command("ip link add " + a_device + " type veth peer name " + b_device + " netns " + std::to_string(b.id_));
    for (auto* end : {&a, &b}) {
      const auto& device = end == &a ? a_device : b_device;
      end->command("ip link set " + device + " addrgenmode none && ip link set " + device + " up");
    }
  }

 private:
  void live(std::promise<std::error_code>& entered) {
    id_ = ::gettid();
    if (::unshare(CLONE_NEWNET) != 0) {
      entered.set_value({errno, std::system_category()});
      return;
    }
    entered.set_value({});
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return has_job_; });
      const auto job = std::exchange(job_, {});
      has_job_ = false;
      lock.unlock();
      if (!job) {
        return;
      }
      job();
      lock.lock();
    }
  }

  void run_later(std::function<void()> job) {
    const std::lock_guard lock(mutex_);
    job_ = std::move(job);
    has_job_ = true;
    changed_.notify_one();
  }

  pid_t id_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::function<void()> job_;
  bool has_job_ = false;
  std::thread thread_;
};

/// Why there can be no namespace here; empty if there can.
[[nodiscard]] inline std::string why_no_network_namespace() {
  try {
    const NetworkNamespace probe;
    return {};
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace kvferry::test
